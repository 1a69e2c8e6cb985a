"""Paged attention alone: bytes and operations per second of the native kernels, beside what the machine can do at best.

Work is measured on the shape of the bundled model (9 query heads, 3 kv heads of 64, 30 layers), a step being one call
per layer, as in the model: every layer has pages of its own, so nothing stays in a near cache from step to step. Limits
and work take turns; figures are medians of the repeats, with the fastest beside them.

    uv run python benchmarks/attention_kernel.py                        # about three minutes
    uv run python benchmarks/attention_kernel.py --threads 2 --kept int8 --works "prompt 512" "decode 32 x 192"
    uv run python benchmarks/attention_kernel.py --threads 1 --heads 32 8 128 --layers 4 --torch

Rows:
    decode 4096      one sequence, one new token at 4,096 tokens of context: limited by reading
    decode 32 x 256  32 sequences at 256 tokens, and at 192: more arithmetic for the same bytes
    prefill 256      a chunk of 256 tokens that ends at 4,096: limited by arithmetic
    prompt 4096      a whole prompt, and one of 512 tokens
and what the host prepares once per step.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aios_kvcache import PagedKVCache, SequenceSlice
from aios_kvcache.layout import num_blocks_for
from aios_kvcache.native import NativePagedKVCache
from aios_kvcache.native.native_cache import KV_DTYPES
from aios_model.config import LayerSpec, ModelConfig
from aios_model.native import get_pool
from aios_serve.bench.limits import measure_limits

BLOCK_SIZE = 16
Cache = PagedKVCache | NativePagedKVCache


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A step: `sequences` of them, each with `new` tokens that end at `context`."""

    name: str
    sequences: int
    context: int
    new: int

    def tables(self) -> list[list[int]]:
        """A block table for every sequence."""
        pages = num_blocks_for(self.context, BLOCK_SIZE)
        return [list(range(1 + index * pages, 1 + (index + 1) * pages)) for index in range(self.sequences)]

    @property
    def num_blocks(self) -> int:
        """Pages of all sequences."""
        return self.sequences * num_blocks_for(self.context, BLOCK_SIZE)

    @property
    def num_scores(self) -> int:
        """Pairs of query and key that see each other, for one head and one layer."""
        return self.sequences * sum(range(self.context - self.new + 1, self.context + 1))


def pieces(tables: list[list[int]], start: int, end: int) -> list[SequenceSlice]:
    """Tokens [start, end) of every sequence; the tables are copies, as the block manager gives them."""
    return [SequenceSlice(start=start, length=end - start, block_table=table.copy()) for table in tables]


WORKS = (
    Work(name="decode 4096", sequences=1, context=4096, new=1),
    Work(name="decode 32 x 256", sequences=32, context=256, new=1),
    Work(name="decode 32 x 192", sequences=32, context=192, new=1),
    Work(name="prefill 256", sequences=1, context=4096, new=256),
    Work(name="prompt 512", sequences=1, context=512, new=512),
    Work(name="prompt 4096", sequences=1, context=4096, new=4096),
)


def model(heads: list[int], layers: int) -> ModelConfig:
    """A model of nothing but attention."""
    num_heads, num_kv_heads, head_dim = heads
    spec = LayerSpec(num_key_value_heads=num_kv_heads, head_dim=head_dim, window=None, scale=head_dim**-0.5)
    return ModelConfig(
        architecture="llama",
        vocab_size=16,
        hidden_size=num_heads * head_dim,
        intermediate_size=16,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        max_position_embeddings=1 << 20,
        layers=(spec,) * layers,
    )


def stepper(work: Work, cache: Cache, config: ModelConfig) -> Callable[[], None]:
    """Fills the context; returns what runs the step's layers."""

    tables = work.tables()

    def attend(start: int, end: int) -> Callable[[], None]:
        cache.bind(pieces(tables, start, end))
        rows = work.sequences * (end - start)
        counts = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        q, k, v = (torch.randn(rows, count, config.head_dim) for count in counts)

        def step() -> None:
            for layer in range(config.num_hidden_layers):
                cache.attend(layer, q, k, v)

        return step

    for start in range(0, work.context - work.new, 512):
        attend(start, min(start + 512, work.context - work.new))()
    return attend(work.context - work.new, work.context)


