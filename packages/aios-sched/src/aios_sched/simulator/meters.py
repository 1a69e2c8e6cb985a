"""What is counted while steps go by, in whole numbers, so that it does not matter in which order."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from operator import mul
from typing import TYPE_CHECKING

from aios_sched.simulator.histogram import Histogram

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_sched.simulator.cost import StepShape
    from aios_sched.simulator.leaping_scheduler import Leap, Stretch


@dataclass(slots=True, kw_only=True)
class Meters:
    """Sums over the steps of one engine. Times are femtoseconds; what has "time" after a noun is multiplied by it.

    Attributes:
        num_steps: Steps.
        busy_time: Time in steps.
        num_tokens: Tokens computed.
        num_prefill_tokens: Of those, the ones that are not a request's single next token.
        sequence_time: Requests in a step.
        context_time: Tokens in the block tables that are filled.
        table_time: Pages in the block tables; shared ones count repeatedly.
        used_time: Pages of the pool in use; shared ones count once.
        gaps: Times between two tokens of one request.
    """

    num_steps: int = 0
    busy_time: int = 0
    num_tokens: int = 0
    num_prefill_tokens: int = 0
    sequence_time: int = 0
    context_time: int = 0
    table_time: int = 0
    used_time: int = 0
    gaps: Histogram = field(default_factory=Histogram)

    def add_step(self, shape: StepShape, duration: int, *, num_decodes: int, num_pages: int, num_used: int) -> None:
        """One step."""
        self.num_steps += 1
        self.busy_time += duration
        self.num_tokens += shape.num_tokens
        self.num_prefill_tokens += shape.num_tokens - num_decodes
        self.sequence_time += shape.num_sequences * duration
        self.context_time += shape.num_context * duration
        self.table_time += num_pages * duration
        self.used_time += num_used * duration

    def add_stretch(self, stretch: Stretch, durations: Sequence[int], leap: Leap) -> None:
        """Several steps of decoding."""
        time, sequences, count = sum(durations), stretch.num_sequences, stretch.num_steps
        self.num_steps += count
        self.busy_time += time
        self.num_tokens += sequences * count
        self.sequence_time += sequences * time
        self.context_time += stretch.num_context * time + sequences * sum(map(mul, range(count), durations))
        self.table_time += sum(map(mul, leap.num_pages, durations))
        self.used_time += sum(map(mul, leap.num_used, durations))

    def merge(self, other: Meters) -> None:
        """Adds what another engine did."""
        self.gaps.merge(other.gaps)
        for each in fields(self):
            if each.name != "gaps":
                setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
