"""What is asked of the system, and when: the requests of a trace, without a single token of text.

Two prompts share keys and values exactly as far as their tokens are equal, so a simulator needs to know *which* tokens
are equal and not what they say. A prompt here is a run of a shared prefix and then a run of its own stream. The first
token of a run is unique, all others are 0: pages are told by their tokens and everything before them
(`aios_kvcache.prefix_cache`), so one token tells two runs apart for good, and costs no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

PLAIN_TOKEN = 0
"""Every token of a run but its first, and every sampled one."""

_PREFIX_BASE = 1
_STREAM_BASE = 1 << 40


@dataclass(slots=True, kw_only=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        arrival_s: When it arrives, in seconds from the start.
        num_prompt_tokens: Its prompt, the shared prefix included.
        num_output_tokens: Tokens it will generate.
        stream: What its own tokens belong to: the turns of a conversation have the same, each prompt going on where
            the last answer ended.
        prefix: Number of the prefix it begins with.
        num_prefix_tokens: Tokens of that prefix; below `num_prompt_tokens`.
        session: For routing.
        tenant: Tenants do not share pages.
        priority: Lower is more important.
        turn: Number within its conversation, from 0.
    """

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    stream: int
    prefix: int = 0
    num_prefix_tokens: int = 0
    session: str = ""
    tenant: str = ""
    priority: int = 0
    turn: int = 0

    def prompt_token_ids(self) -> list[int]:
        """Tokens that are equal to another prompt's as far as both have the same prefix and the same stream."""
        own = [PLAIN_TOKEN] * (self.num_prompt_tokens - self.num_prefix_tokens)
        own[0] = _STREAM_BASE + self.stream
        if not self.num_prefix_tokens:
            return own
        prefix = [PLAIN_TOKEN] * self.num_prefix_tokens
        prefix[0] = _PREFIX_BASE + self.prefix
        return prefix + own


class Trace(Protocol):
    """Requests in the order of their arrival, made when they are asked for: a million of them need no room."""

    def arrivals(self) -> Iterator[TraceRequest]:
        """All requests whose time of arrival is known beforehand. May be called again, and gives the same."""
        ...

    def follow_up(self, request: TraceRequest, *, finished_s: float) -> TraceRequest | None:
        """The request that is sent because `request` was answered; None if that was the end of it."""
        ...
