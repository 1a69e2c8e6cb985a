"""`aios-bench roofline`: what a decoded token costs in bytes and operations, and how near the engine is to the limit.

A step reads every weight once, for however many sequences it decodes, and each sequence's keys and values; it does two
operations per weight and sequence. With few sequences the reading takes longer, with many the arithmetic.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from aios_model.config_file import read_model_config
from aios_model.inspect import active_parameters, flops_per_token
from aios_model.weights.hub import resolve_model
from aios_serve.bench.engines import AIOS, ENGINES, Variant
from aios_serve.bench.environments import Environments, bench_cache
from aios_serve.bench.errors import BenchError
from aios_serve.bench.limits import Limits, measure_limits
from aios_serve.bench.machine import describe_machine
from aios_serve.bench.model_files import ModelFiles, find_source
from aios_serve.bench.samples import ProcessMeasure, Task
from aios_serve.bench.work import parse_works

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from aios_model.config import ModelConfig
    from aios_serve.bench.work import Work

TIMEOUT = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measurement beside its limits. Bytes and operations are those of one step, over its tokens.

    Attributes:
        quantization: As asked for.
        work: Its name.
        facts: What the engine says it is.
        tokens_per_second: Of all sequences together.
        bytes_per_token: Read for one token.
        operations_per_token: Done for one token.
        read_share: Of the read bandwidth of a large buffer; above 1 where caches hold the model.
        arithmetic_share: Of the arithmetic peak of the numbers that it multiplies; None where that is not known.
        limit: Tokens per second if reading and arithmetic overlapped fully at their limits.
    """

    quantization: str
    work: str
    facts: dict[str, Any]
    tokens_per_second: float
    bytes_per_token: float
    operations_per_token: float
    read_share: float
    arithmetic_share: float | None
    limit: float


def run_roofline(
    *,
    model: str | None,
    quantizations: Sequence[str],
    works: Sequence[Work],
    engine_options: dict[str, Any],
    threads: int,
    seconds: float,
    output: Path | None,
    console: Console,
) -> int:
    """Measure the machine, then the engine; print a table and write JSON. Returns the exit status.

    Raises:
        BenchError: the model is no GGUF file, or nothing could be measured.
    """
    environments, folder = Environments(bench_cache() / "env", report=console.print), bench_cache() / "models"
    source = find_source(model, folder, environments=environments, threads=threads, report=console.print)
    files = ModelFiles(source, folder, environments=environments, threads=threads, report=console.print)
    measure = ProcessMeasure(
        source=source, files=files, environments=environments, threads=threads, seconds=seconds, timeout=TIMEOUT
    )
    config = read_model_config(resolve_model(str(source.path), tokenizer_only=True))
    with console.status("measuring this machine"):
        limits = measure_limits(threads)
    console.print(limits_line(limits), highlight=False)
    points = []
    for task in _tasks(quantizations, works, engine_options):
        with console.status(str(task)):
            sample = measure(task, 1)
        if sample.error:
            console.print(f"{task}: {sample.error}", style="red", highlight=False, markup=False)
            continue
        points.append(place(sample.result, task, config, limits))
    if not points:
        raise BenchError("nothing could be measured")
    console.print(table(points))
    if output is not None:
        report = {"machine": describe_machine(), "model": source.name, "limits": asdict(limits)}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**report, "points": [asdict(point) for point in points]}, indent=1) + "\n")
    return 0


def place(result: dict[str, Any], task: Task, config: ModelConfig, limits: Limits) -> Point:
    """Puts what a runner measured beside the limits.

    Args:
        result: Of the runner of AIOS.
        task: What was measured.
        config: The model's.
        limits: The machine's.
    """
    work, facts = task.work, result["facts"]
    context = work.prompt_tokens + work.new_tokens // 2
    kv_bytes = facts["num_kv_bytes"] / (facts["num_blocks"] * facts["block_size"])
    bytes_per_token = _step_weight_bytes(facts, config) / work.num_sequences + kv_bytes * context
    operations = flops_per_token(config, context=context)
    peak = limits.float_operations if _multiplies_floats(facts["quantization"]) else limits.byte_operations
    rate = work.figure(result)
    reading = bytes_per_token / limits.large_read
    computing = operations / peak if peak else 0.0
    return Point(
        quantization=task.variant.name,
        work=work.name,
        facts=facts,
        tokens_per_second=rate,
        bytes_per_token=bytes_per_token,
        operations_per_token=operations,
        read_share=rate * reading,
        arithmetic_share=rate * computing if peak else None,
        limit=1 / max(reading, computing),
    )


def limits_line(limits: Limits) -> str:
    """The limits in one line."""
    byte_peak = "" if limits.byte_operations is None else f", {limits.byte_operations / 1e9:.0f} GOP/s in 8 bits"
    return (
        f"{limits.threads} threads: reads {limits.large_read / 1e9:.1f} GB/s from 256 MiB, "
        f"{limits.cached_read / 1e9:.1f} GB/s from 64 MiB; {limits.float_operations / 1e9:.0f} GFLOP/s in float32"
        f"{byte_peak} ({limits.source})"
    )


def table(points: Sequence[Point]) -> Table:
    """All points."""
    from rich.table import Table

    columns = (
        "weights",
        "work",
        "tok/s",
        "MB/token",
        "MOP/token",
        "reading, of limit",
        "arithmetic, of limit",
        "limit",
    )
    shown = Table(title="Share of the machine's limit", title_justify="left")
    for column in columns:
        shown.add_column(column, justify="left" if column in ("weights", "work") else "right")
    for row in map(_row, points):
        shown.add_row(*row)
    return shown


def _row(point: Point) -> Iterator[str]:
    yield from (point.quantization, point.work, f"{point.tokens_per_second:.1f}")
    yield from (f"{point.bytes_per_token / 1e6:.1f}", f"{point.operations_per_token / 1e6:.0f}")
    yield f"{point.read_share:.0%}"
    yield "–" if point.arithmetic_share is None else f"{point.arithmetic_share:.0%}"
    yield f"{point.limit:.0f} tok/s"


def _step_weight_bytes(facts: dict[str, Any], config: ModelConfig) -> float:
    """Bytes of weights that a step reads: all but the rows of an embedding that is not the head, too."""
    if "num_step_weight_bytes" in facts:
        return facts["num_step_weight_bytes"]
    total = active_parameters(config) + (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
    return facts["num_weight_bytes"] * active_parameters(config) / total


def _multiplies_floats(quantization: str) -> bool:
    return quantization in ("none", "fp8") or quantization.endswith("-a16")


def _tasks(quantizations: Sequence[str], works: Sequence[Work], engine_options: dict[str, Any]) -> Iterator[Task]:
    for quantization in quantizations:
        options = {**engine_options, "quantization": quantization}
        variant = Variant(name=quantization, model="source", options=options)
        for work in works:
            yield Task(engine=ENGINES[AIOS], precision="", variant=variant, work=work)


def parse_roofline_works(names: str) -> list[Work]:
    """Work of the kind "decode" only.

    Raises:
        BenchError: another kind.
    """
    works = parse_works(names)
    for work in works:
        if work.kind != "decode":
            raise BenchError(f"--work={work.name} has no roofline here; name works such as decode-1 or decode-16@512")
    return works
