"""Who may join a group: whoever knows the run's token.

Both ends prove that they know it without sending it: each signs the other's random challenge (HMAC-SHA256). Only then
is a message read. What follows is not encrypted; the control plane belongs on a private network, as torch's and NCCL's
own traffic does.

    rank                              driver
                      ◄───  magic, challenge
      proof, challenge ───►
                      ◄───  proof
      rank, host       ───►
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from aios_parallel.errors import WireError

_MAGIC = b"AIOSctl1"
_CHALLENGE_BYTES = 32
_SECONDS = 10.0
_MAX_NAME_BYTES = 512


@dataclass(frozen=True, slots=True)
class Peer:
    """A rank that has joined.

    Attributes:
        rank: The number it was given where it was started.
        host: Tells which ranks share a host.
        address: Where the other hosts reach it.
    """

    rank: int
    host: str
    address: str


def new_token() -> str:
    """A token for one run."""
    return secrets.token_hex(32)


def host_identity() -> str:
    """What the processes of one host have in common, and no others: the same kernel, and the same network."""
    kernel, network = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    try:
        return f"{kernel.read_text().strip()}/{network.readlink()}"
    except OSError:
        return socket.gethostname()


def accept_peer(connection: socket.socket, token: str) -> Peer:
    """The driver's side; WireError if the other end does not know the token."""
    connection.settimeout(_SECONDS)
    challenge = secrets.token_bytes(_CHALLENGE_BYTES)
    try:
        connection.sendall(_MAGIC + challenge)
        proof, theirs = _read(connection, 32), _read(connection, _CHALLENGE_BYTES)
        if not hmac.compare_digest(proof, _proof(token, b"rank", challenge)):
            raise WireError("somebody without the run's token tried to join")
        connection.sendall(_proof(token, b"driver", theirs))
        rank, length = struct.unpack("!ii", _read(connection, 8))
        if not 0 <= length <= _MAX_NAME_BYTES:
            raise WireError(f"a host name of {length} bytes is none")
        host = _read(connection, length).decode()
        address = connection.getpeername()[0] if connection.family != socket.AF_UNIX else ""
    except (OSError, UnicodeDecodeError) as error:
        raise WireError(f"a rank did not finish joining: {error}") from error
    connection.settimeout(None)
    return Peer(rank=rank, host=host, address=address)


def join(connection: socket.socket, token: str, *, rank: int) -> None:
    """A rank's side; WireError if the other end is no driver of this run."""
    connection.settimeout(_SECONDS)
    try:
        greeting = _read(connection, len(_MAGIC) + _CHALLENGE_BYTES)
        if not greeting.startswith(_MAGIC):
            raise WireError("what listens there is no driver of a rank group")
        mine = secrets.token_bytes(_CHALLENGE_BYTES)
        connection.sendall(_proof(token, b"rank", greeting[len(_MAGIC) :]) + mine)
        if not hmac.compare_digest(_read(connection, 32), _proof(token, b"driver", mine)):
            raise WireError("what listens there does not know the run's token")
        host = host_identity().encode()
        connection.sendall(struct.pack("!ii", rank, len(host)) + host)
    except OSError as error:
        raise WireError(f"joining the group failed: {error}; both ends need the same token") from error
    connection.settimeout(None)


def _proof(token: str, role: bytes, challenge: bytes) -> bytes:
    return hmac.digest(token.encode(), role + challenge, "sha256")


def _read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise ConnectionError("the other end closed the connection")
        data += piece
    return data
