"""Those first whose prompts are in the cache already."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import TYPE_CHECKING

from aios_sched.policy.base import refuse_priority
from aios_sched.request import RequestStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from aios_sched.request import Request


class PrefixQueue:
    """Of the first requests in line, admits the one with the most prompt tokens in the prefix cache.

    Requests that share a prompt then run one after the other while its pages are there, rather than each after others
    have evicted them: the longest-prefix-first order of SGLang (arXiv 2312.07104). Among equals, and when pages run
    out, the order of arrival counts; a preempted request goes first.

    Cheap: it looks once per admission, not per step, at no more than `look_ahead` requests, each up to the first page
    that is not cached. What it chose stays chosen until it is admitted or gone.

    Nobody starves: after `max_overtakes` others were admitted before the first in line, that one is next. A request
    with n others before it is admitted after at most (n + 1) * (max_overtakes + 1) admissions.

    Args:
        count_cached_tokens: How many leading tokens of a request the cache holds.
        look_ahead: Requests in line that are compared, 1 or more.
        max_overtakes: Others that may be admitted before the first in line.
    """

    def __init__(
        self, count_cached_tokens: Callable[[Request], int], *, look_ahead: int = 32, max_overtakes: int = 64
    ) -> None:
        self._count_cached_tokens = count_cached_tokens
        self._look_ahead = look_ahead
        self._max_overtakes = max_overtakes
        self._requests: OrderedDict[str, Request] = OrderedDict()
        self._chosen: Request | None = None
        self._num_overtakes = 0

    def push(self, request: Request) -> None:
        """Appends a new request, puts a preempted one first; one with a priority is refused."""
        refuse_priority(request)
        self._requests[request.request_id] = request
        if request.status is RequestStatus.PREEMPTED:
            self._requests.move_to_end(request.request_id, last=False)
            self._chosen = None

    def peek(self) -> Request | None:
        """The chosen one; a preempted request, if there is any."""
        if self._chosen is None and self._requests:
            self._chosen = self._choose()
        return self._chosen

    def admit(self, request: Request) -> None:
        """Drops the request that waits, and counts how often the first in line was passed over."""
        is_first = request is self._first()
        self._num_overtakes = 0 if is_first else self._num_overtakes + 1
        self._drop(request)

    def may_displace(self, request: Request, other: Request) -> bool:
        """Never."""
        return False

    def charge(self, request: Request, num_tokens: int) -> None:
        """Tokens change no order here."""

    def remove(self, request: Request) -> None:
        """Drops a request if it waits."""
        if request.status is not RequestStatus.RUNNING:
            self._drop(request)

    def __len__(self) -> int:
        return len(self._requests)

    def _first(self) -> Request:
        return next(iter(self._requests.values()))

    def _choose(self) -> Request:
        first = self._first()
        if first.status is RequestStatus.PREEMPTED or self._num_overtakes >= self._max_overtakes:
            return first
        return max(islice(self._requests.values(), self._look_ahead), key=self._count_cached_tokens)

    def _drop(self, request: Request) -> None:
        del self._requests[request.request_id]
        if request is self._chosen:
            self._chosen = None
