"""One measurement: an engine's setting on one piece of work, in a process of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from aios_serve.bench.commands import run_module
from aios_serve.bench.errors import BenchError
from aios_serve.bench.machine import Elsewhere

if TYPE_CHECKING:
    from aios_serve.bench.engines import Engine, Variant
    from aios_serve.bench.environments import Environments
    from aios_serve.bench.model_files import ModelFiles, SourceModel
    from aios_serve.bench.work import Work

PROMPT_SEED, WARM_UP_SEED = 7, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be measured, again in every round."""

    engine: Engine
    precision: str
    variant: Variant
    work: Work

    def __str__(self) -> str:
        return f"{self.engine.name} {self.variant.name}, {self.work.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What came of a task in one round.

    Attributes:
        round_number: From 1.
        engine: Its name.
        precision: Such as "4bit".
        variant: Name of the setting.
        work: Its name.
        figure: In the unit of the work; None if it failed.
        result: What the runner printed, for the record.
        error: Why it failed.
        busy_elsewhere: Cores that other programs kept busy meanwhile; None where that is not known.
    """

    round_number: int
    engine: str
    precision: str
    variant: str
    work: str
    figure: float | None
    result: dict[str, Any]
    error: str | None = None
    busy_elsewhere: float | None = None


class Measure(Protocol):
    """Measures a task, in whatever way."""

    def __call__(self, task: Task, round_number: int) -> Sample:
        """A sample, also of a task that failed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMeasure:
    """Measures each task in a fresh process of the engine's own Python.

    Attributes:
        source: The model, for the prompts.
        files: Its forms.
        environments: Where the engines are.
        threads: Threads of each engine.
        seconds: Short work is repeated within the process until it has taken this long; the median pass counts.
        timeout: Seconds after which a process is ended.
    """

    source: SourceModel
    files: ModelFiles
    environments: Environments
    threads: int
    seconds: float
    timeout: float

    def __call__(self, task: Task, round_number: int) -> Sample:
        """Run it; a failure is a sample, too: the others go on."""
        elsewhere = Elsewhere()
        result, figure, failure = {}, None, None
        try:
            result = self._run(task)
            figure = task.work.figure(result)
        except BenchError as error:
            failure = str(error)
        return Sample(
            round_number=round_number,
            engine=task.engine.name,
            precision=task.precision,
            variant=task.variant.name,
            work=task.work.name,
            figure=figure,
            result=result,
            error=failure,
            busy_elsewhere=elsewhere.cores(),
        )

    def _run(self, task: Task) -> dict[str, Any]:
        printed = run_module(
            self.environments.python(task.engine),
            task.engine.runner,
            what=str(task),
            timeout=self.timeout,
            threads=self.threads,
            stdin=json.dumps(self._job(task)),
        )
        return check_result(printed, task.work)

    def _job(self, task: Task) -> dict[str, Any]:
        work, vocab_size = task.work, self.source.vocab_size
        return {
            "model": str(self.files.path(task.variant.model)),
            "prompts": work.prompts(seed=PROMPT_SEED, vocab_size=vocab_size),
            "warm_up": work.prompts(seed=WARM_UP_SEED, vocab_size=vocab_size),
            "new_tokens": work.new_tokens,
            "max_context": work.prompt_tokens + work.new_tokens,
            "threads": self.threads,
            "seconds": self.seconds if work.more_is_better else 0,
            "options": dict(task.variant.options),
        }


def check_result(printed: str, work: Work) -> dict[str, Any]:
    """The result that a runner printed: an engine that stopped early would look fast.

    Raises:
        BenchError: there is none, or a sequence has not got exactly the tokens it was asked for.
    """
    try:
        result = json.loads(printed.strip().splitlines()[-1])
        produced = result["produced"]
    except (IndexError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"the runner printed no result, but {printed[-200:]!r}") from error
    if produced != [work.new_tokens] * work.num_sequences:
        raise BenchError(
            f"{work.name} wants {work.new_tokens} tokens of each of {work.num_sequences} sequences, but {produced} came"
        )
    return result
