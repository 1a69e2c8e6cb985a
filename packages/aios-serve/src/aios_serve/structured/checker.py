"""Whether constraints can be honoured, found out before a request is taken: within seconds, whatever they are.

They are compiled by `worker.py` processes, which are killed when they take too long. No torch.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from aios_model.errors import InvalidRequestError
from aios_sched.errors import QueueFullError
from aios_serve.structured.errors import CheckerLostError, GrammarError
from aios_serve.structured.wire import Verdict, receive_frame, send_frame

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aios_model.sampling.params import SamplingParams
    from aios_model.sampling.structured import StructuredOutputsParams
    from aios_serve.structured.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

WORKER_COMMAND = (sys.executable, "-m", "aios_serve.structured.worker")
NUM_WORKERS = 2
MAX_WAITING = 64
MAX_VERDICTS = 4096
"""Verdicts that are remembered, under 200 bytes each: under a digest, not the text."""
_FLEETING_SECONDS = 60.0
"""How long a verdict holds that may be due to a busy machine rather than to the constraint."""
_START_SECONDS = 60.0


class GrammarChecker:
    """Compiles constraints in processes of their own, and remembers what became of them.

    Processes start with the first constraint, and leave with this one. Thread-safe.

    Args:
        read_vocabulary: The model's vocabulary; called once a process is needed.
        timeout: Seconds that a constraint may take to compile.
        command: What to run; `--fd N` is appended.
    """

    def __init__(
        self,
        read_vocabulary: Callable[[], Vocabulary],
        *,
        timeout: float,
        command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self._read_vocabulary = read_vocabulary
        self._timeout = timeout
        self._command = tuple(command)
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[bytes, _Remembered] = OrderedDict()
        self._waiting: dict[bytes, Future[Verdict]] = {}
        self._threads = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="aios-grammar")
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        self._running: set[_Worker] = set()
        self._closed = False
        for _ in range(NUM_WORKERS):
            self._idle.put(None)

    def check(self, constraint: StructuredOutputsParams) -> None:
        """Waits for the verdict.

        Raises:
            GrammarError: It cannot be compiled, or not in time.
            QueueFullError: Too many constraints wait to be compiled.
            CheckerLostError: The process that compiles cannot be started.
        """
        verdict = self._ask(constraint)
        _raise_from(verdict.result() if isinstance(verdict, Future) else verdict, constraint)

    async def check_soon(self, constraint: StructuredOutputsParams) -> None:
        """As `check`, from an event loop."""
        verdict = self._ask(constraint)
        if isinstance(verdict, Future):
            # Others may wait for the same verdict: it comes even if this one goes away.
            verdict = await asyncio.shield(asyncio.wrap_future(verdict))
        _raise_from(verdict, constraint)

    def close(self) -> None:
        """Ends the processes, and with them what waits. Calling it twice is fine."""
        with self._lock:
            self._closed = True
            running, waiting = list(self._running), list(self._waiting.values())
        for future in waiting:
            future.cancel()
        for worker in running:
            worker.kill()
        self._threads.shutdown(wait=False, cancel_futures=True)
        with suppress(queue.Empty):
            while True:
                _close(self._idle.get_nowait())  # those that are busy are closed by the thread that waits for them

    def _ask(self, constraint: StructuredOutputsParams) -> Verdict | Future[Verdict]:
        key = hashlib.sha256(msgspec.msgpack.encode(constraint)).digest()
        with self._lock:
            remembered = self._verdicts.get(key)
            if remembered is not None and remembered.until > time.monotonic():
                self._verdicts.move_to_end(key)
                return remembered.verdict
            if key in self._waiting:
                return self._waiting[key]
            if self._closed:
                raise CheckerLostError("the engine is closed; make a new one")
            if len(self._waiting) >= MAX_WAITING:
                raise QueueFullError(f"{MAX_WAITING} structured outputs wait to be compiled already; try again later")
            future = self._waiting[key] = self._threads.submit(self._judge, key, constraint)
            return future

    def _judge(self, key: bytes, constraint: StructuredOutputsParams) -> Verdict:
        worker = self._idle.get()
        try:
            worker = worker or self._start()
            remembered = _Remembered(worker.ask(constraint, self._timeout), math.inf)
        except TimeoutError:
            remembered, worker = self._give_up(worker, f"takes longer than {self._timeout:g} s to compile"), None
        except (ConnectionError, msgspec.DecodeError):
            remembered, worker = self._give_up(worker, "is too deep or too large to compile"), None
        finally:
            if self._closed:
                _close(worker)
                worker = None
            self._idle.put(worker)
            with self._lock:
                self._waiting.pop(key, None)
        with self._lock:
            self._verdicts[key] = remembered
            if len(self._verdicts) > MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        return remembered.verdict

    def _start(self) -> _Worker:
        try:
            worker = _Worker(self._command, self._read_vocabulary())
        except (OSError, ConnectionError) as error:
            message = f"the process that compiles structured outputs cannot be started: {error}"
            raise CheckerLostError(message) from error
        with self._lock:
            self._running.add(worker)
            closed = self._closed
        if closed:
            worker.kill()
        return worker

    def _give_up(self, worker: _Worker | None, what: str) -> _Remembered:
        if worker is not None:
            _close(worker)
            with self._lock:
                self._running.discard(worker)
        if not self._closed:
            logger.warning("a structured output %s; it was refused, and the process ended", what)
        return _Remembered(Verdict(f"{what}; simplify it"), time.monotonic() + _FLEETING_SECONDS)


def check_can_end(params: SamplingParams, eos_token_ids: Sequence[int]) -> None:
    """Refuses constrained outputs that could be completed, and never ended.

    Raises:
        InvalidRequestError: The model has no end-of-sequence token, or `allowed_token_ids` leaves them all out.
    """
    if not eos_token_ids:
        raise InvalidRequestError(
            "structured_outputs cannot be honoured: this model has no end-of-sequence token", param="structured_outputs"
        )
    allowed, ends = params.allowed_token_ids, {*eos_token_ids, *params.stop_token_ids}
    if allowed is not None and ends.isdisjoint(allowed):
        raise InvalidRequestError(
            "allowed_token_ids leaves no token that could end a structured output; add the end-of-sequence token, "
            f"which is {eos_token_ids[0]}",
            param="allowed_token_ids",
        )


class _Remembered(NamedTuple):
    """A verdict, and until when (`time.monotonic()`) it holds."""

    verdict: Verdict
    until: float


class _Worker:
    """A process, from its start to its end."""

    def __init__(self, command: Sequence[str], vocabulary: Vocabulary) -> None:
        self._connection, theirs = socket.socketpair()
        with theirs:
            arguments = [*command, "--fd", str(theirs.fileno())]
            self._process = subprocess.Popen(arguments, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        try:
            self._connection.settimeout(_START_SECONDS)
            send_frame(self._connection, vocabulary)
            receive_frame(self._connection)
        except OSError:
            self.close()
            raise

    def ask(self, constraint: StructuredOutputsParams, timeout: float) -> Verdict:
        """Raises TimeoutError, or ConnectionError if the process has ended."""
        self._connection.settimeout(timeout)
        send_frame(self._connection, constraint)
        return msgspec.msgpack.decode(receive_frame(self._connection), type=Verdict)

    def kill(self) -> None:
        """Ends it at once, and with it the wait of whoever asked."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """As `kill`, when nobody waits."""
        self.kill()
        self._connection.close()


def _close(worker: _Worker | None) -> None:
    if worker is not None:
        worker.close()


def _raise_from(verdict: Verdict, constraint: StructuredOutputsParams) -> None:
    if verdict.error is not None:
        text = verdict.error
        if not text.startswith(constraint.param):
            text = f"{constraint.param} {text}"
        raise GrammarError(text, param=constraint.param)
