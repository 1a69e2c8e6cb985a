"""Requests in order of importance: what several policies are made of."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from aios_sched.request import Request, RequestStatus

if TYPE_CHECKING:
    from collections.abc import Callable


class RankedQueue:
    """Admits by (rank, arrival), whether a request is new or was preempted: a `WaitingQueue` for fixed ranks.

    Nobody loses a seat to a newcomer.

    A heap from which requests that leave early are dropped late, when they come to the top or are half of it. So
    aborting from the middle of a long queue takes constant time, everything else the logarithm of its length.

    Args:
        key: What else to order by; it must not change while a request waits.
    """

    def __init__(self, key: Callable[[Request], tuple[float, int]] = Request.importance) -> None:
        self._key = key
        self._heap: list[tuple[float, int, str]] = []
        self._requests: dict[str, Request] = {}

    def push(self, request: Request) -> None:
        """Files a request under the rank it has."""
        self._requests[request.request_id] = request
        heappush(self._heap, (*self._key(request), request.request_id))

    def peek(self) -> Request | None:
        """The most important request that waits."""
        while self._heap:
            request = self._find(self._heap[0])
            if request is not None:
                return request
            heappop(self._heap)
        return None

    def admit(self, request: Request) -> None:
        """Drops a request that waits."""
        del self._requests[request.request_id]
        if len(self._heap) > 2 * len(self._requests) + 16:
            self._heap = [entry for entry in self._heap if self._find(entry) is not None]
            heapify(self._heap)

    def may_displace(self, request: Request, other: Request) -> bool:
        """Never."""
        return False

    def charge(self, request: Request, num_tokens: int) -> None:
        """Tokens change no rank here."""

    def remove(self, request: Request) -> None:
        """Drops a request if it waits."""
        if request.status is not RequestStatus.RUNNING:
            self.admit(request)

    def __len__(self) -> int:
        return len(self._requests)

    def _find(self, entry: tuple[float, int, str]) -> Request | None:
        """The request behind an entry of the heap; None if it left. (Another one may have its id by now.)"""
        request = self._requests.get(entry[2])
        return request if request is not None and self._key(request) == entry[:2] else None
