"""One HTTP request as plain data, and an ASGI application that is called with it. Nothing here knows of Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aios_serve.generation import cancel_and_wait
from aios_serve.request_identity import RequestIdentity

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Scope


@dataclass(frozen=True, slots=True, kw_only=True)
class AsgiCall:
    """A request, whole: it can be sent again.

    Attributes:
        method: Upper case.
        path: As the router sees it, decoded, without the prefix under which the application is mounted.
        query_string: What follows the question mark, still encoded.
        headers: Names in lower case.
        body: All of it.
        identity: The id and the seed that it keeps when it is sent again.
    """

    method: str
    path: str
    query_string: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    identity: RequestIdentity

    def scope(self) -> Scope:
        """The ASGI scope of the request."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": self.query_string,
            "headers": self.headers,
            "client": None,
            "server": None,
            "state": self.identity.state(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerStart:
    """Status, headers, and the first piece of the body: nobody needs to be told of a status before that."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def is_event_stream(self) -> bool:
        """Whether the body consists of server-sent events."""
        return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in self.headers)


async def call_app(app: ASGIApp, call: AsgiCall) -> AsyncGenerator[AnswerStart | bytes]:
    """Run `app` on `call`: one AnswerStart, then the rest of the body as it comes, pieces that pile up joined.

    Closing the generator early is what a client does who goes away: the application is told so, and cancelled.

    Raises:
        Exception: what the application raised.
    """
    exchange = _Exchange(call.body)
    task = asyncio.ensure_future(app(call.scope(), exchange.receive, exchange.send))
    task.add_done_callback(lambda _: exchange.end())
    try:
        first = await exchange.next_body()
        if exchange.start is None:
            await task
            raise RuntimeError("the application ended without an answer")
        yield AnswerStart(status=exchange.start["status"], headers=exchange.headers, body=first or b"")
        while (body := await exchange.next_body()) is not None:
            yield body
        await task
    finally:
        await cancel_and_wait(task)


class _Exchange:
    """The two ends of a connection that an ASGI application believes to have."""

    def __init__(self, body: bytes) -> None:
        self.start: Message | None = None
        self._request: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._bodies: list[bytes] = []
        self._ended = False
        self._news = asyncio.Event()

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        assert self.start is not None
        return [(bytes(name), bytes(value)) for name, value in self.start.get("headers", ())]

    async def receive(self) -> Message:
        """The request, and after that nothing: whoever leaves cancels the application."""
        if self._request is None:
            await asyncio.get_running_loop().create_future()
        request, self._request = self._request, None
        assert request is not None
        return request

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            return
        if body := message.get("body"):
            self._bodies.append(bytes(body))
        self._ended = not message.get("more_body", False)
        self._news.set()

    def end(self) -> None:
        self._ended = True
        self._news.set()

    async def next_body(self) -> bytes | None:
        """What was sent since the last look; None when all has been."""
        while not self._bodies and not self._ended:
            self._news.clear()
            await self._news.wait()
        if not self._bodies:
            return None
        body = b"".join(self._bodies)
        self._bodies.clear()
        return body
