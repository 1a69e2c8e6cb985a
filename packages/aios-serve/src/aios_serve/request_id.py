"""`X-Request-Id`: a client's own id comes back with the answer, so that both sides can match their logs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"x-request-id"
MAX_LENGTH = 128


class EchoRequestId:
    """ASGI middleware that repeats the header in the answer. The id names nothing inside: it may come twice."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; add the header to its answer if the request had it."""
        given = [value for name, value in scope.get("headers", ()) if name == HEADER and len(value) <= MAX_LENGTH]
        if scope["type"] != "http" or not given:
            await self.app(scope, receive, send)
            return

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (HEADER, given[0])]
            await send(message)

        await self.app(scope, receive, with_id)
