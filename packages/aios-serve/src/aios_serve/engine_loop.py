"""The loop around the engine: take commands, run a step, send what it brought."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

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
    from aios_serve.channel import EngineChannel
    from aios_serve.engine_port import EnginePort
    from aios_serve.messages import Command

logger = logging.getLogger(__name__)


class EngineLoop:
    """Serves one channel until told to stop, or until nobody is at its other end (ChannelClosedError)."""

    def __init__(self, port: EnginePort, channel: EngineChannel, *, heartbeat_interval: float = 1.0) -> None:
        self._port = port
        self._channel = channel
        self._heartbeat_interval = heartbeat_interval
        self._stopping = False

    def run(self) -> None:
        """Loop: look for commands between steps while there is work, wait for them while there is none."""
        while not self._stopping:
            timeout = 0 if self._port.has_unfinished else self._heartbeat_interval
            for command in self._channel.receive(timeout):
                self._handle(command)
            if self._port.has_unfinished:
                self._channel.send(self._port.step())
            else:
                self._port.check()
                self._channel.send(Heartbeat(stats=self._port.stats()))

    def _handle(self, command: Command) -> None:
        match command:
            case AddRequest():
                self._add(command)
            case Abort():
                self._port.abort(command.engine_ids)
            case ResetPrefixCache():
                self._channel.send(PrefixCacheReset(done=self._port.reset_prefix_cache()))
            case Shutdown():
                self._stopping = True
            case Start():
                raise RuntimeError("the engine was started already")

    def _add(self, message: AddRequest) -> None:
        try:
            self._port.add(message)
        except InvalidRequestError as error:
            failed = RequestFailed(key=message.key, kind="invalid", message=str(error), param=error.param)
            self._channel.send(failed)
        except QueueFullError as error:
            self._channel.send(RequestFailed(key=message.key, kind="queue_full", message=str(error)))
        except Exception:
            logger.exception("adding request %s failed", message.key)
            self._channel.send(RequestFailed(key=message.key, kind="error", message="the engine could not take it"))
