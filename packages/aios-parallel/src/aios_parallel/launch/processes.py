"""Ranks as processes of this host, started here: each inherits one end of a socket pair."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import threading
from typing import TYPE_CHECKING

from aios_parallel.control.connection import Connection
from aios_parallel.control.messages import event_reader

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

logger = logging.getLogger(__name__)

_LEAVE_SECONDS = 2.0


class RankProcesses:
    """Processes that this one started, and ends.

    Args:
        command: What runs a rank; `--fd N` is appended, N an inherited socket.
        environment: Of the processes; None for this one's.
    """

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> None:
        self._command = tuple(command)
        self._environment = environment
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()

    def start(self, rank: int) -> Connection:
        """Starts the process of `rank` and returns the connection to it."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._processes[rank] = subprocess.Popen(
                (*self._command, "--fd", str(theirs.fileno()), "--rank", str(rank)),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env=None if self._environment is None else dict(self._environment),
            )
        return Connection(ours, event_reader())

    def pid(self, rank: int) -> int | None:
        """Process id of `rank`; None if it was not started here."""
        process = self._processes.get(rank)
        return None if process is None else process.pid

    def describe(self, rank: int) -> str:
        """A rank in words: its process, and how that ended if it has."""
        process = self._processes.get(rank)
        if process is None:
            return f"rank {rank}"
        try:
            code = process.wait(0.2)  # a socket is closed a moment before its process has ended
        except subprocess.TimeoutExpired:
            return f"rank {rank} (process {process.pid})"
        ended = f"ended with status {code}" if code >= 0 else f"was killed by {_signal_name(-code)}"
        return f"rank {rank} (process {process.pid}, which {ended})"

    def end(self) -> None:
        """Ends all of them for certain; their sockets should be closed by now, which asks them to leave."""
        with self._lock:
            for process in self._processes.values():
                try:
                    process.wait(0 if process.poll() is not None else _LEAVE_SECONDS / len(self._processes))
                except subprocess.TimeoutExpired:
                    process.kill()
            for process in self._processes.values():
                process.wait()


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
