"""Who has run out of time?"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aios_sched.request import Request


class Deadlines:
    """Requests by deadline. Asking costs one comparison as long as nothing is due."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str]] = []

    def add(self, request: Request) -> None:
        """Watches a request, if it has a deadline. One that ends earlier is forgotten when its deadline comes."""
        if request.deadline is not None:
            heappush(self._heap, (request.deadline, request.arrival_order, request.request_id))

    def take_due(self, now: float) -> list[tuple[str, int]]:
        """Ids and arrival orders of those whose deadline is not after `now`; each is returned once."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            _, arrival_order, request_id = heappop(self._heap)
            due.append((request_id, arrival_order))
        return due
