"""What the driver notes of every step while it traces: when it went out, and when its tokens came back."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aios_parallel.tracing.clock import now

if TYPE_CHECKING:
    from aios_sched.output import SchedulerOutput


@dataclass(slots=True, kw_only=True)
class StepRecord:
    """One step as the driver sees it; times in nanoseconds on its clock, 0 for what has not happened.

    Attributes:
        step_id: Its number.
        num_tokens: Tokens that it computes.
        num_requests: Requests that they belong to.
        submitted: When the executor was given it.
        sent: When its message had been handed to all ranks.
        returned: When the driver took its tokens.
    """

    step_id: int
    num_tokens: int
    num_requests: int
    submitted: int
    sent: int = 0
    returned: int = 0

    @property
    def only_decodes(self) -> bool:
        """Whether every request has one token in it."""
        return self.num_tokens == self.num_requests


class StepLog:
    """Keeps the last `capacity` steps."""

    def __init__(self, capacity: int) -> None:
        self._records: deque[StepRecord] = deque(maxlen=capacity)
        self._num_opened = 0

    @property
    def num_dropped(self) -> int:
        """Steps that later ones have replaced."""
        return self._num_opened - len(self._records)

    def open(self, output: SchedulerOutput) -> StepRecord:
        """Notes that a step is submitted now; the caller fills in what follows."""
        record = StepRecord(
            step_id=output.step_id,
            num_tokens=output.num_scheduled_tokens,
            num_requests=len(output.requests),
            submitted=now(),
        )
        self._records.append(record)
        self._num_opened += 1
        return record

    def finished(self) -> tuple[StepRecord, ...]:
        """The steps whose tokens came, in their order."""
        return tuple(record for record in self._records if record.returned)
