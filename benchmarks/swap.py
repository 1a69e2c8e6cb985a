"""Swap against recompute: how long a preempted request takes to its next token, over the length of its context.

The bundled model with its native kernels, prefix caching off, so that all of a request's pages are its own and nothing
is found by luck. A request reads its prompt and answers four tokens; then its pages are taken, and the clock runs
until its next token: saving, if it is swapped, coming back, and the step itself. The engines take turns at each length.

    uv run python benchmarks/swap.py                                  # about two minutes
    uv run python benchmarks/swap.py --threads 2 --repeats 7 --plot docs/en/assets/swap.svg
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

from aios_parallel.planning.plot import Series, log_plot
from aios_sched.request import Request
from aios_serve import InferenceEngine, SamplingParams

WAYS = {
    "recompute": {},
    "swap, host memory": {"kv_offloading_size": 1 << 30, "preemption_mode": "swap"},
    "swap, disk": {"kv_offloading_size": 2 << 20, "kv_offloading_disk_size": 1 << 30, "preemption_mode": "swap"},
}


def main() -> None:
    """Measures, prints a table, and draws it."""
    given = _arguments()
    engines = {way: _build(options, given) for way, options in WAYS.items()}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for length in given.lengths:
        samples: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(given.repeats + 1):
            for way, engine in engines.items():
                measured = _seconds_to_next_token(engine, length, number)
                samples[way] += [measured] if number else []  # the first one warms up
        for way, values in samples.items():
            seconds[way].append(statistics.median(values))
    _print(given, engines["swap, disk"], seconds)
    if given.plot is not None:
        lines = [Series(name=way, points=list(zip(given.lengths, each, strict=True))) for way, each in seconds.items()]
        title = f"Preemption to next token, SmolLM2-135M, {given.threads} thread(s)"
        given.plot.write_text(log_plot(lines, title=title, x_title="context, tokens", y_title="seconds"))
    for engine in engines.values():
        engine.close()


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024, 4096])
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def _build(options: dict[str, Any], given: Any) -> InferenceEngine:
    length = max(given.lengths) + 64
    return InferenceEngine(
        device="cpu",
        threads=given.threads,
        max_model_len=length,
        max_num_seqs=2,
        enable_prefix_caching=False,
        **options,
    )


def _seconds_to_next_token(engine: InferenceEngine, length: int, number: int) -> float:
    inner = engine._built.port._engine
    planner = inner._scheduler._planner
    draw = random.Random(length * 1000 + number)
    request = Request(
        request_id=f"{length} {number}",
        prompt_token_ids=[draw.randrange(1000, 40000) for _ in range(length)],
        params=SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        seed=0,
        eos_token_ids=(),
    )
    inner.add(request)
    while len(request.output_token_ids) < 4:
        inner.step()
    started = time.perf_counter()
    planner.running.remove(request)
    planner._preempt(request)
    while len(request.output_token_ids) < 5:
        inner.step()
    seconds = time.perf_counter() - started
    while inner.has_unfinished:
        inner.step()
    return seconds


def _print(given: Any, engine: InferenceEngine, seconds: dict[str, list[float]]) -> None:
    transfers = engine._built.port._engine._scheduler.block_manager.tiers.costs.transfers
    print(f"{platform.processor() or platform.machine()}, {given.threads} thread(s), median of {given.repeats}")
    page_bytes = engine.info.num_host_tier_bytes // engine.info.num_host_pages
    print(f"a page of {engine.info.block_size} tokens: {page_bytes} bytes")
    for name in ("page_out", "page_in", "disk_write", "disk_read"):
        print(f"  {name:10} {getattr(transfers, name) * 1e6:8.1f} us")
    print(f"| context | {' | '.join(f'{way} ms' for way in seconds)} |")
    print("|---:" * (len(seconds) + 1) + "|")
    for index, length in enumerate(given.lengths):
        print(f"| {length:,} | {' | '.join(f'{each[index] * 1e3:.1f}' for each in seconds.values())} |")


if __name__ == "__main__":
    main()
