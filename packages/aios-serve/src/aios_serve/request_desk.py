"""The open requests of an AsyncEngine: what comes from the engines goes to whoever asked for it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from aios_model.errors import InvalidRequestError
from aios_sched.errors import QueueFullError
from aios_serve.errors import RequestFailedError
from aios_serve.messages import Abort, Outputs, PrefixCacheReset, RequestFailed, ResetPrefixCache
from aios_serve.request_stream import RequestStream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

    from aios_model.sampling.params import SamplingParams
    from aios_serve.dispatcher import Dispatcher
    from aios_serve.errors import EngineUnavailableError
    from aios_serve.listener import EngineListener
    from aios_serve.messages import Event
    from aios_serve.open_request import OpenRequest
    from aios_serve.output_processor import OutputProcessor, ProcessedStep
    from aios_serve.outputs import RequestDelta
    from aios_serve.supervisor import EngineSupervisor

logger = logging.getLogger(__name__)


class RequestDesk:
    """Opens requests, hands out their deltas, ends them.

    Args:
        processor: Knows the open requests and turns tokens into text.
        dispatcher: Knows the engines, and which of them has which request.
        listeners: Are told what happens; the list may grow.
    """

    def __init__(self, processor: OutputProcessor, dispatcher: Dispatcher, listeners: Sequence[EngineListener]) -> None:
        self._processor = processor
        self._dispatcher = dispatcher
        self._listeners = listeners
        self._streams: dict[str, RequestStream] = {}
        self._all_closed = asyncio.Event()
        self._cache_resets: dict[int, deque[asyncio.Future[bool]]] = {}

    @property
    def num_open_requests(self) -> int:
        """Requests whose reader is still there."""
        return len(self._streams)

    @property
    def num_open_choices(self) -> int:
        """Sequences that the engine may be running or queueing."""
        return self._processor.num_open_choices

    async def stream(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None,
        priority: int,
        cache_salt: str,
        session: str,
        tenant: str,
        tenant_weight: float,
        deadline: float | None,
    ) -> AsyncGenerator[RequestDelta, None]:
        """Run a checked request; see `AsyncEngine.generate`."""
        request = self._processor.open(
            prompt_token_ids,
            params,
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
            session=session,
            tenant=tenant,
            tenant_weight=tenant_weight,
            deadline=deadline,
        )
        stream = self._streams[request.key] = RequestStream()
        try:
            self._dispatcher.place(request)
            finished = False
            while not finished:
                delta = await stream.next()
                finished = delta.finished
                yield delta
        finally:
            self._close(request)

    def abort(self, request_id: str) -> int:
        """End every open request with exactly this id; returns how many there were."""
        requests = [request for request in self._processor.open_requests if request.request_id == request_id]
        for request in requests:
            self._abort(request)
        return len(requests)

    async def finish(self, timeout: float) -> bool:
        """Wait until every stream is read to its end; after `timeout` seconds abort the rest and return False."""
        if not self._streams:
            return True
        self._all_closed.clear()
        try:
            await asyncio.wait_for(self._all_closed.wait(), timeout)
        except TimeoutError:
            for request in self._processor.open_requests:
                self._abort(request)
            return False
        return True

    async def reset_prefix_cache(self, replicas: Mapping[int, EngineSupervisor]) -> bool:
        """Forget all cached prefixes of these engines; False if requests still hold pages of them."""
        loop = asyncio.get_running_loop()
        resets: list[asyncio.Future[bool]] = []
        for number, replica in replicas.items():
            resets.append(loop.create_future())
            self._cache_resets.setdefault(number, deque()).append(resets[-1])
            replica.send(ResetPrefixCache())
        return all(await asyncio.gather(*resets))

    def receive(self, replica: int, event: Event) -> None:
        """Take in what an engine says."""
        match event:
            case Outputs():
                self._on_outputs(replica, event)
            case RequestFailed():
                self._on_request_failed(event)
            case PrefixCacheReset():
                if event.done:
                    self._dispatcher.forget_cache(replica)
                _settle(self._cache_resets[replica].popleft(), event.done)

    def lose(self, replica: int, error: EngineUnavailableError) -> None:
        """An engine is gone. What it had begun fails; the rest goes to another engine, if there are several."""
        for request in self._processor.open_requests:
            if request.ticket is None or request.replica != replica:
                continue  # it waits for an engine, or is at another one
            if not self._dispatcher.move(request, partial(self._fail, request, error)):
                self._fail(request, error)
        for done in self._cache_resets.pop(replica, ()):
            _settle(done, True)  # the cache went with the engine

    def _fail(self, request: OpenRequest, error: Exception) -> None:
        """End a request whose engine does not know it any more."""
        self._processor.close(request)
        self._dispatcher.finish(request)
        self._streams[request.key].fail(error)
        self._tell_finished(request, "error")

    def _close(self, request: OpenRequest) -> None:
        """The reader is done with the request, or gone; whatever still runs of it ends."""
        del self._streams[request.key]
        running = self._processor.close(request)
        if running:
            self._dispatcher.abort(request, running)
            self._tell_finished(request, "abort")
        self._dispatcher.finish(request)
        if not self._streams:
            self._all_closed.set()

    def _abort(self, request: OpenRequest) -> None:
        running, delta = self._processor.abort(request)
        self._dispatcher.abort(request, running)
        self._dispatcher.finish(request)
        self._streams[request.key].put(delta)
        self._tell_finished(request, "abort")

    def _on_outputs(self, replica: int, event: Outputs) -> None:
        step = self._processor.process(event.outputs)
        if step.aborts:
            self._dispatcher.send(replica, Abort(engine_ids=step.aborts))
        for request, delta in step.deltas:
            self._dispatcher.note_first_token(request)
            self._streams[request.key].put(delta)
        for request, message in step.failures:
            self._streams[request.key].fail(RequestFailedError(message, request_id=request.request_id))
        for request in step.finished:
            self._dispatcher.finish(request)
        self._tell(lambda listener: _tell_step(listener, replica, event, step))

    def _on_request_failed(self, event: RequestFailed) -> None:
        request = self._processor.get(event.key)
        if request is not None:
            self._fail(request, _request_error(event, request.request_id))

    def _tell_finished(self, request: OpenRequest, finish_reason: str) -> None:
        request.finish_reason = finish_reason
        timing = request.timing()
        self._tell(lambda listener: listener.on_finished(timing))

    def _tell(self, tell: Callable[[EngineListener], None]) -> None:
        for listener in self._listeners:
            try:
                tell(listener)
            except Exception:  # a counter that breaks must not take the connection to the engine with it
                logger.exception("%s failed", type(listener).__name__)


def _tell_step(listener: EngineListener, replica: int, event: Outputs, step: ProcessedStep) -> None:
    listener.on_step(stats=event.stats, num_tokens=event.num_tokens, replica=replica)
    for num_tokens, seconds, first in step.gained:
        listener.on_tokens(num_tokens=num_tokens, seconds=seconds, first=first, replica=replica)
    for request in step.finished:
        listener.on_finished(request.timing())


def _settle(future: asyncio.Future[bool], outcome: bool | Exception) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _request_error(event: RequestFailed, request_id: str) -> Exception:
    match event.kind:
        case "invalid":
            return InvalidRequestError(event.message, param=event.param)
        case "queue_full":
            return QueueFullError(event.message)
        case _:
            return RequestFailedError(event.message, request_id=request_id)
