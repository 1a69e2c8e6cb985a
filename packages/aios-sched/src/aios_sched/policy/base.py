"""The socket for scheduling policies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from aios_model.errors import InvalidRequestError

if TYPE_CHECKING:
    from aios_sched.request import Request


class WaitingQueue(Protocol):
    """A scheduling policy: requests that hold no pages, in the order in which they are to be admitted.

    It also says who gives way when pages run out, through `Request.rank`: whoever has the smaller (rank, arrival) may
    take pages from the other. A policy may set the rank of a request while it waits, up to and including `admit`, and
    never while it holds pages: pages then flow one way only, which is why everybody finishes (see `planner.py`).

    A request's way: `push`, `admit`, any number of `charge`, then `remove`; or `push` again if it was preempted.
    """

    def push(self, request: Request) -> None:
        """Takes a new request, or one that was preempted; its status says which.

        Raises:
            InvalidRequestError: it is new and asks for what this policy does not know, a priority or a tenant.
        """
        ...

    def peek(self) -> Request | None:
        """The request to admit next, with its rank; None when nobody waits."""
        ...

    def admit(self, request: Request) -> None:
        """The request, which waits here, has its pages and leaves the queue; `num_computed_tokens` were cached."""
        ...

    def may_displace(self, request: Request, other: Request) -> bool:
        """With all seats taken: whether the request that `peek` returned may have that of `other`, which runs."""
        ...

    def charge(self, request: Request, num_tokens: int) -> None:
        """So many output tokens were generated for a request that was admitted."""
        ...

    def remove(self, request: Request) -> None:
        """The request ends, wherever it stands; its status says whether it waits here or runs."""
        ...

    def __len__(self) -> int:
        """Requests that wait."""
        ...


def refuse_priority(request: Request) -> None:
    """For policies without priorities: a field without effect is an error, as in vLLM.

    Raises:
        InvalidRequestError: the request has a priority other than 0.
    """
    if request.priority:
        raise InvalidRequestError(
            f"priority={request.priority} would have no effect under this scheduling policy; leave it out, or start "
            "the server with --scheduling-policy priority",
            param="priority",
        )