def seconds(step: Callable[[], None]) -> float:
    """Of one step."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def make_cache(config: ModelConfig, work: Work, kept: str) -> Cache:
    """Pages for the work, kept as the name says."""
    num_blocks = work.num_blocks
    if kept == "torch":
        return PagedKVCache(config, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=torch.float32, device="cpu")
    kv_dtype = next(dtype for dtype, name in KV_DTYPES.items() if name == kept)
    return NativePagedKVCache(config, num_blocks=num_blocks, block_size=BLOCK_SIZE, kv_dtype=kv_dtype, pool=get_pool())


def measure(work: Work, config: ModelConfig, kept: str, threads: int, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    torch.set_num_threads(threads if kept == "torch" else 1)
    cache = make_cache(config, work, kept)
    step = stepper(work, cache, config)
    step()
    times, limits = [], []
    for _ in range(repeats):
        limits.append(measure_limits(threads))
        times += [seconds(step) for _ in range(3)]
    num_bytes = cache.num_bytes * work.num_blocks / (work.num_blocks + 1)
    operations = 4 * work.num_scores * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    median, fastest = statistics.median(times), min(times)
    return {
        "work": work.name,
        "kept as": kept,
        "threads": threads,
        "ms": 1e3 * median,
        "fastest ms": 1e3 * fastest,
        "GB/s": num_bytes / median / 1e9,
        "GFLOP/s": operations / median / 1e9,
        "of DRAM reads": num_bytes / median / statistics.median(limit.large_read for limit in limits),
        "of cached reads": num_bytes / median / statistics.median(limit.cached_read for limit in limits),
        "of arithmetic": operations / median / statistics.median(limit.float_operations for limit in limits),
    }


def measure_bind(config: ModelConfig, context: int) -> dict[str, float]:
    """Microseconds of `bind` for 64 sequences: with new tables, and with those of the step before."""
    work = Work(name="bind", sequences=64, context=context, new=1)
    tables = work.tables()
    caches = [make_cache(config, work, "bfloat16") for _ in range(5)]
    steps = [pieces(tables, context - 16 + step, context - 15 + step) for step in range(15)]
    new = [seconds(lambda cache=cache: cache.bind(steps[0])) for cache in caches]
    known = [seconds(lambda step=step: caches[0].bind(step)) for step in steps]
    return {
        "pages": len(tables[0]),
        "new tables us": 1e6 * statistics.median(new),
        "known tables us": 1e6 * statistics.median(known),
    }


def print_row(row: dict[str, Any]) -> None:
    """One line of the Markdown table."""
    shares = [f"{100 * row[name]:.0f}%" for name in ("of DRAM reads", "of cached reads", "of arithmetic")]
    figures = [f"{row['ms']:.2f} ({row['fastest ms']:.2f})", f"{row['GB/s']:.1f}", f"{row['GFLOP/s']:.0f}"]
    print("| " + " | ".join([row["work"], row["kept as"], str(row["threads"]), *figures, *shares]) + " |", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kept", nargs="+", default=["bfloat16", "int8", "float32"], choices=list(KV_DTYPES.values()))
    names = [work.name for work in WORKS]
    parser.add_argument("--works", nargs="+", default=names, choices=names)
    parser.add_argument("--heads", type=int, nargs=3, default=[9, 3, 64], metavar=("QUERY", "KV", "SIZE"))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--torch", action="store_true", help="measure PagedKVCache in float32 as well")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    config = model(arguments.heads, arguments.layers)
    print(f"{platform.machine()}, torch {torch.__version__}, heads {arguments.heads}, {arguments.layers} layers\n")
    print(
        "| work | kept as | threads | ms (fastest) | GB/s | GFLOP/s | of DRAM reads | of cached reads | of arithmetic |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for threads in arguments.threads:
        get_pool(threads)
        for work in (work for work in WORKS if work.name in arguments.works):
            for kept in [*arguments.kept, *(["torch"] if arguments.torch else [])]:
                rows.append(measure(work, config, kept, threads, arguments.repeats))
                print_row(rows[-1])
    binds = [measure_bind(model(arguments.heads, 1), context) for context in (272, 4112)]
    print("\n| bind 64 sequences of | new tables | known tables |\n|---|---|---|")
    for bind in binds:
        print(f"| {bind['pages']} pages | {bind['new tables us']:.0f} us | {bind['known tables us']:.0f} us |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "bind": binds}, indent=1))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
