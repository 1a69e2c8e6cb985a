"""The loop around the engine: take commands, run a step, send what it brought."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec

from aios_model.errors import InvalidRequestError
from aios_sched.errors import QueueFullError
from aios_serve.messages import (
    Abort,
    AddRequest,
    Heartbeat,
    PrefixCacheReset,
    RequestFailed,
    ResetPrefixCache,
    Shutdown,
    Start,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from aios_serve.channel import EngineChannel
    from aios_serve.engine_port import EnginePort
    from aios_serve.messages import Command

_PREPARING_SECONDS = 0.002
"""How often to look whether a request that waits alone has been prepared."""

logger = logging.getLogger(__name__)


class EngineLoop:
    """Serves one channel until told to stop, or until nobody is at its other end (ChannelClosedError)."""

    def __init__(self, port: EnginePort, channel: EngineChannel, *, heartbeat_interval: float = 1.0) -> None:
        self._port = port
        self._channel = channel
        self._heartbeat_interval = heartbeat_interval
        self._stopping = False
        self._held: dict[str, tuple[AddRequest, Future[None]]] = {}  # by key: what is still being prepared

    def run(self) -> None:
        """Loop: look for commands between steps while there is work, wait for them while there is none."""
        while not self._stopping:
            for command in self._channel.receive(self._patience()):
                self._handle(command)
            self._add_prepared()
            if self._port.has_unfinished:
                self._channel.send(self._port.step())
            elif not self._held:
                self._port.check()
                self._channel.send(Heartbeat(stats=self._port.stats()))

    def _patience(self) -> float:
        if self._port.has_unfinished:
            return 0
        return _PREPARING_SECONDS if self._held else self._heartbeat_interval

    def _handle(self, command: Command) -> None:
        match command:
            case AddRequest():
                self._prepare(command)
            case Abort():
                self._port.abort(command.engine_ids)
                self._release(command.engine_ids)
            case ResetPrefixCache():
                self._channel.send(PrefixCacheReset(done=self._port.reset_prefix_cache()))
            case Shutdown():
                self._stopping = True
            case Start():
                raise RuntimeError("the engine was started already")

    def _prepare(self, message: AddRequest) -> None:
        """Adds a request, at once if it needs no preparation: that goes on beside the steps of others."""
        prepared = self._port.prepare(message)
        if prepared is None:
            self._add(message)
        else:
            self._held[message.key] = (message, prepared)

    def _add_prepared(self) -> None:
        for key in [key for key, (_, prepared) in self._held.items() if prepared.done()]:
            self._add(*self._held.pop(key))

    def _release(self, engine_ids: Sequence[str]) -> None:
        """Forgets those of the choices that are still held."""
        gone = set(engine_ids)
        for key, (message, prepared) in list(self._held.items()):
            left = [child for child in message.children if child.engine_id not in gone]
            if not left:
                del self._held[key]
            elif len(left) < len(message.children):
                self._held[key] = (msgspec.structs.replace(message, children=left), prepared)

    def _add(self, message: AddRequest, prepared: Future[None] | None = None) -> None:
        try:
            if prepared is not None:
                prepared.result()
            self._port.add(message)
        except InvalidRequestError as error:
            failed = RequestFailed(key=message.key, kind="invalid", message=str(error), param=error.param)
            self._channel.send(failed)
        except QueueFullError as error:
            self._channel.send(RequestFailed(key=message.key, kind="queue_full", message=str(error)))
        except Exception:
            logger.exception("adding request %s failed", message.key)
            self._channel.send(RequestFailed(key=message.key, kind="error", message="the engine could not take it"))
