"""First come, first served."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aios_sched.policy.base import refuse_priority
from aios_sched.policy.ranked import RankedQueue

if TYPE_CHECKING:
    from aios_sched.request import Request


class FCFSQueue(RankedQueue):
    """Admits in order of arrival; when pages run out, the newest gives way.

    A preempted request goes back to its place in that order: before everybody who has not had a turn yet. Nobody is
    overtaken, so nobody starves; but one tenant with many requests makes all others wait (see `fair.py`).
    """

    def push(self, request: Request) -> None:
        """Takes a request; one with a priority is refused."""
        refuse_priority(request)
        request.rank = 0.0
        super().push(request)
