"""Is the engine up? Loading, readiness, signs of life, and death; nothing about requests. Never imports torch."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar

from aios_serve.errors import EngineDeadError, EngineDrainingError, EngineLoadingError
from aios_serve.messages import Fatal, Heartbeat, Loading, Outputs, Ready, Start
from aios_serve.served_model import local_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from aios_model.weights.hub import ModelFiles
    from aios_sched.stats import EngineStats
    from aios_serve.config import EngineConfig
    from aios_serve.engine_client import EngineClient
    from aios_serve.errors import EngineUnavailableError
    from aios_serve.messages import Command, Event
    from aios_serve.model_info import EngineInfo
    from aios_serve.served_model import ServedModel

logger = logging.getLogger(__name__)
T = TypeVar("T")


class EngineState(StrEnum):
    """Where the engine stands: it takes requests only while ready."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class EngineSupervisor:
    """Brings one engine up and watches it.

    Args:
        config: The options.
        client: Connection to the engine.
        find: Resolves the configured model to files, downloading them if need be.
        read: Reads tokenizer, shape and defaults from these files.
        on_event: Gets every event of a living engine.
        on_death: Gets the reason, once.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        client: EngineClient,
        find: Callable[[EngineConfig], ModelFiles],
        read: Callable[[EngineConfig, ModelFiles], ServedModel],
        on_event: Callable[[Event], None],
        on_death: Callable[[EngineDeadError], None],
    ) -> None:
        self._config = config
        self._client = client
        self._find = find
        self._read = read
        self._on_event = on_event
        self._on_death = on_death
        self._model: ServedModel | None = None
        self._info: EngineInfo | None = None
        self._loading: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._pulse = _Pulse(config.heartbeat_timeout)
        self.state = EngineState.LOADING
        self.detail = ""
        self.stats: EngineStats | None = None

    @property
    def model(self) -> ServedModel:
        """The model as this process knows it; EngineUnavailableError until it is read."""
        if self._model is None:
            raise self.unavailable()
        return self._model

    @property
    def info(self) -> EngineInfo:
        """The engine as built; EngineUnavailableError until it is."""
        if self._info is None:
            raise self.unavailable()
        return self._info

    def is_healthy(self) -> bool:
        """Whether it serves, exists, and gave a sign of life within the deadline."""
        serving = self.state in (EngineState.READY, EngineState.DRAINING)
        return serving and self._client.is_alive() and self._pulse.is_fresh()

    def unavailable(self) -> EngineUnavailableError:
        """Why requests are not taken, as an error to raise."""
        match self.state:
            case EngineState.DRAINING:
                return EngineDrainingError("the engine is shutting down and takes no new requests")
            case EngineState.DEAD:
                return EngineDeadError(self.detail)
            case _:
                detail = f" ({self.detail})" if self.detail else ""
                return EngineLoadingError(f"the model is still being loaded{detail}; try again in a moment")

    def start(self) -> None:
        """Begin loading."""
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        self._ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())  # nobody need ask for it
        self._loading = loop.create_task(self._load())

    async def wait_ready(self) -> None:
        """Wait until it serves; raises what prevented it."""
        if self._ready is None:
            raise EngineLoadingError("the engine was not started; call start() first")
        await asyncio.shield(self._ready)

    def send(self, command: Command) -> None:
        """Hand a command to the engine; one that is dead does not get it."""
        if self.state is not EngineState.DEAD:
            self._client.send(command)

    def begin_drain(self) -> None:
        """Take no more requests."""
        if self.state is EngineState.READY:
            self.state, self.detail = EngineState.DRAINING, "finishing open requests"

    async def shutdown(self) -> None:
        """End it, whatever it does."""
        self._die(EngineDeadError("the engine was shut down"))
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait([self._loading])
        await self._client.close()

    async def _load(self) -> None:
        try:
            self.detail = "finding the model"
            files = await _in_daemon_thread(lambda: self._find(self._config))
            self.detail = "starting the engine"
            await self._client.connect(self._receive, self._lose)
            self._client.send(Start(config=local_config(self._config, files)))
            # While the engine imports torch:
            self._model = await _in_daemon_thread(lambda: self._read(self._config, files))
            self._become_ready()
        except Exception as error:
            self._die(error)
            await self._client.close()

    def _receive(self, event: Event) -> None:
        if self.state is EngineState.DEAD:
            return
        self._pulse.beat()
        match event:
            case Loading():
                self.detail = event.stage if event.fraction is None else f"{event.stage} {event.fraction:.0%}"
            case Ready():
                self._info, self.stats = event.info, event.stats
                self._become_ready()
            case Fatal():
                self._lose(event.message)
                return
            case Outputs() | Heartbeat():
                self.stats = event.stats
        self._on_event(event)

    def _become_ready(self) -> None:
        if self._info is None or self._model is None or self.state is not EngineState.LOADING:
            return
        self.state, self.detail = EngineState.READY, ""
        self._pulse = _Pulse(self._config.heartbeat_timeout)  # silences of loading say nothing about steps
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    def _lose(self, reason: str) -> None:
        if self.state is not EngineState.DEAD:
            logger.error("the engine is dead: %s", reason)
            self._die(EngineDeadError(reason))

    def _die(self, error: Exception) -> None:
        """The one way into "dead"; the first reason stays."""
        if self.state is EngineState.DEAD:
            return
        self.state, self.detail = EngineState.DEAD, str(error) or type(error).__name__
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)
        self._on_death(error if isinstance(error, EngineDeadError) else EngineDeadError(self.detail))


class _Pulse:
    """When the last sign of life came, and how long the next may take."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._longest = 0.0
        self._last = time.monotonic()

    def beat(self) -> None:
        now = time.monotonic()
        if self.is_fresh():  # a silence that counted as stuck teaches nothing about steps
            self._longest = max(self._longest, now - self._last)
        self._last = now

    def is_fresh(self) -> bool:
        deadline = max(self._timeout, min(4 * self._longest, 10 * self._timeout))
        return time.monotonic() - self._last <= deadline


async def _in_daemon_thread(call: Callable[[], T]) -> T:
    """As asyncio.to_thread, but a download under way does not keep the interpreter from leaving."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(setter: Callable[..., None], value: object) -> None:
        if not future.done():
            setter(value)

    def run() -> None:
        try:
            outcome = (future.set_result, call())
        except Exception as error:
            outcome = (future.set_exception, error)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name="aios-load", daemon=True).start()
    return await future
