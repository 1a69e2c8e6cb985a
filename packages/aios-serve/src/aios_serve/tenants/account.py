"""TenantAccount: the counters of one tenant, of which its limits and its metrics are made."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from aios_serve.tenants.throttling import (
    LIMITS,
    disabled,
    too_many_at_once,
    too_many_requests,
    too_many_tokens,
)
from aios_serve.tenants.token_bucket import TokenBucket

if TYPE_CHECKING:
    from collections.abc import Callable

    from aios_serve.tenants.tenant import Tenant

OUTCOMES: tuple[str, ...] = ("success", "invalid", "throttled", "failed", "unavailable", "disconnected")
"""How a request can end: answered; a 4xx but 429; a 429; an error of the server; a 503; its client went away."""

FIRST_TOKEN_SECONDS = tuple(step * 10.0**power for power in range(-3, 3) for step in (1, 2.5, 5))
"""Buckets of the histogram of times to the first token."""


class TenantAccount:
    """What one tenant has taken and may take. Memory does not grow with its requests.

    Args:
        tenant: Its terms; `adopt` replaces them.
        clock: Seconds that never go back.

    Attributes:
        requests: The bucket of requests per minute; None without that limit.
        tokens: The bucket of tokens per minute; None without that limit.
        num_running: Sequences of requests that have been let in and are not answered.
    """

    def __init__(self, tenant: Tenant, *, clock: Callable[[], float]) -> None:
        self.tenant = tenant
        self.clock = clock
        self.requests = _bucket(None, tenant.requests_per_minute, clock)
        self.tokens = _bucket(None, tenant.tokens_per_minute, clock)
        self.num_running = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_generation_tokens = 0
        self.outcomes = dict[str, int].fromkeys(OUTCOMES, 0)
        self.throttled = dict[str, int].fromkeys(LIMITS, 0)
        self.first_tokens = [0] * (len(FIRST_TOKEN_SECONDS) + 1)
        self.first_token_seconds = 0.0

    def adopt(self, tenant: Tenant) -> None:
        """Go on under other terms. What was taken stays taken; requests on their way end as they began."""
        self.tenant = tenant
        self.requests = _bucket(self.requests, tenant.requests_per_minute, self.clock)
        self.tokens = _bucket(self.tokens, tenant.tokens_per_minute, self.clock)

    def enter(self) -> None:
        """Let one request in, and count it.

        Raises:
            ApiError: 403 for a disabled tenant, 429 for one that has used up a limit.
        """
        tenant = self.tenant
        if not tenant.enabled:
            raise disabled(tenant)
        self.take_seats(1)
        if self.tokens is not None and self.tokens.available < 1:
            self.num_running -= 1
            self.throttled["tokens_per_minute"] += 1
            raise too_many_tokens(tenant, self.tokens, 1)
        if self.requests is not None:
            if not self.requests.hold(1):
                self.num_running -= 1
                self.throttled["requests_per_minute"] += 1
                raise too_many_requests(tenant, self.requests)
            self.requests.spend(1)

    def take_seats(self, num_seats: int) -> None:
        """Let that many more sequences run; ApiError 429 if they are too many."""
        most = self.tenant.max_concurrent
        if most is not None and num_seats and self.num_running + num_seats > most:
            self.throttled["max_concurrent"] += 1
            raise too_many_at_once(self.tenant, self.num_running, num_seats)
        self.num_running += num_seats

    def hold_tokens(self, num_tokens: int) -> TokenBucket | None:
        """Hold back what a request may use; returns the bucket that holds it, None without that limit.

        Raises:
            ApiError: 429, there is less.
        """
        if self.tokens is not None and not self.tokens.hold(num_tokens):
            self.throttled["tokens_per_minute"] += 1
            raise too_many_tokens(self.tenant, self.tokens, num_tokens)
        return self.tokens

    def note_first_token(self, seconds: float) -> None:
        """A request got its first token, this long after it came."""
        self.first_tokens[bisect_left(FIRST_TOKEN_SECONDS, seconds)] += 1
        self.first_token_seconds += seconds


def _bucket(old: TokenBucket | None, per_minute: int | None, clock: Callable[[], float]) -> TokenBucket | None:
    if per_minute is None:
        return None
    if old is None:
        return TokenBucket(per_minute, clock=clock)
    old.resize(per_minute)
    return old
