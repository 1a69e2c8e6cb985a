"""Which replicas run, and how they are: each tells the ingress twice a second.

The ingress does not ask them, because a replica that is full answers no call at all before it has room: its health
would turn red exactly when it is busiest.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

REPORT_SECONDS = 0.5
FRESH_SECONDS = 4.0
"""A replica that is silent for so long counts as gone: `/ready` has to say so within five seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReport:
    """How one replica is.

    Attributes:
        rank: 0 for the first one; a replica that takes the place of another takes its rank.
        state: State of its engine: "ready", "draining", …
        healthy: Whether the engine moves.
        num_open_requests: Requests that are being generated or wait for it.
        metrics: Its metrics, in Prometheus' text format.
    """

    rank: int
    state: str
    healthy: bool
    num_open_requests: int
    metrics: str


class RollCall:
    """The latest report of each replica."""

    def __init__(self) -> None:
        self._heard: dict[int, tuple[float, ReplicaReport]] = {}

    def hear(self, report: ReplicaReport) -> None:
        """Take in a report; it replaces the last one of that rank."""
        self._heard[report.rank] = (time.monotonic(), report)

    def reports(self) -> list[ReplicaReport]:
        """How the running replicas are, by rank; empty if none is running."""
        oldest = time.monotonic() - FRESH_SECONDS
        self._heard = {rank: heard for rank, heard in self._heard.items() if heard[0] >= oldest}
        return [self._heard[rank][1] for rank in sorted(self._heard)]
