"""A rank in a process of its own: `python -m aios_serve.rank_process --rank R`.

It reaches its driver by `--fd N`, `--connect HOST:PORT` or `--torchrun`. Started by the engine process, torchrun or
Ray, not by hand. It leaves when its driver does.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

from aios_model.errors import AiosError, ConfigError
from aios_parallel.control.connection import Connection
from aios_parallel.control.messages import Progress, command_reader
from aios_parallel.launch.listening import connect_to_driver
from aios_parallel.launch.torchrun import TorchrunPlace, find_driver
from aios_serve.launching import TOKEN_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Sequence

DRIVER_SECONDS = 600.0

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the driver named on the command line; returns the exit status."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # the driver decides what an interrupt of the terminal means
    parser = argparse.ArgumentParser(prog="python -m aios_serve.rank_process", description=__doc__)
    parser.add_argument("--rank", type=int, required=True, help="number of this rank, from 0")
    parser.add_argument("--fd", type=int, help="an inherited, connected stream socket")
    parser.add_argument(
        "--connect", metavar="HOST:PORT", help=f"where the driver listens; {TOKEN_VARIABLE} has the token"
    )
    parser.add_argument("--torchrun", action="store_true", help="find the driver in torchrun's store")
    parser.add_argument("--log-level", default="info")
    given = parser.parse_args(arguments)
    logging.basicConfig(
        level=given.log_level.upper(), format=f"%(asctime)s %(levelname)s rank {given.rank}: %(message)s"
    )
    try:
        return serve(_connect(given))
    except AiosError as error:
        logger.error("%s", error)
        return 1


def serve(connection: Connection) -> int:
    """Imports torch, and serves a driver until it leaves."""
    from aios_parallel.control.rank_loop import serve_rank

    connection.send(Progress("importing torch"))
    started = time.perf_counter()
    from aios_serve.served_rank import ServedRank

    return serve_rank(connection, ServedRank(import_seconds=time.perf_counter() - started))


def _connect(given: argparse.Namespace) -> Connection:
    if given.fd is not None:
        return Connection(socket.socket(fileno=given.fd), command_reader())
    token = os.environ.get(TOKEN_VARIABLE, "")
    if given.torchrun:
        place = TorchrunPlace.from_environment(os.environ)
        if place is None:
            raise ConfigError("--torchrun needs a process that torchrun has started")
        return find_driver(place, token=token, timeout=DRIVER_SECONDS)
    host, _, port = (given.connect or "").rpartition(":")
    if not port.isdecimal():
        raise ConfigError(f"--connect={given.connect!r} cannot be used: write HOST:PORT")
    return connect_to_driver((host, int(port)), token, rank=given.rank)


if __name__ == "__main__":
    sys.exit(main())
