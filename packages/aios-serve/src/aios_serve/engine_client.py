"""The caller's end of the connection to an engine: a process of its own, or a thread of this one."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, cast

from aios_model.errors import ConfigError
from aios_serve.channel import QueueChannel
from aios_serve.messages import FrameBuffer, FrameError, decode_event, encode_frame

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aios_serve.channel import EngineChannel
    from aios_serve.messages import Command, Event

logger = logging.getLogger(__name__)

ENGINE_COMMAND = (sys.executable, "-m", "aios_serve.engine_process")
_EXIT_REASON_SECONDS = 0.5
_LEAVE_SECONDS = 5.0
_KILL_SECONDS = 5.0


class EngineClient(Protocol):
    """A connection to one engine. Everything happens on the event loop that called `connect`.

    Attributes:
        can_be_killed: Whether `close` ends it whatever it does.
    """

    can_be_killed: bool

    async def connect(self, on_event: Callable[[Event], None], on_lost: Callable[[str], None]) -> None:
        """Start the engine; from then on tell about its events, and once, with the reason, when it is gone."""
        ...

    def send(self, command: Command) -> None:
        """Hand over a command; FrameError if it is too large. Dropped if the engine is gone."""
        ...

    def is_alive(self) -> bool:
        """Whether the process or thread exists."""
        ...

    async def close(self, grace: float = _LEAVE_SECONDS) -> None:
        """Make it leave, by itself within `grace` seconds or by force, and wait until it has left."""
        ...


class ProcessClient:
    """Spawns the engine process and talks to it over an inherited socket pair.

    The process leads a process group of its own, so that whatever it started is ended with it.

    Args:
        command: What to run; `--fd N` is appended.
        environment: Variables to set for it, beside those of this process.
    """

    can_be_killed = True

    def __init__(
        self, command: Sequence[str] = ENGINE_COMMAND, *, environment: Mapping[str, str] | None = None
    ) -> None:
        self._command = tuple(command)
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int | None:
        """Of the engine process."""
        return self._process.pid if self._process else None

    async def connect(self, on_event: Callable[[Event], None], on_lost: Callable[[str], None]) -> None:
        """See EngineClient."""
        if os.name == "nt":
            raise ConfigError("engine_process=True cannot be used on Windows; use engine_process=False")
        ours, theirs = socket.socketpair()
        with theirs:
            command = (*self._command, "--fd", str(theirs.fileno()))
            self._process = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                process_group=0,
                env=os.environ | self._environment,
            )
        self._on_lost = on_lost
        transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: _EventProtocol(on_event, self._lose), sock=ours
        )
        self._transport = cast("asyncio.WriteTransport", transport)

    def send(self, command: Command) -> None:
        """See EngineClient."""
        frame = encode_frame(command)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    def is_alive(self) -> bool:
        """See EngineClient."""
        return self._process is not None and self._process.poll() is None

    async def close(self, grace: float = _LEAVE_SECONDS) -> None:
        """See EngineClient. Closing the socket ends its loop after the step at hand; then its group is killed."""
        if self._transport is not None:
            self._transport.abort()  # `close` would wait for a stopped process to read what is on its way
        process = self._process
        if process is None:
            return
        if not await _exited(process, grace):
            logger.warning("the engine process %d did not leave in %g s and is killed", process.pid, grace)
        _kill_group(process.pid)
        if not await _exited(process, _KILL_SECONDS):
            logger.error("the engine process %d is still there %g s after SIGKILL", process.pid, _KILL_SECONDS)
        await asyncio.sleep(0)  # lets the closed transport report its end
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _lose(self, reason: str | None) -> None:
        task = asyncio.get_running_loop().create_task(self._report_loss(reason))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _report_loss(self, reason: str | None) -> None:
        process = self._process
        if reason is None and process is not None and await _exited(process, _EXIT_REASON_SECONDS):
            reason = _exit_reason(process.returncode)
        self._on_lost(reason or "the engine process closed its connection")


class ThreadClient:
    """Runs the engine in a daemon thread of this process, through the same messages, not encoded.

    Args:
        serve: What the thread does with its end of the channel.
    """

    can_be_killed = False

    def __init__(self, serve: Callable[[EngineChannel], object]) -> None:
        self._serve = serve
        self._channel: QueueChannel | None = None
        self._thread: threading.Thread | None = None

    async def connect(self, on_event: Callable[[Event], None], on_lost: Callable[[str], None]) -> None:
        """See EngineClient."""
        loop = asyncio.get_running_loop()

        def call(callback: Callable[..., None], *arguments: object) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(callback, *arguments)

        def run(channel: QueueChannel) -> None:
            try:
                self._serve(channel)
            finally:
                call(on_lost, "the engine thread ended")

        self._channel = QueueChannel(lambda event: call(on_event, event))
        self._thread = threading.Thread(target=run, args=(self._channel,), name="aios-engine", daemon=True)
        self._thread.start()

    def send(self, command: Command) -> None:
        """See EngineClient."""
        if self._channel is not None:
            self._channel.put(command)

    def is_alive(self) -> bool:
        """See EngineClient."""
        return self._thread is not None and self._thread.is_alive()

    async def close(self, grace: float = _LEAVE_SECONDS) -> None:
        """See EngineClient. A thread cannot be killed: one that is stuck is left behind, as a daemon."""
        if self._channel is None or self._thread is None:
            return
        self._channel.close()
        await asyncio.to_thread(self._thread.join, grace)


class _EventProtocol(asyncio.Protocol):
    """Bytes from the engine process into events."""

    def __init__(self, on_event: Callable[[Event], None], on_lost: Callable[[str | None], None]) -> None:
        self._on_event = on_event
        self._on_lost = on_lost
        self._buffer = FrameBuffer()
        self._reason: str | None = None
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            events = [decode_event(body) for body in self._buffer.feed(data)]
        except FrameError as error:
            self._reason = f"the engine process sent something that is no message: {error}"
            if self._transport is not None:
                self._transport.close()
            return
        for event in events:
            self._on_event(event)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost(self._reason)


async def _exited(process: subprocess.Popen[bytes], timeout: float) -> bool:
    """Wait without blocking the event loop, and without the child watchers that differ between event loops."""
    deadline = asyncio.get_running_loop().time() + timeout
    while process.poll() is None:
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


def _kill_group(process_id: int) -> None:
    """Kill a process and all it started. Its number names the group as long as one of them is there."""
    with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
        os.killpg(process_id, signal.SIGKILL)


def _exit_reason(returncode: int) -> str:
    if returncode >= 0:
        return f"the engine process ended with status {returncode}"
    name = signal.Signals(-returncode).name if -returncode in signal.valid_signals() else str(-returncode)
    hint = " (perhaps for want of memory)" if name == "SIGKILL" else ""
    return f"the engine process was killed by {name}{hint}"
