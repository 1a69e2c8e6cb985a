"""TenantGate: the limits of tenants, in front of everything that costs work."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from aios_serve.error_responses import ApiError
from aios_serve.tenants.throttling import disabled
from aios_serve.tenants.visit import Visit, known_visit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from aios_serve.tenants.token_bucket import TokenBucket

_FREE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Lists and figures: they cost nothing and are not counted."""


class TenantGate:
    """ASGI middleware behind the one that asks for keys: lets a request in or not, and settles its account at the end.

    Limits on requests and concurrency are looked at before the body is read. What the request needs is known only
    then: the route asks the visit for that (`Visit.reserve`), before the engine hears of it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what may come in, with a `send` that watches how it ends."""
        visit = known_visit(scope)
        if visit is None or scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["method"] not in _FREE_METHODS:
            await self._counted(visit, scope, receive, send)
        elif visit.tenant.enabled:
            await self.app(scope, receive, send)
        else:
            await disabled(visit.tenant).response()(scope, receive, send)

    async def _counted(self, visit: Visit, scope: Scope, receive: Receive, send: Send) -> None:
        answer = _Answer(visit, send)
        try:
            visit.enter()
        except ApiError as refusal:
            await refusal.response()(scope, receive, answer.send)
            visit.account.outcomes[answer.outcome] += 1
            return
        try:
            await self.app(scope, receive, answer.send)
        finally:
            visit.leave(answer.outcome)


class _Answer:
    """Watches an answer on its way out, and tells the client in its head what is left of its limits."""

    def __init__(self, visit: Visit, send: Send) -> None:
        self._visit = visit
        self._send = send
        self._status: int | None = None
        self._is_whole = False

    async def send(self, message: Message) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *_headers(self._visit)]}
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_whole = True

    @property
    def outcome(self) -> str:
        """One of OUTCOMES."""
        match self._status:
            case 429:
                return "throttled"
            case 503:
                return "unavailable"
            case None | 499:
                return "failed" if self._visit.has_failed else "disconnected"
            case status if status >= 500 or self._visit.has_failed:
                return "failed"
            case status if status >= 400:
                return "invalid"
            case _:
                return "success" if self._is_whole else "disconnected"


def _headers(visit: Visit) -> Iterator[tuple[bytes, bytes]]:
    """OpenAI's, for the limits that the tenant has."""
    account = visit.account
    for name, bucket in (("requests", account.requests), ("tokens", account.tokens)):
        if bucket is not None:
            for what, text in _left(bucket).items():
                yield f"x-ratelimit-{what}-{name}".encode(), text.encode()


def _left(bucket: TokenBucket) -> dict[str, str]:
    return {
        "limit": f"{bucket.per_minute:.0f}",
        "remaining": str(max(0, math.floor(bucket.available))),
        "reset": f"{bucket.seconds_until(bucket.per_minute):.3f}s",
    }
