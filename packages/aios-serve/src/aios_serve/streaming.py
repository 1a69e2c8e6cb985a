"""Server-sent events: how deltas become chunks on the wire, and what happens when things go wrong on the way.

The first delta is awaited before anything is sent (`first_delta`), so that whatever fails early is a plain HTTP error.
After that the status line is out: an error becomes an event, and `[DONE]` still follows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Protocol

import msgspec
from starlette.responses import Response

from aios_serve.error_responses import to_api_error
from aios_serve.generation import cancel_and_wait, unless_disconnected, wait_for_disconnect

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from aios_serve.generation import ChoiceDelta

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


class ChunkWriter(Protocol):
    """Turns deltas into the chunks of one endpoint."""

    def begin(self) -> Sequence[msgspec.Struct]:
        """Chunks before the first text."""
        ...

    def chunk(self, delta: ChoiceDelta) -> msgspec.Struct | None:
        """The chunk of one delta; None if there is nothing to show yet."""
        ...

    def end(self) -> Sequence[msgspec.Struct]:
        """Chunks after the last text."""
        ...


async def stream_response(
    request: Request, deltas: AsyncGenerator[ChoiceDelta], writer: ChunkWriter, *, keep_alive_interval: float
) -> Response:
    """Wait for the first delta, then answer with a stream of the rest; raises what `first_delta` does."""
    first = await first_delta(request, deltas)
    return EventStreamResponse(_events(first, deltas, writer), keep_alive_interval=keep_alive_interval)


async def first_delta(request: Request, deltas: AsyncGenerator[ChoiceDelta]) -> ChoiceDelta:
    """The first delta of a stream, before anything is sent.

    Raises:
        ClientDisconnectedError: the client went away before it.
        Exception: whatever the engine refused the request with.
    """
    try:
        return await unless_disconnected(request, anext(deltas))
    except BaseException:
        await deltas.aclose()
        raise


class EventStreamResponse(Response):
    """Sends events as they come. A client that goes away closes `events`, which aborts the request in the engine."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], *, keep_alive_interval: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._keep_alive_interval = keep_alive_interval
        self._last_sent = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the events end or the client is gone."""
        sender = asyncio.create_task(self._send_events(send))
        keeper = asyncio.create_task(self._keep_alive(send))
        gone = asyncio.create_task(wait_for_disconnect(receive))
        try:
            await asyncio.wait((sender, gone), return_when=asyncio.FIRST_COMPLETED)
            keeper.cancel()
            if sender.done():
                sender.result()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await cancel_and_wait(sender, keeper, gone)
            await self._events.aclose()

    async def _send_events(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            self._last_sent = time.monotonic()
            await send({"type": "http.response.body", "body": event, "more_body": True})

    async def _keep_alive(self, send: Send) -> None:
        """Send a comment, which clients skip, after each interval of silence."""
        while True:
            silence = time.monotonic() - self._last_sent
            if silence >= self._keep_alive_interval:
                self._last_sent = time.monotonic()
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
            else:
                await asyncio.sleep(self._keep_alive_interval - silence)


async def _events(
    first: ChoiceDelta, deltas: AsyncGenerator[ChoiceDelta], writer: ChunkWriter
) -> AsyncGenerator[bytes]:
    """The whole stream as bytes, ending with `[DONE]` whatever happens in between."""
    try:
        async with aclosing(deltas):
            for chunk in writer.begin():
                yield _event(chunk)
            if (chunk := writer.chunk(first)) is not None:
                yield _event(chunk)
            async for delta in deltas:
                if (chunk := writer.chunk(delta)) is not None:
                    yield _event(chunk)
        for chunk in writer.end():
            yield _event(chunk)
    except Exception as error:
        yield b"data: " + to_api_error(error).body() + b"\n\n"
    yield DONE


def _event(chunk: msgspec.Struct) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"
