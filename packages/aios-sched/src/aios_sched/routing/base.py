"""The socket for routing policies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

RoutingName = Literal["prefix-affinity", "least-loaded", "session", "round-robin"]
"""Policies by the names that options use; `router.ROUTING_POLICIES` has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedRequest:
    """What a policy may look at.

    Attributes:
        prompt_token_ids: The prompt.
        max_tokens: Longest output of each choice; None if it is not known.
        num_choices: Outputs that are generated side by side from this prompt.
        session: What belongs together has the same, such as the turns of a conversation; empty if nothing is known.
        cache_salt: Prompts share cached pages only with those of the same salt.
    """

    prompt_token_ids: Sequence[int]
    max_tokens: int | None = None
    num_choices: int = 1
    session: str = ""
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a request goes.

    Attributes:
        replica: Number of the replica.
        num_cached_tokens: Leading tokens of the prompt that it has probably computed already.
    """

    replica: int
    num_cached_tokens: int = 0


class RoutingPolicy(Protocol):
    """Picks among the replicas that were added and not removed. Replicas are numbers, and keep theirs for life."""

    def add(self, replica: int) -> None:
        """This one takes requests from now on. It begins with an empty cache."""
        ...

    def remove(self, replica: int) -> None:
        """This one takes no requests any more; whatever was remembered of it is void."""
        ...

    def choose(self, request: RoutedRequest) -> Choice | None:
        """Where `request` goes; the policy may count on it that it does. None if there is no replica."""
        ...
