"""Who runs the steps: this process, other ranks, another machine. The engine sees a `submit` and a `result` only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from aios_sched.output import SchedulerOutput, StepResult


class StepHandle(Protocol):
    """A step on its way."""

    def result(self) -> StepResult:
        """Waits for the step; raises what it raised."""
        ...


class Executor(Protocol):
    """Runs steps, in the order of their submission."""

    @property
    def max_steps_in_flight(self) -> int:
        """How many steps may be submitted before the first result is taken."""
        ...

    @property
    def vocab_size(self) -> int:
        """Width of the model's output; the token ids of a request must be below it."""
        ...

    def submit(self, output: SchedulerOutput) -> StepHandle:
        """Starts a step. A step that fails says so in `result()`; an exception here counts as its failure too.

        Raises:
            ExecutorLostError: Here or in `result()`: no step can run any more.
        """
        ...

    def check(self) -> None:
        """Raises ExecutorLostError if no step can run any more; asked now and then while there is nothing to do."""
        ...

    def shutdown(self) -> None:
        """Lets go of what runs the steps."""
        ...


class HasVocabulary(Protocol):
    """Runs steps of a model."""

    @property
    def vocab_size(self) -> int:
        """Width of the model's output."""
        ...


class StepRunner(HasVocabulary, Protocol):
    """Runs one step, here and now: `ModelRunner`, or a mock in tests."""

    def execute(self, output: SchedulerOutput) -> StepResult:
        """Computes the step's tokens, and draws the next one for each request that samples."""
        ...


class InProcessExecutor:
    """What executors have in common whose runner is in this process.

    Args:
        runner: Runs steps, somehow.
    """

    def __init__(self, runner: HasVocabulary) -> None:
        self._owned = runner

    @property
    def vocab_size(self) -> int:
        """The runner's."""
        return self._owned.vocab_size

    def check(self) -> None:
        """Steps run from this process: as long as somebody asks, they can."""

    def shutdown(self) -> None:
        """Closes the runner, if it has anything to close."""
        close = getattr(self._owned, "close", None)
        if close is not None:
            close()


class LocalExecutor(InProcessExecutor):
    """Runs each step in this process, before `submit` returns.

    Args:
        runner: Runs a step.
    """

    max_steps_in_flight = 1

    def __init__(self, runner: StepRunner) -> None:
        super().__init__(runner)
        self._runner = runner

    def submit(self, output: SchedulerOutput) -> StepHandle:
        """Runs the step; what it raises is kept for `result()`, where errors of every executor turn up."""
        try:
            return FinishedStep(self._runner.execute(output))
        except Exception as error:
            return FailedStep(error)


class FinishedStep:
    """A step whose result is there."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        """What came of it."""
        return self._result


class FailedStep:
    """A step that raised: `result` raises it again."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def result(self) -> StepResult:
        """Raises."""
        raise self._error
