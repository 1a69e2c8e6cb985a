"""One after the other."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from aios_sched.routing.base import Choice

if TYPE_CHECKING:
    from aios_sched.routing.base import RoutedRequest
    from aios_sched.routing.loads import ReplicaLoads


class RoundRobin:
    """Every replica in turn, whatever they have to do: right where requests are alike, and easy to predict.

    Args:
        loads: Not looked at.
    """

    def __init__(self, loads: ReplicaLoads) -> None:
        self._turns: deque[int] = deque()

    def add(self, replica: int) -> None:
        """It comes last in the round."""
        self._turns.append(replica)

    def remove(self, replica: int) -> None:
        """It is left out."""
        self._turns.remove(replica)

    def choose(self, request: RoutedRequest) -> Choice | None:
        """The one whose turn it is."""
        if not self._turns:
            return None
        replica = self._turns[0]
        self._turns.rotate(-1)
        return Choice(replica)
