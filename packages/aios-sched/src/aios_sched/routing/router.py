"""Policy and loads together: where a request goes, and what it adds to the load until it is finished."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aios_sched.routing.least_loaded import LeastLoaded
from aios_sched.routing.loads import ReplicaLoads
from aios_sched.routing.prefix_affinity import PrefixAffinity
from aios_sched.routing.round_robin import RoundRobin
from aios_sched.routing.session import SessionAffinity

if TYPE_CHECKING:
    from collections.abc import Callable

    from aios_sched.routing.base import RoutedRequest, RoutingPolicy
    from aios_sched.routing.loads import ReplicaLoad

ROUTING_POLICIES: dict[str, Callable[[ReplicaLoads], RoutingPolicy]] = {
    "prefix-affinity": PrefixAffinity,
    "least-loaded": LeastLoaded,
    "session": SessionAffinity,
    "round-robin": RoundRobin,
}
"""Policies by the names that options use; those are the values of `base.RoutingName`."""

EXPECTED_OUTPUT_TOKENS = 256
"""Most tokens that an output is expected to have: limits are set generously, and seldom reached."""


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket:
    """One open request at its replica.

    Attributes:
        replica: Number of the replica.
        num_cached_tokens: Tokens of the prompt that the policy believes to be cached there.
        num_prompt_tokens: Tokens of the prompt that are still to be computed.
        num_output_tokens: Tokens that are expected to come of it.
    """

    replica: int
    num_cached_tokens: int
    num_prompt_tokens: int
    num_output_tokens: int
    _load: ReplicaLoad
    _open: bool = True


class Router:
    """Sends requests to replicas and knows how much each of them has to do.

        router = Router(PrefixAffinity)
        router.add(0); router.add(1)
        ticket = router.route(RoutedRequest(prompt_token_ids=[1, 2, 3]))
        ...                       # its first token arrives: router.note_first_token(ticket)
        router.finish(ticket)

    Args:
        make_policy: A policy, given the loads it may look at.
    """

    def __init__(self, make_policy: Callable[[ReplicaLoads], RoutingPolicy]) -> None:
        self.loads = ReplicaLoads()
        self._policy = make_policy(self.loads)

    def add(self, replica: int) -> None:
        """A replica takes requests from now on, with nothing to do and nothing cached."""
        self.loads.add(replica)
        self._policy.add(replica)

    def remove(self, replica: int) -> None:
        """A replica takes no requests any more; tickets for it no longer count."""
        self.loads.remove(replica)
        self._policy.remove(replica)

    def forget_cache(self, replica: int) -> None:
        """A replica emptied its cache; what it has to do stays."""
        self._policy.remove(replica)
        self._policy.add(replica)

    def route(self, request: RoutedRequest) -> Ticket | None:
        """Where a request goes, counted as sent there; None if there is no replica."""
        choice = self._policy.choose(request)
        if choice is None:
            return None
        output = EXPECTED_OUTPUT_TOKENS if request.max_tokens is None else request.max_tokens
        load = self.loads[choice.replica]
        ticket = Ticket(
            replica=choice.replica,
            num_cached_tokens=choice.num_cached_tokens,
            num_prompt_tokens=len(request.prompt_token_ids) - choice.num_cached_tokens,
            num_output_tokens=request.num_choices * min(output, EXPECTED_OUTPUT_TOKENS),
            _load=load,
        )
        self.loads.take(load, ticket.num_prompt_tokens + ticket.num_output_tokens)
        return ticket

    def note_first_token(self, ticket: Ticket) -> None:
        """Its prompt has been computed. Saying so twice is fine."""
        if ticket._open and ticket.num_prompt_tokens:
            self.loads.give_back(ticket._load, ticket.num_prompt_tokens, finished=False)
            ticket.num_prompt_tokens = 0

    def finish(self, ticket: Ticket) -> None:
        """It ended, for whatever reason. Saying so twice is fine."""
        if ticket._open:
            ticket._open = False
            self.loads.give_back(ticket._load, ticket.num_prompt_tokens + ticket.num_output_tokens, finished=True)
