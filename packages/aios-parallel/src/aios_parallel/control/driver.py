"""The driver's end of a group of ranks: tells them what to do, and notices when one of them is gone.

A thread reads what the ranks send, and their silence. Everything else happens on the caller's thread.
"""

from __future__ import annotations

import logging
import selectors
import socket
import struct
import threading
import time
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from aios_model.errors import ConfigError
from aios_parallel.control.connection import ConnectionLostError
from aios_parallel.control.messages import Answer, Beat, Call, Failure, Progress, encode_frame
from aios_parallel.errors import RankFailedError, WireError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    from aios_parallel.control.connection import Connection
    from aios_parallel.control.messages import Command, Event

    News: TypeAlias = tuple[int, Event] | None  # None: the group is lost

logger = logging.getLogger(__name__)

SILENCE_SECONDS = 4.0
"""How long a rank may give no sign, or make no progress with a step, before it counts as lost."""

SETUP_SILENCE_SECONDS = 120.0
"""The same while it is set up: importing and packing hold the interpreter for seconds."""


class RankGroup:
    """The ranks of one engine.

    Args:
        connections: To each rank, in order.
        end_processes: Ends the processes that this host started; called when the group is lost or closed, perhaps
            twice and by two threads.
        describe_rank: A few words on where a rank is, for messages.
        silence: Seconds after which a rank counts as lost.
    """

    def __init__(
        self,
        connections: Sequence[Connection],
        *,
        end_processes: Callable[[], None] = lambda: None,
        describe_rank: Callable[[int], str] = lambda rank: f"rank {rank}",
        silence: float = SILENCE_SECONDS,
    ) -> None:
        self._connections = list(connections)
        self._end_processes = end_processes
        self._describe_rank = describe_rank
        self._silence = silence
        self._inbox: SimpleQueue[News] = SimpleQueue()
        self._watch = [_Watch() for _ in connections]
        self._is_set_up = False
        self._failure: str | None = None
        self._failure_is_expected = False
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._read, name="aios-ranks", daemon=True)
        self._thread.start()

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self._connections)

    def check(self) -> None:
        """Raises RankFailedError if the group is lost."""
        if self._failure is not None:
            raise self._error()

    def call(
        self, name: str, arguments: Sequence[dict[str, Any]], report: Callable[[str, float | None], None]
    ) -> list[Any]:
        """Runs a function on all ranks side by side; returns the results in their order.

        Args:
            name: Of the function.
            arguments: One set for each rank.
            report: Told of the first rank's progress.

        Raises:
            ParallelError, ConfigError: A rank failed, with its words.
        """
        for rank, each in enumerate(arguments):
            self._send(rank, encode_frame(Call(name, each)))
        answers: dict[int, Any] = {}
        while len(answers) < self.size:
            rank, event = self.next_event()
            if isinstance(event, Answer):
                answers[rank] = event.result
            elif isinstance(event, Progress) and rank == 0:
                report(event.stage, event.fraction)
        return [answers[rank] for rank in range(self.size)]

    def call_rank(self, rank: int, name: str, arguments: dict[str, Any]) -> Any:
        """Runs a function on one rank only; errors as of `call`."""
        self._send(rank, encode_frame(Call(name, arguments)))
        while True:
            sender, event = self.next_event()
            if sender == rank and isinstance(event, Answer):
                return event.result

    def start_steps(self) -> None:
        """From now on a silent rank is lost within seconds."""
        for watch in self._watch:
            watch.restart()
        self._is_set_up = True

    def send(self, command: Command) -> None:
        """Sends one command to all ranks; RankFailedError if one is gone."""
        self.check()
        frame = encode_frame(command)
        for rank in range(self.size):
            self._send(rank, frame)

    def next_event(self, timeout: float | None = None) -> tuple[int, Event]:
        """Waits for what a rank says: its number, and the event.

        Raises:
            RankFailedError: The group is lost.
            TimeoutError: Nothing came in time.
        """
        try:
            news = self._inbox.get(timeout=timeout)
        except Empty as error:
            raise TimeoutError from error
        if news is None:
            self._inbox.put(None)  # for the next caller
            raise self._error()
        return news

    def lose(self, reason: str, *, is_expected: bool = False) -> None:
        """Gives the group up: every later call raises RankFailedError with `reason`, and no process is left behind."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure, self._failure_is_expected = reason, is_expected
        if not self._closed:
            logger.error("the rank group is lost: %s", reason)
        self._inbox.put(None)
        self._hang_up()

    def close(self) -> None:
        """Ends all ranks; calling it twice is fine."""
        self._closed = True
        self.lose("it was closed")
        self._end_processes()  # perhaps it was lost a moment ago, and the reading thread is still at it

    def _hang_up(self) -> None:
        for connection in self._connections:
            connection.close()
        self._end_processes()

    def _error(self) -> Exception:
        message = self._failure or "the group is lost"
        return ConfigError(message) if self._failure_is_expected and not self._is_set_up else RankFailedError(message)

    def _send(self, rank: int, frame: bytes) -> None:
        try:
            self._connections[rank].send_frame(frame)
        except ConnectionLostError as error:
            self.lose(f"{self._describe_rank(rank)} is gone ({error})")
            raise self._error() from error

    # -- the reading thread --------------------------------------------------------------------------------------------

    def _read(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, connection in enumerate(self._connections):
                _limit_sending(connection, SETUP_SILENCE_SECONDS)
                selector.register(connection.fileno(), selectors.EVENT_READ, rank)
            while self._failure is None:
                for key, _ in selector.select(timeout=0.25):
                    self._take(key.data)
                self._look_for_silence()

    def _take(self, rank: int) -> None:
        try:
            events = self._connections[rank].take()
        except (ConnectionLostError, WireError) as error:
            self.lose(f"{self._describe_rank(rank)} is gone ({error})")
            return
        for event in events:
            self._watch[rank].beat()
            if isinstance(event, Beat):
                self._watch[rank].note(event)
            elif isinstance(event, Failure):
                self.lose(f"{self._describe_rank(rank)}: {event.message}", is_expected=event.is_expected)
            else:
                self._inbox.put((rank, event))

    def _look_for_silence(self) -> None:
        limit = self._silence if self._is_set_up else max(self._silence, SETUP_SILENCE_SECONDS)
        for rank, watch in enumerate(self._watch):
            if self._failure is not None:
                return
            if watch.seconds_silent > limit:
                self.lose(f"{self._describe_rank(rank)} gave no sign of life for {limit:g} s")
        # Ranks wait for each other: one that hangs stops all. So it is their common progress that counts.
        if self._is_set_up and all(watch.is_busy for watch in self._watch):
            still = min(watch.seconds_still for watch in self._watch)
            if still > limit:
                stuck = max(range(self.size), key=lambda rank: self._watch[rank].seconds_still)
                self.lose(f"no rank made progress for {limit:g} s; {self._describe_rank(stuck)} stopped first")


class _Watch:
    """When a rank was last heard of, and when it last made progress."""

    def __init__(self) -> None:
        self.is_busy = False
        self._progress = -1
        self._heard = self._moved = time.monotonic()

    def restart(self) -> None:
        """What it did so far, loading for minutes perhaps, says nothing about the steps to come."""
        self.is_busy = False
        self._heard = self._moved = time.monotonic()

    def beat(self) -> None:
        self._heard = time.monotonic()

    def note(self, beat: Beat) -> None:
        if beat.progress != self._progress or not beat.busy:
            self._moved = time.monotonic()
        self._progress, self.is_busy = beat.progress, beat.busy

    @property
    def seconds_silent(self) -> float:
        return time.monotonic() - self._heard

    @property
    def seconds_still(self) -> float:
        return time.monotonic() - self._moved


def _limit_sending(connection: Connection, seconds: float) -> None:
    """A rank that reads no more must not block the driver for ever."""
    timeval = struct.pack("ll", int(seconds), 0)
    with socket.socket(fileno=socket.dup(connection.fileno())) as duplicate:
        duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
