"""Where the deltas of one request wait for whoever reads them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aios_serve.outputs import RequestDelta


class RequestStream:
    """At most one pending delta: what arrives while nobody looks is added to it."""

    def __init__(self) -> None:
        self._pending: RequestDelta | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, delta: RequestDelta) -> None:
        """Append news."""
        if self._pending is None:
            self._pending = delta
        else:
            self._pending.extend(delta)
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the stream with an error, behind what is pending."""
        self._error = error
        self._wake()

    async def next(self) -> RequestDelta:
        """What is new, waiting for it if need be; raises what `fail` was given once everything is read."""
        while self._pending is None and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        delta, self._pending = self._pending, None
        if delta is not None:
            return delta
        assert self._error is not None
        raise self._error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
