"""`aios-bench ranks`: where the time of a group of ranks goes, in a prefill and in a decode phase.

One trace covers two calls. The first computes all prompts and one token of each; the second finds those prompts in the
prefix cache, so that after its first step it does nothing but decode the whole batch.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from aios_parallel.launch.torchrun import TorchrunPlace
from aios_parallel.mesh import Mesh
from aios_parallel.tracing.accounts import Account, Overhead, Window, accounts, overhead, phase_windows
from aios_parallel.tracing.chrome_trace import chrome_trace
from aios_parallel.tracing.clock import now
from aios_parallel.tracing.group_tracer import CAPACITY
from aios_parallel.tracing.plot import trace_plot
from aios_serve import rank_process
from aios_serve.bench.environments import Environments, bench_cache
from aios_serve.bench.errors import BenchError
from aios_serve.bench.machine import Elsewhere, describe_machine, machine_line
from aios_serve.bench.model_files import RANDOM, find_source
from aios_serve.bench.rank_tables import overhead_line, phase_table
from aios_serve.config import EngineConfig
from aios_serve.launching import check_world, resolve_executor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.console import Console

    from aios_parallel.tracing.group_trace import GroupTrace
    from aios_serve.engine import InferenceEngine
    from aios_serve.model_info import EngineInfo
    from aios_serve.served_model import ServedModel

_WARM_UP_PROMPT, _WARM_UP_TOKENS = 64, 8
_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksWork:
    """What is traced.

    Attributes:
        batch: Sequences at once.
        prompt_tokens: Length of each prompt.
        output_tokens: Tokens that each of them gets.
    """

    batch: int
    prompt_tokens: int
    output_tokens: int

    def __post_init__(self) -> None:
        for each in fields(self):
            low = 2 if each.name == "output_tokens" else 1  # the first token belongs to the prefill
            if getattr(self, each.name) < low:
                raise BenchError(f"{each.name}={getattr(self, each.name)} cannot be traced: it must be at least {low}")

    def prompts(self, *, vocab_size: int, seed: int, prompt_tokens: int | None = None) -> list[list[int]]:
        """Random token ids; the first hundred, where control tokens are, left out."""
        draw, low = random.Random(seed), min(100, vocab_size - 1)
        length = prompt_tokens or self.prompt_tokens
        return [[draw.randrange(low, vocab_size) for _ in range(length)] for _ in range(self.batch)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One phase of the work.

    Attributes:
        name: `prefill` or `decode`.
        window: When it was.
        num_tokens: Tokens that were computed in it.
        ranks: Where the time went, rank by rank.
        overhead: What the driver takes between two steps; None where no step was awaited by the first rank.
    """

    name: str
    window: Window
    num_tokens: int
    ranks: list[Account]
    overhead: Overhead | None

    @property
    def tokens_per_second(self) -> float:
        """Of the whole group."""
        return self.num_tokens / (self.window.end - self.window.begin) * 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksResult:
    """A trace, and what it adds up to."""

    trace: GroupTrace
    phases: list[Phase] = field(default_factory=list)

    @property
    def windows(self) -> dict[str, Window]:
        """When each phase was."""
        return {phase.name: phase.window for phase in self.phases}


def run_ranks(
    options: dict[str, Any], work: RanksWork, *, trace: Path | None, plot: Path | None, console: Console
) -> int:
    """Traces the work, prints a table, writes what is asked for; returns the exit status.

    Args:
        options: Of the engine, as of EngineConfig.
        work: What to trace.
        trace: File for Chrome's JSON.
        plot: File for an SVG picture.
        console: Where to print.

    Raises:
        BenchError: The pool of pages does not hold the work.
        AiosError: The engine cannot be built, or a rank failed.
    """
    from aios_serve.served_model import ServedModel, find_model

    config = _engine_config(options, work, console)
    place = TorchrunPlace.from_environment(os.environ)
    if place is not None:
        check_world(Mesh(tensor=config.tensor_parallel, pipeline=config.pipeline_parallel), place)
        if place.rank > 0:  # of the processes that torchrun starts, the first drives
            return rank_process.main(["--rank", str(place.rank), "--torchrun", "--log-level", "warning"])
    served = ServedModel.read(config, find_model(config))
    elsewhere = Elsewhere()
    with console.status("loading") as status, _engine(config, served, status.update) as engine:
        info = engine.info
        _check_room(info, work)
        status.update("tracing")
        result = trace_ranks(engine, work, capacity=_capacity(info, work, num_layers=len(served.config.layers)))
    beside = elsewhere.cores() if resolve_executor(config) == "mp" else None  # others' children are not counted as ours
    machine = describe_machine()
    title = (
        f"{info.model_name}, {info.quantization}, tensor parallel {info.tensor_parallel} x pipeline "
        f"{info.pipeline_parallel}: {work.batch} prompts of {work.prompt_tokens} tokens, {work.output_tokens} out"
    )
    console.print(title, highlight=False, markup=False)
    for phase in result.phases:
        console.print(phase_table(phase))
        console.print(overhead_line(phase), highlight=False, markup=False)
    console.print(machine_line(machine, threads=info.threads), highlight=False, markup=False)
    if beside is not None and beside > 0.2:
        console.print(f"others kept {beside:.1f} cores busy meanwhile: the figures are not this engine's alone")
    about = {"title": title, "kernels": info.kernels, "threads": info.threads, "machine": machine}
    if trace is not None:
        _write(trace, json.dumps(chrome_trace(result.trace, phases=result.windows, about=about)) + "\n")
        console.print(f"wrote {trace}: open it at https://ui.perfetto.dev", highlight=False, markup=False)
    if plot is not None:
        _write(plot, trace_plot(result.trace, result.windows, title=title))
        console.print(f"wrote {plot}", highlight=False, markup=False)
    return 0


