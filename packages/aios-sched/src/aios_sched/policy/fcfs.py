"""First come, first served."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from aios_sched.request import RequestStatus

if TYPE_CHECKING:
    from aios_sched.request import Request


class FCFSQueue:
    """Admits in order of arrival; a preempted request, which had its turn already, goes to the front.

    Every operation takes constant time, aborting from the middle of a long queue included. (A plain dict would not do:
    finding its first key walks over all the deleted ones before it.)
    """

    def __init__(self) -> None:
        self._requests: OrderedDict[str, Request] = OrderedDict()

    def push(self, request: Request) -> None:
        """Appends a new request, puts a preempted one first."""
        self._requests[request.request_id] = request
        if request.status is RequestStatus.PREEMPTED:
            self._requests.move_to_end(request.request_id, last=False)

    def peek(self) -> Request | None:
        """The one at the front."""
        return next(iter(self._requests.values()), None)

    def remove(self, request: Request) -> None:
        """Drops a request that waits."""
        del self._requests[request.request_id]

    def __len__(self) -> int:
        return len(self._requests)
