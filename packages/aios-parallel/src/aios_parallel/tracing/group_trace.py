"""A trace as data: what each rank and the driver did when, all on the driver's clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from aios_parallel.tracing.span_ring import ExchangeKind, read_label, unpack_spans

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_parallel.mesh import Mesh
    from aios_parallel.tracing.step_log import StepRecord


class StepSpan(NamedTuple):
    """A rank at work on a step: from its message being read to its result being sent, in nanoseconds."""

    begin: int
    end: int
    step_id: int
    num_tokens: int


class Exchange(NamedTuple):
    """A rank in a collective or a transfer, waiting for others included.

    Attributes:
        begin: Nanoseconds.
        end: The same.
        kind: Which call.
        peer: The rank that it names, numbered within its group; 0 where it names none.
        num_bytes: Of this rank's tensor.
        group: `tensor`, or `pipeline`.
    """

    begin: int
    end: int
    kind: ExchangeKind
    peer: int
    num_bytes: int
    group: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockOffset:
    """How a rank's clock differs from the driver's.

    Attributes:
        nanoseconds: To be added to the rank's times.
        uncertainty: By how much that may be wrong; 0 on the driver's own host.
    """

    nanoseconds: int = 0
    uncertainty: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTrace:
    """What one rank did.

    Attributes:
        rank: Its number.
        steps: In order of time, one after the other.
        exchanges: Of all groups, in order of time; each lies within a step.
        num_dropped: Steps and exchanges that did not fit into the rings: the oldest.
        complete_since: From when on nothing is missing; 0 if nothing is.
        clock: How its times became the driver's.
    """

    rank: int
    steps: tuple[StepSpan, ...]
    exchanges: tuple[Exchange, ...]
    num_dropped: int = 0
    complete_since: int = 0
    clock: ClockOffset = ClockOffset()

    @classmethod
    def of(cls, rank: int, recorded: dict[str, Any], clock: ClockOffset) -> RankTrace:
        """From what the rank's `RankTracer.stop` gave."""
        shift = clock.nanoseconds
        spans = {name: list(unpack_spans(each["spans"])) for name, each in recorded.items()}
        dropped = {name: each["num_dropped"] for name, each in recorded.items()}
        exchanges = [
            Exchange(span.begin + shift, span.end + shift, *read_label(span.label), span.amount, group)
            for group, each in spans.items()
            if group != "steps"
            for span in each
        ]
        return cls(
            rank=rank,
            steps=tuple(
                StepSpan(span.begin + shift, span.end + shift, span.label, span.amount)
                for span in spans.get("steps", ())
            ),
            exchanges=tuple(sorted(exchanges)),
            num_dropped=sum(dropped.values()),
            complete_since=max((spans[name][0].begin + shift for name, count in dropped.items() if count), default=0),
            clock=clock,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTrace:
    """What a group did.

    Attributes:
        mesh: Its shape.
        ranks: One trace for each rank, in order.
        steps: The driver's view of the steps, in their order.
        num_dropped_steps: Steps of which the driver's view was dropped.
    """

    mesh: Mesh
    ranks: tuple[RankTrace, ...]
    steps: tuple[StepRecord, ...]
    num_dropped_steps: int = 0

    @property
    def num_dropped(self) -> int:
        """Spans that are missing, of all ranks and the driver."""
        return self.num_dropped_steps + sum(rank.num_dropped for rank in self.ranks)

    @property
    def complete_since(self) -> int:
        """From when on nothing is missing on any rank; 0 if nothing is."""
        own = self.steps[0].submitted if self.num_dropped_steps and self.steps else 0
        return max([own, *(rank.complete_since for rank in self.ranks)])

    @property
    def begin(self) -> int:
        """Of the first thing that happened."""
        return min(self._times(0), default=0)

    @property
    def end(self) -> int:
        """Of the last thing that happened."""
        return max(self._times(1), default=0)

    def _times(self, which: int) -> Sequence[int]:
        own = [(record.submitted, record.returned)[which] for record in self.steps]
        return own + [step[which] for rank in self.ranks for step in rank.steps]
