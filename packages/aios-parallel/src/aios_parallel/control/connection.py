"""One end of a control connection: messages over a stream socket."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aios_parallel.control.messages import encode_frame

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aios_parallel.control.messages import Command, Event, FrameReader

_RECEIVE_BYTES = 1 << 20


class ConnectionLostError(Exception):
    """Nobody is at the other end any more."""


class Connection:
    """Sends and receives messages; sending is safe from several threads, receiving belongs to one.

    Args:
        connection: A connected stream socket, blocking.
        reader: Of what the other end sends.
    """

    def __init__(self, connection: socket.socket, reader: FrameReader) -> None:
        connection.setblocking(True)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._reader = reader
        self._lock = threading.Lock()
        self._messages: list[Any] = []

    def fileno(self) -> int:
        """Of the socket."""
        return self._socket.fileno()

    @property
    def local_address(self) -> str:
        """The address by which this host is reached over the connection; empty for one within the host."""
        return self._socket.getsockname()[0] if self._socket.family in (socket.AF_INET, socket.AF_INET6) else ""

    def send(self, message: Command | Event) -> None:
        """Hands a message over; ConnectionLostError if nobody is there."""
        self.send_frame(encode_frame(message))

    def send_frame(self, frame: bytes) -> None:
        """As `send`, for a message that was encoded already."""
        try:
            with self._lock:
                self._socket.sendall(frame)
        except OSError as error:
            raise ConnectionLostError(str(error)) from error

    def receive(self) -> Any:
        """Waits for the next message.

        Raises:
            ConnectionLostError: The other end is gone.
            WireError: It sent something that is no message.
        """
        while not self._messages:
            self._messages += self.take()
        return self._messages.pop(0)

    def take(self) -> list[Any]:
        """The messages in what has arrived, waiting for at least one byte; errors as `receive`."""
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except OSError as error:
            raise ConnectionLostError(str(error)) from error
        if not data:
            raise ConnectionLostError("the connection was closed")
        return self._reader.feed(data)

    def close(self) -> None:
        """Ends the connection, for both ends."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.receive()
