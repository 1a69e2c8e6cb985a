"""Who has the least to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aios_sched.routing.base import Choice

if TYPE_CHECKING:
    from aios_sched.routing.base import RoutedRequest
    from aios_sched.routing.loads import ReplicaLoads


class LeastLoaded:
    """The replica with the fewest outstanding tokens; of equals, the one with fewer requests, then the one that rested.

    Args:
        loads: Who has how much to do.
    """

    def __init__(self, loads: ReplicaLoads) -> None:
        self._loads = loads

    def add(self, replica: int) -> None:
        """Nothing to remember."""

    def remove(self, replica: int) -> None:
        """Nothing to forget."""

    def choose(self, request: RoutedRequest) -> Choice | None:
        """The least loaded one."""
        least = self._loads.least()
        return None if least is None else Choice(least.replica)
