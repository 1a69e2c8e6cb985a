"""Ranks that come from elsewhere: they connect to the driver, which lets in those that know the run's token."""

from __future__ import annotations

import logging
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from aios_parallel.control.connection import Connection
from aios_parallel.control.handshake import Peer, accept_peer, join
from aios_parallel.control.messages import command_reader, event_reader
from aios_parallel.errors import ParallelError, WireError

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class JoinedRank:
    """A rank that has connected."""

    connection: Connection
    peer: Peer


class RankListener:
    """Where ranks connect.

    Args:
        host: Address to listen on; empty for all.
        port: 0 takes a free one.
        token: What ranks must know.
    """

    def __init__(self, host: str, port: int, *, token: str) -> None:
        self._socket = socket.create_server((host, port), backlog=128)
        self._token = token

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._socket.getsockname()[1]

    def wait_for(
        self, ranks: set[int], *, timeout: float, report: Callable[[int], None] = lambda missing: None
    ) -> dict[int, JoinedRank]:
        """Returns once every one of `ranks` has joined; strangers are turned away.

        A rank that joins twice was restarted: the newer one counts.

        Args:
            ranks: Who is expected.
            timeout: Seconds to wait for all of them.
            report: Told how many are missing, whenever that changes and now and then.

        Raises:
            ParallelError: Some did not come.
        """
        joined: dict[int, JoinedRank] = {}
        deadline = time.monotonic() + timeout
        while missing := ranks - joined.keys():
            report(len(missing))
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                names = ", ".join(map(str, sorted(missing)))
                raise ParallelError(
                    f"of {len(ranks)} ranks, {names} did not join in {timeout:g} s; do they run, can they reach this "
                    f"host on port {self.port}, and were they given the same token?"
                )
            if not select.select([self._socket], [], [], min(remaining, 1.0))[0]:
                continue
            connection, address = self._socket.accept()
            try:
                peer = accept_peer(connection, self._token)
            except WireError as error:
                logger.warning("turned away a connection from %s: %s", address[0], error)
                connection.close()
                continue
            if peer.rank not in ranks:
                logger.warning("turned away rank %d from %s: it is not one of this group", peer.rank, address[0])
                connection.close()
                continue
            if (before := joined.pop(peer.rank, None)) is not None:
                before.connection.close()
            joined[peer.rank] = JoinedRank(Connection(connection, event_reader()), peer)
        return joined

    def close(self) -> None:
        """Lets nobody else in."""
        self._socket.close()


def connect_to_driver(address: tuple[str, int], token: str, *, rank: int, timeout: float = 60.0) -> Connection:
    """Joins the group whose driver listens at `address`, trying again while nobody does.

    Raises:
        ParallelError: Nobody listens there, or somebody who does not know the token.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection = socket.create_connection(address, timeout=10.0)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise ParallelError(f"no driver listens at {address[0]}:{address[1]}: {error}") from error
            time.sleep(_RETRY_SECONDS)
    try:
        join(connection, token, rank=rank)
    except WireError:
        connection.close()
        raise
    return Connection(connection, command_reader())
