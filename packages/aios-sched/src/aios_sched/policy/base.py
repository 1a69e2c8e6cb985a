"""The socket for admission policies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from aios_sched.request import Request


class WaitingQueue(Protocol):
    """Requests that hold no pages, in the order in which they are to be admitted."""

    def push(self, request: Request) -> None:
        """Takes a new request, or one that was preempted; its status says which."""
        ...

    def peek(self) -> Request | None:
        """The request to admit next; None when nobody waits. The scheduler removes it once it has its pages."""
        ...

    def remove(self, request: Request) -> None:
        """Drops a request, which waits here, wherever it stands."""
        ...

    def __len__(self) -> int: ...
