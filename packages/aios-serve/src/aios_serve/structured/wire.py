"""What a checker and its workers say to each other: msgpack bodies, each with its length in front of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import socket

_LENGTH_BYTES = 4


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """What became of a constraint: None, or what is wrong with it."""

    error: str | None = None


def send_frame(connection: socket.socket, message: object) -> None:
    """Sends a message, its length in front."""
    body = msgspec.msgpack.encode(message)
    connection.sendall(len(body).to_bytes(_LENGTH_BYTES, "big") + body)


def receive_frame(connection: socket.socket) -> bytes:
    """The body of the next message; ConnectionError if there is none, TimeoutError as the socket's timeout says."""
    length = int.from_bytes(_receive(connection, _LENGTH_BYTES), "big")
    return _receive(connection, length)


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    received = bytearray()
    while len(received) < num_bytes:
        data = connection.recv(min(num_bytes - len(received), 1 << 20))
        if not data:
            raise ConnectionError("the other end is closed")
        received += data
    return bytes(received)
