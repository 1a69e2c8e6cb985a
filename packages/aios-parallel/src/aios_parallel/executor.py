"""The Executor of a rank group: steps go to all ranks, tokens come back from one.

With a pipeline several steps are on their way, one per stage, so that all stages are busy. They return in their order.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from aios_kvcache.swap import reads_disk
from aios_model.errors import AiosError
from aios_model.sampling.errors import SamplingError
from aios_parallel.control.messages import StepDone, StepFailed
from aios_parallel.control.step_codec import StepEncoder, decode_results
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
        num_parts = self._mesh.size if reads_disk(output.swaps) else 1
        step = _PendingStep(self, output.step_id, record, num_parts=num_parts)
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
                self._take_part(event)
            elif isinstance(event, StepFailed):
                self._fail(rank, event)

    def _take_part(self, part: StepDone) -> None:
        """A rank is done with a step; where all have to say what they read from disk, the last one completes it."""
        step = self._find(part.step_id)
        if step is None:
            if part.sampled:
                self._lose_order(part.step_id)
            return  # of a step that failed elsewhere
        if any(not earlier.is_complete and earlier.num_parts == 1 for earlier in self._before(step)):
            self._lose_order(part.step_id)
        step.parts.append(part)
        self._settle()

    def _fail(self, rank: int, failed: StepFailed) -> None:
        step = self._find(failed.step_id)
        if step is None or any(not earlier.is_complete and earlier.num_parts == 1 for earlier in self._before(step)):
            self._lose_order(failed.step_id)
            return
        step.failure = self._judge(rank, failed)
        self._settle()

    def _find(self, step_id: int) -> _PendingStep | None:
        return next((step for step in self._pending if step.step_id == step_id), None)

    def _before(self, step: _PendingStep) -> list[_PendingStep]:
        return [earlier for earlier in self._pending if earlier.step_id < step.step_id]

    def _settle(self) -> None:
        """Gives the oldest steps their outcomes, as far as they are complete."""
        while self._pending and self._pending[0].is_complete:
            step = self._pending.popleft()
            step.outcome = step.failure or decode_results(step.parts)
            if step.record is not None:
                step.record.returned = now()

    def _lose_order(self, step_id: int) -> None:
        self._group.lose(f"the ranks answered step {step_id}, before an earlier one or without being asked")
        self._group.check()

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
                elif isinstance(event, StepDone) and event.step_id != failed.step_id and not event.sampled:
                    self._take_part(event)  # what a rank has to say about the disk in another step
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

    def __init__(self, executor: GroupExecutor, step_id: int, record: StepRecord | None, *, num_parts: int) -> None:
        self._executor = executor
        self.step_id = step_id
        self.record = record
        self.num_parts = num_parts  # ranks that will say they are done
        self.parts: list[StepDone] = []
        self.failure: Exception | None = None
        self.outcome: StepResult | Exception | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all has been said about it."""
        return self.failure is not None or len(self.parts) == self.num_parts

    def result(self) -> StepResult:
        """Waits for the tokens; raises what the ranks raised."""
        self._executor.finish(self)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome
