"""Keeps one engine up: starts it, watches it, ends it for certain when it fails, and starts it again.

Nothing about requests here, and nothing about torch. One engine is one `EngineClient` after another:

    loading ──► ready ──► (process gone, Fatal, or no sign of life) ──► restarting ──► ready …
       │                                                                    │
       └── fails at the first start ──► dead ◄── no restart left ───────────┘
"""

from __future__ import annotations

import asyncio
import logging
import time
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING

from aios_serve.errors import EngineDeadError, EngineDrainingError, EngineLoadingError, EngineRestartingError
from aios_serve.messages import Fatal, Heartbeat, Loading, Outputs, Ready, Start
from aios_serve.pulse import Pulse
from aios_serve.restart_budget import RestartBudget

if TYPE_CHECKING:
    from collections.abc import Callable

    from aios_sched.stats import EngineStats
    from aios_serve.config import EngineConfig
    from aios_serve.engine_client import EngineClient
    from aios_serve.errors import EngineUnavailableError
    from aios_serve.messages import Command, Event
    from aios_serve.model_info import EngineInfo

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 2.0
"""That a failed engine has to leave by itself, for the sake of what it must clean up, before it is killed."""
_SHUTDOWN_SECONDS = 5.0
_LOAD_SILENCE = 120.0
"""Seconds without progress, or four times what the first start took, after which a restart counts as stuck."""


class EngineState(StrEnum):
    """Where an engine stands: it takes requests only while ready."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    RESTARTING = "restarting"
    DEAD = "dead"


def unavailable(state: EngineState, detail: str) -> EngineUnavailableError:
    """Why an engine in `state` takes no requests, as an error to raise."""
    match state:
        case EngineState.DRAINING:
            return EngineDrainingError("the engine is shutting down and takes no new requests")
        case EngineState.DEAD:
            return EngineDeadError(detail)
        case EngineState.RESTARTING:
            return EngineRestartingError(detail)
        case _:
            said = f" ({detail})" if detail else ""
            return EngineLoadingError(f"the model is still being loaded{said}; try again in a moment")


class EngineSupervisor:
    """One engine, as long as the server lives. All of it belongs to one event loop.

    Args:
        config: The options.
        new_client: Makes the connection to an engine that is not started yet; asked again for every restart.
        on_event: Gets every event of a living engine.
        on_ready: Told each time it takes requests.
        on_death: Told each time it does not any more, with the reason: EngineRestartingError while there is hope, else
            EngineDeadError.
        name: What to call it in the log.
        budget: How often it is restarted; None reads `config.max_engine_restarts`.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        new_client: Callable[[], EngineClient],
        on_event: Callable[[Event], None],
        on_ready: Callable[[], None],
        on_death: Callable[[EngineUnavailableError], None],
        name: str = "the engine",
        budget: RestartBudget | None = None,
    ) -> None:
        self._heartbeat_timeout = config.heartbeat_timeout
        self._new_client = new_client
        self._on_event = on_event
        self._on_ready = on_ready
        self._on_death = on_death
        self._name = name
        self._budget = budget or RestartBudget(config.max_engine_restarts)
        self._patience = 1.0
        self._client: EngineClient | None = None
        self._lost = asyncio.Event()
        self._retired = False
        self._running: asyncio.Task[None] | None = None
        self._closing: asyncio.Future[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._pulse = Pulse(config.heartbeat_timeout)
        self._earlier_stats: EngineStats | None = None
        self._delay = 0.0
        self.state = EngineState.LOADING
        self.detail = ""
        self.num_restarts = 0
        self.info: EngineInfo | None = None
        self.stats: EngineStats | None = None

    @property
    def client(self) -> EngineClient | None:
        """The connection to the engine of now; None between two."""
        return self._client

    def is_healthy(self) -> bool:
        """Whether it takes requests, exists, and gave a sign of life within the deadline."""
        alive = self._client is not None and self._client.is_alive()
        return self.state is EngineState.READY and alive and self._pulse.is_fresh()

    def start(self, config: EngineConfig) -> None:
        """Begin loading what `config` says; its model is a path on this machine."""
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        self._ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())  # nobody need ask for it
        self._running = loop.create_task(self._run(Start(config=config)))

    async def wait_ready(self) -> None:
        """Wait until it serves for the first time; raises what prevented it."""
        if self._ready is None:
            raise EngineLoadingError("the engine was not started; call start() first")
        await asyncio.shield(self._ready)

    def send(self, command: Command) -> None:
        """Hand a command to the engine; one that is not there does not get it."""
        if self._client is not None:
            self._client.send(command)

    def retire(self) -> None:
        """From now on, if it dies it stays dead."""
        self._retired = True

    async def shutdown(self) -> None:
        """End it, whatever it does."""
        self._retired = True
        self._die(EngineDeadError("the engine was shut down"))
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
        if self._closing is not None:
            await self._closing

    # -- one engine after another --------------------------------------------------------------------------------------

    async def _run(self, start: Start) -> None:
        while self.state is not EngineState.DEAD:
            self._lost.clear()
            client = self._client = self._new_client()
            grace = _SHUTDOWN_SECONDS
            try:
                await self._connect(client, start)
                await self._watch(client)
                grace = _GRACE_SECONDS
            finally:
                self._client = None
                self._closing = asyncio.ensure_future(client.close(grace))
                await asyncio.shield(self._closing)  # nothing may leave an engine half ended
            if self.state is EngineState.RESTARTING:
                await asyncio.sleep(self._delay)
                self.num_restarts += 1

    async def _connect(self, client: EngineClient, start: Start) -> None:
        self._pulse = Pulse(_LOAD_SILENCE if self.info is None else max(_LOAD_SILENCE, 4 * self.info.load_seconds))
        if self.state is EngineState.RESTARTING:
            self.detail = "starting the engine again"
        try:
            await client.connect(partial(self._receive, client), partial(self._lose, client))
            client.send(start)
        except Exception as error:
            self._lose(client, error)

    async def _watch(self, client: EngineClient) -> None:
        """Wait until the engine is lost; one that gives no sign of life counts as lost."""
        interval = min(1.0, self._heartbeat_timeout / 4)
        while not self._lost.is_set():
            began = time.monotonic()
            try:
                await asyncio.wait_for(self._lost.wait(), interval)
            except TimeoutError:
                if time.monotonic() - began > 2 * interval:
                    self._pulse.forgive()  # this loop stood still, perhaps with all of the machine
                elif self._is_stuck(client):
                    self._lose_stuck(client)

    def _is_stuck(self, client: EngineClient) -> bool:
        # The first start may take any time, and says what it does. A thread cannot be killed: it may yet wake up.
        watched = self.state in (EngineState.READY, EngineState.RESTARTING)
        return watched and client.can_be_killed and not self._pulse.is_fresh()

    def _lose_stuck(self, client: EngineClient) -> None:
        self._patience = min(2 * self._patience, 10.0)  # it may have been a long step after all
        self._lose(
            client,
            f"it gave no sign of life for {self._pulse.silence:.1f} s; "
            "if a step may take that long here, raise heartbeat_timeout",
        )

    # -- what happens to it --------------------------------------------------------------------------------------------

    def _receive(self, client: EngineClient, event: Event) -> None:
        if client is not self._client or self._lost.is_set() or self.state is EngineState.DEAD:
            return
        self._pulse.beat()
        match event:
            case Loading():
                self.detail = event.stage if event.fraction is None else f"{event.stage} {event.fraction:.0%}"
            case Ready():
                self.info = event.info
                self._note(event.stats)
                self._become_ready()
            case Fatal():
                self._lose(client, event.message)
                return
            case Outputs() | Heartbeat():
                self._note(event.stats)
        self._on_event(event)

    def _note(self, stats: EngineStats) -> None:
        """Counters go on where those of the engine before it ended."""
        self.stats = stats if self._earlier_stats is None else stats.continuing(self._earlier_stats)

    def _become_ready(self) -> None:
        if self.state is EngineState.RESTARTING:
            logger.warning("%s is ready again, after restart no. %d", self._name, self.num_restarts)
        self.state, self.detail = EngineState.READY, ""
        self._pulse = Pulse(self._patience * self._heartbeat_timeout)  # silences of loading say nothing about steps
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)
        self._on_ready()

    def _lose(self, client: EngineClient, reason: str | Exception) -> None:
        """The engine is gone, or is to go. Requests hear of it at once; the rest is done by `_run`."""
        if client is not self._client or self._lost.is_set() or self.state is EngineState.DEAD:
            return
        self._lost.set()
        if self.state is EngineState.LOADING or self._retired:
            logger.error("%s is dead: %s", self._name, reason)
            self._die(reason if isinstance(reason, Exception) else EngineDeadError(reason))
            return
        delay = self._budget.take()
        if delay is None:
            logger.error("%s is dead: %s; it is not started again: %s", self._name, reason, self._budget.spent())
            self._die(EngineDeadError(f"{reason}; it is not started again: {self._budget.spent()}"))
            return
        logger.error("%s is lost: %s; starting it again in %g s", self._name, reason, delay)
        self._delay = delay
        self.state, self.detail = EngineState.RESTARTING, f"{reason}; starting again in {delay:g} s"
        self._rest()
        self._on_death(EngineRestartingError(str(reason)))

    def _die(self, error: Exception) -> None:
        """The one way into "dead"; the first reason stays."""
        if self.state is EngineState.DEAD:
            return
        self.state, self.detail = EngineState.DEAD, str(error) or type(error).__name__
        self._rest()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)
        self._on_death(error if isinstance(error, EngineDeadError) else EngineDeadError(self.detail))

    def _rest(self) -> None:
        """Nothing runs and nothing waits any more; what was counted stays."""
        if self.stats is not None:
            self.stats = self._earlier_stats = self.stats.at_rest()
