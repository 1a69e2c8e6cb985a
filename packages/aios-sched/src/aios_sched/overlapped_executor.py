"""Steps overlap: while the device computes one, Python applies the one before it and plans the one behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from aios_sched.executor import FailedStep, HasVocabulary, InProcessExecutor

if TYPE_CHECKING:
    from aios_sched.executor import StepHandle
    from aios_sched.output import SchedulerOutput


class LaunchingRunner(HasVocabulary, Protocol):
    """Gives steps to a device that computes on its own: `ModelRunner`, or a mock in tests."""

    def launch(self, output: SchedulerOutput) -> StepHandle:
        """Starts a step and returns at once; `result()` waits for it.

        Steps run in the order in which they are launched. Where a row holds `PENDING_TOKEN`, the token that the newest
        launched row of its request samples takes its place.
        """
        ...


class OverlappedExecutor(InProcessExecutor):
    """Launches each step behind the one that computes, for schedulers with `schedule_ahead`.

    Two steps are enough: one computes, one waits behind it. A third would make newcomers wait longer, and nothing
    faster.

    Args:
        runner: Launches a step.
    """

    max_steps_in_flight = 2

    def __init__(self, runner: LaunchingRunner) -> None:
        super().__init__(runner)
        self._runner = runner

    def submit(self, output: SchedulerOutput) -> StepHandle:
        """Launches the step; what that raises is kept for `result()`, where errors of every executor turn up."""
        try:
            return self._runner.launch(output)
        except Exception as error:
            return FailedStep(error)
