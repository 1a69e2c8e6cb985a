"""A request goes to a replica, and to another one if the first dies before the client has seen a byte.

Nothing here knows of Ray: replicas are reached through `ReplicaPool`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Protocol

from aios_sched.errors import QueueFullError
from aios_serve.error_responses import to_api_error
from aios_serve.errors import EngineLoadingError
from aios_serve.generation import cancel_and_wait
from aios_serve.ray_app.errors import ReplicaLostError
from aios_serve.streaming import DONE

if TYPE_CHECKING:
    from aios_serve.ray_app.asgi_call import AnswerStart, AsgiCall

logger = logging.getLogger(__name__)

MAX_LOST_REPLICAS = 3
"""A request that has taken so many replicas with it gets no other: it may be what killed them."""

LOOK_SECONDS = 1.0
"""How often a waiting request looks whether any replica is running."""

BACK_OFF_SECONDS = 0.2


class ReplicaPool(Protocol):
    """The replicas that can be asked."""

    def call(self, call: AsgiCall) -> AsyncGenerator[AnswerStart | bytes]:
        """Ask one of them, waiting for one with room; closing the generator aborts the request there.

        Raises, at any `anext`:
            ReplicaLostError: the replica died.
            QueueFullError: too many requests wait already.
        """
        ...

    def is_up(self) -> bool:
        """Whether a replica is running."""
        ...


class Forwarder:
    """Forwards requests so that a replica's death costs no client its answer, as far as HTTP allows.

    Args:
        pool: The replicas.
        patience: Seconds that a request waits while no replica is running.
    """

    def __init__(self, pool: ReplicaPool, *, patience: float) -> None:
        self._pool = pool
        self._patience = patience

    async def answer(self, call: AsgiCall) -> AsyncGenerator[AnswerStart | bytes]:
        """The answer to `call`: its start, then the rest of its body as it comes.

        A stream of events whose replica dies ends with an error event and `[DONE]`, as one whose engine fails does.

        Raises, before anything is yielded:
            QueueFullError: too many requests wait already.
            EngineLoadingError: no replica was running for as long as patience lasts.
            ReplicaLostError: the request has lost so many replicas that it gets no other.

        Raises, later:
            ReplicaLostError: the replica died, and the body is not a stream of events.
        """
        start, rest = await self._first(call)
        async with aclosing(rest):
            last = start.body
            yield start
            try:
                async for last in rest:
                    yield last
            except ReplicaLostError as error:
                logger.warning("a replica was lost in the middle of %s %s", call.method, call.path)
                if last.endswith(DONE):  # it had said everything
                    return
                if not start.is_event_stream:
                    raise
                yield b"data: " + to_api_error(error).body() + b"\n\n" + DONE

    async def _first(self, call: AsgiCall) -> tuple[AnswerStart, AsyncGenerator[bytes]]:
        """Ask replicas until one begins to answer."""
        num_lost = 0
        while True:
            parts = self._pool.call(call)
            try:
                start = await self._unless_none_runs(parts)
                return start, parts  # type: ignore[return-value]
            except ReplicaLostError:
                num_lost += 1
                if num_lost == MAX_LOST_REPLICAS:
                    raise
                logger.warning("a replica was lost before it answered %s %s; asking another", call.method, call.path)
            except QueueFullError:
                if not num_lost:
                    raise
                # It had been let in before: the ones that came later can wait with their clients.
            except BaseException:
                await parts.aclose()
                raise
            await parts.aclose()
            await asyncio.sleep(BACK_OFF_SECONDS)

    async def _unless_none_runs(self, parts: AsyncGenerator[AnswerStart | bytes]) -> AnswerStart:
        """The first of `parts`; gives up when no replica has been running for longer than patience lasts."""
        first = asyncio.ensure_future(_start_of(parts))
        given_up = asyncio.ensure_future(self._none_runs())
        try:
            await asyncio.wait((first, given_up), return_when=asyncio.FIRST_COMPLETED)
            if first.done():
                return first.result()
            raise EngineLoadingError("No replica is running; one is being started. Try again in a moment.")
        finally:
            await cancel_and_wait(first, given_up)

    async def _none_runs(self) -> None:
        """Return when no replica has been running for `patience` seconds on end."""
        now = asyncio.get_running_loop().time
        last_up = now()
        while now() - last_up < self._patience:
            await asyncio.sleep(min(LOOK_SECONDS, self._patience))
            if self._pool.is_up():
                last_up = now()


async def _start_of(parts: AsyncGenerator[AnswerStart | bytes]) -> AnswerStart:
    async for part in parts:
        assert not isinstance(part, bytes)
        return part
    raise ReplicaLostError("The replica ended the request without an answer; send it again.")
