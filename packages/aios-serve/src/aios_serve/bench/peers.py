"""`aios-bench peers` from its options to its files: prepare, measure in rounds, write what was found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aios_serve.bench.environments import Environments, bench_cache
from aios_serve.bench.errors import BenchError
from aios_serve.bench.model_files import ModelFiles, find_source
from aios_serve.bench.record import BUSY_CORES, Record
from aios_serve.bench.rounds import plan_tasks, run_rounds
from aios_serve.bench.samples import ProcessMeasure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from aios_serve.bench.engines import Engine
    from aios_serve.bench.model_files import SourceModel
    from aios_serve.bench.samples import Measure, Sample, Task
    from aios_serve.bench.work import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class PeersConfig:
    """What to compare.

    Attributes:
        model: As of `find_source`.
        engines: Who takes part.
        precisions: At which precisions.
        works: On what.
        threads: Threads of every engine.
        repeats: Rounds.
        seconds: Short work is repeated within its process until it has taken this long.
        timeout: Seconds after which a process is given up.
        output: Folder for peers.json, peers.md and peers.svg.
    """

    model: str | None
    engines: Sequence[Engine]
    precisions: Sequence[str]
    works: Sequence[Work]
    threads: int
    repeats: int
    seconds: float
    timeout: float
    output: Path


def run_peers(config: PeersConfig, console: Console) -> int:
    """Compare; returns the exit status, 1 if nothing could be measured. Ctrl-C keeps what there is.

    Raises:
        BenchError: the model, an environment or a converted model cannot be had.
    """

    def report(message: str) -> None:
        console.print(message, highlight=False)

    environments, folder = Environments(bench_cache() / "env", report=report), bench_cache() / "models"
    source = find_source(config.model, folder, environments=environments, threads=config.threads, report=report)
    works = _fitting(config.works, source, console)
    tasks = plan_tasks(config.engines, config.precisions, works)
    if not tasks:
        raise BenchError("none of these engines has a setting for this precision and work; see aios-bench peers --help")
    files = ModelFiles(source, folder, environments=environments, threads=config.threads, report=report)
    tasks = _prepare(tasks, environments, files, console)
    if not tasks:
        raise BenchError("nothing is left to measure")
    measure = ProcessMeasure(
        source=source,
        files=files,
        environments=environments,
        threads=config.threads,
        seconds=config.seconds,
        timeout=config.timeout,
    )
    record = Record(config=config, source=source, environments=environments, works=works)
    try:
        for sample in run_rounds(tasks, ShownMeasure(measure, console), repeats=config.repeats):
            record.add(sample)
    except KeyboardInterrupt:
        console.print("interrupted; what was measured so far:")
    return record.show(console)


def _fitting(works: Sequence[Work], source: SourceModel, console: Console) -> list[Work]:
    """Work within the model's context; what is left out is said."""
    fitting = [work for work in works if work.prompt_tokens + work.new_tokens <= source.context_length]
    for work in works:
        if work not in fitting:
            console.print(f"{work.name} is left out: {source.name} takes {source.context_length} tokens")
    return fitting


def _prepare(tasks: Sequence[Task], environments: Environments, files: ModelFiles, console: Console) -> list[Task]:
    """Install and convert everything first, so that nothing of it runs beside a measurement.

    Returns the tasks that can be measured; what cannot be prepared is said, and left out.
    """
    outcomes: dict[tuple[str, str], str | None] = {}
    for task in tasks:
        key = (task.engine.name, task.variant.model)
        if key not in outcomes:
            outcomes[key] = _failure(task, environments, files)
            if outcomes[key]:
                console.print(f"{task.engine.name} {task.variant.name} is left out: {outcomes[key]}", style="red")
    return [task for task in tasks if outcomes[task.engine.name, task.variant.model] is None]


def _failure(task: Task, environments: Environments, files: ModelFiles) -> str | None:
    try:
        environments.python(task.engine)
        files.path(task.variant.model)
    except BenchError as error:
        return str(error)
    return None


class ShownMeasure:
    """Says what is being measured and what came of it.

    Args:
        measure: Does the work.
        console: Where to.
    """

    def __init__(self, measure: Measure, console: Console) -> None:
        self._measure = measure
        self._console = console

    def __call__(self, task: Task, round_number: int) -> Sample:
        """As `measure`, with a spinner on a terminal and a line when done."""
        with self._console.status(f"round {round_number}: {task}"):
            sample = self._measure(task, round_number)
        outcome = "failed" if sample.figure is None else f"{sample.figure:.1f} {task.work.unit}"
        if (sample.busy_elsewhere or 0.0) > BUSY_CORES:
            outcome += f" ({sample.busy_elsewhere:.1f} cores busy elsewhere)"
        self._console.print(f"round {round_number}: {task}: {outcome}", highlight=False)
        return sample
