"""What a tenant is told when it asks for more than it may have. In OpenAI's words, so that clients retry by themselves.

429 with `Retry-After` for what fits later; 400 for what never would: nobody should retry that.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from aios_serve.error_responses import ApiError

if TYPE_CHECKING:
    from aios_serve.tenants.tenant import Tenant
    from aios_serve.tenants.token_bucket import TokenBucket

LIMITS: tuple[str, ...] = ("requests_per_minute", "tokens_per_minute", "max_concurrent")
"""Limits that can throttle; the label `limit` of `aios_tenant_throttled_total`."""

_LONGEST_WAIT = 60


def too_many_requests(tenant: Tenant, bucket: TokenBucket) -> ApiError:
    """The minute's requests are used up."""
    wait = _seconds(bucket.seconds_until(1))
    message = (
        f"Rate limit reached for tenant {tenant.name!r} on requests_per_minute: limit {bucket.per_minute:g}, "
        f"left {_whole(bucket.available)}. Try again in {wait} s."
    )
    return _throttled(message, "requests", wait)


def too_many_tokens(tenant: Tenant, bucket: TokenBucket, amount: int) -> ApiError:
    """The minute's tokens do not suffice."""
    wait = _seconds(bucket.seconds_until(amount))
    held = f", {bucket.held:.0f} held for requests that run" if bucket.held else ""
    message = (
        f"Rate limit reached for tenant {tenant.name!r} on tokens_per_minute: limit {bucket.per_minute:g}, "
        f"left {_whole(bucket.available)}{held}, asked for {amount}. Try again in {wait} s."
    )
    return _throttled(message, "tokens", wait)


def too_many_at_once(tenant: Tenant, num_running: int, asked: int) -> ApiError:
    """As many sequences run as may."""
    message = (
        f"Limit reached for tenant {tenant.name!r} on max_concurrent: limit {tenant.max_concurrent}, "
        f"running {num_running}, asked for {asked}. Try again when one of them has ended."
    )
    return _throttled(message, "concurrency", 1)


def never_fits(tenant: Tenant, limit: str, asked: str, *, param: str) -> ApiError:
    """More than a limit allows by itself: a 400, since waiting does not help."""
    message = (
        f"This request can never be served to tenant {tenant.name!r}: {asked}, and its limit {limit} is "
        f"{getattr(tenant, limit)}. Ask for less."
    )
    return ApiError(400, message, code="tenant_limit_exceeded", param=param)


def disabled(tenant: Tenant) -> ApiError:
    """Its keys are known, and switched off."""
    message = f"Tenant {tenant.name!r} is disabled; ask whoever runs this server."
    return ApiError(403, message, type="permission_error", code="tenant_disabled")


def _throttled(message: str, kind: str, wait: int) -> ApiError:
    return ApiError(429, message, type=kind, code="rate_limit_exceeded", headers={"Retry-After": str(wait)})


def _seconds(wait: float) -> int:
    """Whole seconds, at least one: rounding down would send the client back too early."""
    return min(_LONGEST_WAIT, max(1, math.ceil(wait)))


def _whole(amount: float) -> int:
    return max(0, math.floor(amount))