def trace_ranks(engine: InferenceEngine, work: RanksWork, *, capacity: int = CAPACITY) -> RanksResult:
    """Warms the engine up, runs the work under a trace, and adds it up.

    Args:
        engine: A group of ranks, with prefix caching on.
        work: What to run.
        capacity: Spans of each ring.
    """
    from aios_serve import SamplingParams

    tracer, vocab_size = engine.tracer, engine.info.vocab_size
    if tracer is None:
        raise BenchError("this engine is no group of ranks: there is nothing to trace")

    def generate(prompts: list[list[int]], tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        failed = [each for each in engine.generate(prompts, params) if each.outputs[0].finish_reason == "error"]
        if failed:
            raise BenchError(f"{len(failed)} of {len(prompts)} requests failed; the log says why")

    short = min(work.prompt_tokens, _WARM_UP_PROMPT)
    generate(work.prompts(vocab_size=vocab_size, seed=_SEED + 1, prompt_tokens=short), _WARM_UP_TOKENS)
    prompts = work.prompts(vocab_size=vocab_size, seed=_SEED)
    tracer.start(capacity=capacity)
    generate(prompts, 1)
    border = now()
    generate(prompts, work.output_tokens)
    trace = tracer.stop()
    return RanksResult(trace=trace, phases=[*_phases(trace, border)])


def _phases(trace: GroupTrace, border: int) -> list[Phase]:
    """The first call is prefill as a whole; of the second, what follows its last step with prompt tokens is decode."""
    first = [step for step in trace.steps if step.submitted < border]
    decode = phase_windows([step for step in trace.steps if step.submitted >= border])["decode"]
    return [
        _phase(trace, "prefill", Window(first[0].submitted, first[-1].returned)),
        _phase(trace, "decode", decode),
    ]


def _phase(trace: GroupTrace, name: str, window: Window) -> Phase:
    steps = [step for step in trace.steps if window.begin < step.returned <= window.end]
    return Phase(
        name=name,
        window=window,
        num_tokens=sum(step.num_tokens for step in steps),
        ranks=accounts(trace, window),
        overhead=overhead(trace, window),
    )


def _engine_config(options: dict[str, Any], work: RanksWork, console: Console) -> EngineConfig:
    """The engine's options; a model of random weights is made first."""
    model = options.get("model")
    if model is not None and model.startswith(RANDOM):
        environments = Environments(bench_cache() / "env", report=console.print)
        folder, threads = bench_cache() / "models", options.get("threads") or 1
        source = find_source(model, folder, environments=environments, threads=threads, report=console.print)
        options = {**options, "model": str(source.path)}
    return EngineConfig.from_options(**{"max_num_queued_reqs": None, "max_num_seqs": work.batch, **options})


def _engine(config: EngineConfig, served: ServedModel, report: Callable[[str], None]) -> InferenceEngine:
    """A group of ranks, of one rank too: what it does is then traced like that of others."""
    from aios_serve.build_parallel import build_parallel_engine
    from aios_serve.engine import InferenceEngine

    return InferenceEngine.from_built(config, build_parallel_engine(config, lambda stage, _: report(stage)), served)


def _check_room(info: EngineInfo, work: RanksWork) -> None:
    """A request that has to make room for others would be computed twice, and blur the phases."""
    length = work.prompt_tokens + work.output_tokens
    needed = work.batch * -(-length // info.block_size)
    if needed > info.num_blocks:
        raise BenchError(
            f"{work.batch} sequences of {length} tokens need {needed} pages, the pool has {info.num_blocks}: trace "
            "fewer or shorter ones, or give more with --kv-cache-memory-bytes"
        )


def _capacity(info: EngineInfo, work: RanksWork, *, num_layers: int) -> int:
    """Exchanges that the work takes at most: two per layer and step, and a few."""
    prefill = work.batch * (work.prompt_tokens // info.max_num_batched_tokens + 2)
    steps = prefill + (work.output_tokens + work.batch) * info.pipeline_parallel
    return steps * (2 * num_layers + 8)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
