"""The engine's end of its connection: commands in, events out, over a socket or within one process."""

from __future__ import annotations

import queue
import select
from collections import deque
from typing import TYPE_CHECKING, Protocol

from aios_serve.messages import FrameBuffer, decode_command, encode_frame

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from aios_serve.messages import Command, Event

_RECEIVE_BYTES = 1 << 18


class ChannelClosedError(Exception):
    """Nobody is at the other end any more."""


class EngineChannel(Protocol):
    """What the engine loop needs to talk."""

    def receive(self, timeout: float | None) -> list[Command]:
        """All commands that are there, waiting up to `timeout` seconds (None: forever) for the first one.

        Raises:
            ChannelClosedError: the other end is gone.
        """
        ...

    def send(self, event: Event) -> None:
        """Hand over an event; ChannelClosedError if the other end is gone."""
        ...


class SocketChannel:
    """Frames over a connected stream socket: the engine in its own process."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        self._socket = connection
        self._buffer = FrameBuffer()
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def receive(self, timeout: float | None) -> list[Command]:
        """See EngineChannel."""
        commands: list[Command] = []
        while self._readable(0 if commands else timeout):
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except ConnectionError as error:
                raise ChannelClosedError from error
            if not data:
                raise ChannelClosedError
            commands += map(decode_command, self._buffer.feed(data))
        return commands

    def _readable(self, timeout: float | None) -> bool:
        return bool(self._poll.poll(None if timeout is None else timeout * 1000))

    def send(self, event: Event) -> None:
        """See EngineChannel. Blocks while the other end's buffer is full, and with it the engine."""
        try:
            self._socket.sendall(encode_frame(event))
        except OSError as error:
            raise ChannelClosedError from error


class QueueChannel:
    """The same between two threads of one process, without encoding anything."""

    def __init__(self, deliver: Callable[[Event], None]) -> None:
        self._deliver = deliver
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._closed = False

    def put(self, command: Command) -> None:
        """The other side's send."""
        self._commands.put(command)

    def close(self) -> None:
        """The other side leaves: wakes the engine, and every later call of it raises."""
        self._closed = True
        self._commands.put(None)

    def receive(self, timeout: float | None) -> list[Command]:
        """See EngineChannel."""
        arrived: deque[Command | None] = deque()
        try:
            arrived.append(self._commands.get(timeout=timeout) if timeout != 0 else self._commands.get_nowait())
            while True:
                arrived.append(self._commands.get_nowait())
        except queue.Empty:
            pass
        if self._closed:
            raise ChannelClosedError
        return [command for command in arrived if command is not None]

    def send(self, event: Event) -> None:
        """See EngineChannel."""
        if self._closed:
            raise ChannelClosedError
        self._deliver(event)
