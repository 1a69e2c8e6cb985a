"""The Executor of a rank group: steps go to all ranks, tokens come back from one.

With a pipeline several steps are on their way, one per stage, so that all stages are busy. They return in their order.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from aios_model.errors import AiosError
from aios_model.sampling.errors import SamplingError
from aios_parallel.control.messages import StepDone, StepFailed
from aios_parallel.control.step_codec import StepEncoder, decode_result
from aios_parallel.errors import RankFailedError
from aios_parallel.tracing.clock import now

if TYPE_CHECKING:
    from aios_parallel.control.driver import RankGroup
    from aios_parallel.mesh import Mesh
    from aios_parallel.tracing.step_log import StepLog, StepRecord
    from aios_sched.output import SchedulerOutput, StepResult

_AGREE_SECONDS = 2.0


class StepError(AiosError):
    """All ranks failed at one step, alike: the step is lost, the group is not."""


class GroupExecutor:
    """Runs steps on a group of ranks; see Executor.

    Args:
        group: The ranks, set up.
        mesh: Their shape.
        vocab_size: Width of the model's output.
    """

    def __init__(self, group: RankGroup, *, mesh: Mesh, vocab_size: int) -> None:
        self._group = group
        self._mesh = mesh
        self._encoder = StepEncoder()
        self._pending: deque[_PendingStep] = deque()
        self._log: StepLog | None = None
        self.max_steps_in_flight = mesh.pipeline
        self.vocab_size = vocab_size

    def submit(self, output: SchedulerOutput) -> _PendingStep:
        """See Executor. RankFailedError if the group is lost."""
        record = None if self._log is None else self._log.open(output)
        self._group.send(self._encoder.encode(output))
        if record is not None:
            record.sent = now()
        step = _PendingStep(self, output.step_id, record)
        self._pending.append(step)
        return step

    def trace(self, log: StepLog | None) -> None:
        """Notes in `log` from now on when steps are submitted and when they return; None for nowhere."""
        self._log = log

    def drain(self) -> None:
        """Waits until no step is on its way; their outcomes stay for whoever asks."""
        if self._pending:
            self.finish(self._pending[-1])

    def check(self) -> None:
        """See Executor."""
        self._group.check()

    def shutdown(self) -> None:
        """See Executor."""
        self._group.close()

    def finish(self, wanted: _PendingStep) -> None:
        """Waits until `wanted` has an outcome, and gives those before it theirs."""
        while wanted.outcome is None:
            rank, event = self._group.next_event()
            if isinstance(event, StepDone):
                self._settle(event.step_id, decode_result(event))
            elif isinstance(event, StepFailed):
                self._settle(event.step_id, self._judge(rank, event))

    def _settle(self, step_id: int, outcome: StepResult | Exception) -> None:
        step = self._pending.popleft()
        if step.step_id != step_id:
            self._group.lose(f"the ranks answered step {step_id} before step {step.step_id}")
            self._group.check()
        step.outcome = outcome
        if step.record is not None:
            step.record.returned = now()

    def _judge(self, rank: int, failed: StepFailed) -> Exception:
        """What a failure on one rank means: the step's error, if the ranks are still in step with each other.

        Raises:
            RankFailedError: They are not: some have joined exchanges that others never will.
        """
        if failed.request_ids is not None:
            return SamplingError(failed.message, request_ids=failed.request_ids)
        reports = {rank: failed.num_exchanges}
        try:
            while len(reports) < self._mesh.size:
                other, event = self._group.next_event(_AGREE_SECONDS)
                if isinstance(event, StepFailed) and event.step_id == failed.step_id:
                    reports[other] = event.num_exchanges
                else:
                    break
        except TimeoutError:
            pass
        if len(reports) == self._mesh.size and len(set(reports.values())) == 1:
            return StepError(failed.message)
        self._group.lose(f"rank {rank} failed in a step that others went on with: {failed.message}")
        raise RankFailedError(failed.message)


class _PendingStep:
    """A step on its way; see StepHandle."""

    def __init__(self, executor: GroupExecutor, step_id: int, record: StepRecord | None) -> None:
        self._executor = executor
        self.step_id = step_id
        self.record = record
        self.outcome: StepResult | Exception | None = None

    def result(self) -> StepResult:
        """Waits for the tokens; raises what the ranks raised."""
        self._executor.finish(self)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome
