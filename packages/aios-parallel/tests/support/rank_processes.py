"""Ranks as real processes: each makes the calls it is told on a communicator of its own, and hands back what they gave.

A server that has imported torch once forks them, so that a group starts in a fraction of a second. Plain bytes go
through the pipes: torch's own way of passing tensors between processes would leave files in `/dev/shm` for a while.
"""

from __future__ import annotations

import ctypes
import io
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "rank_processes"])


@dataclass
class Outcome:
    """What a call gave: a value or an error, after so many seconds."""

    value: Any = None
    error: Exception | None = None
    seconds: float = 0.0


class RankProcesses:
    """`size` ranks of a group; `connect(rank=…, size=…, **options)` makes a rank's communicator in its process."""

    def __init__(self, connect: Callable[..., Any], size: int, **options: Any) -> None:
        pipes = [_context.Pipe() for _ in range(size)]
        self.size = size
        self._pipes = [ours for ours, _ in pipes]
        self.processes = [
            _context.Process(
                target=_serve, args=(theirs, connect, {"rank": rank, "size": size, **options}), daemon=True
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()
        for rank in range(size):
            outcome = self.result(rank)
            if outcome.error is not None:
                self.end()
                raise outcome.error

    def begin(self, rank: int, call: str, *args: Any, **kwargs: Any) -> None:
        """Tells a rank to make a call; its outcome is to be taken with `result`."""
        self._pipes[rank].send_bytes(_packed((call, args, kwargs)))

    def result(self, rank: int) -> Outcome:
        """The outcome of a rank's next call."""
        assert self._pipes[rank].poll(60), f"rank {rank} is silent"
        return _unpacked(self._pipes[rank].recv_bytes())

    def all(self, call: str, arguments: Sequence[tuple[Any, ...]] | None = None, **kwargs: Any) -> list[Any]:
        """The same call on all ranks, each with its arguments: their values."""
        for rank in range(self.size):
            self.begin(rank, call, *(arguments[rank] if arguments else ()), **kwargs)
        outcomes = [self.result(rank) for rank in range(self.size)]
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        if errors:
            raise errors[0]
        return [outcome.value for outcome in outcomes]

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to a rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def end(self) -> None:
        """Ends the processes, stopped ones too."""
        for process, pipe in zip(self.processes, self._pipes, strict=True):
            pipe.close()
            process.kill()
        for process in self.processes:
            process.join()


def _serve(pipe: Connection, connect: Callable[..., Any], options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    communicator = None

    def join() -> None:
        nonlocal communicator
        communicator = connect(**options)

    pipe.send_bytes(_packed(_outcome(join)))
    with suppress(EOFError, OSError):
        while True:
            call, args, kwargs = _unpacked(pipe.recv_bytes())
            function = partial(_EXTRA[call], communicator) if call in _EXTRA else getattr(communicator, call)
            pipe.send_bytes(_packed(_outcome(partial(function, *args, **kwargs))))


def _outcome(function: Callable[[], Any]) -> Outcome:
    started = time.perf_counter()
    try:
        return Outcome(value=function(), seconds=time.perf_counter() - started)
    except Exception as error:
        error.__cause__ = None
        return Outcome(error=error, seconds=time.perf_counter() - started)


def _native(communicator: Any, x: Tensor) -> tuple[Tensor, bool]:
    reduce = communicator.native_reduce
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(reduce.function)
    function(reduce.context, x.data_ptr(), x.numel())
    return x, reduce.failed()


def _read(communicator: Any, *names: str) -> list[Any]:
    return [getattr(communicator, name) for name in names]


def _abort_after(communicator: Any, seconds: float) -> None:
    threading.Timer(seconds, communicator.abort).start()


def _watch(communicator: Any, seconds: float) -> list[bool]:
    """Waits at a barrier, and what `waiting` says to another thread before, during and after."""
    seen = [communicator.waiting]
    watcher = threading.Timer(seconds, lambda: seen.append(communicator.waiting))
    watcher.start()
    communicator.barrier()
    watcher.join()
    return [*seen, communicator.waiting]


def _burst(communicator: Any, count: int, *sizes: int) -> list[Tensor]:
    """Many sums in a row, of whatever sizes: element i of sum k is rank + k + i, in float64."""
    sums = []
    for step in range(count):
        x = torch.arange(sizes[step % len(sizes)], dtype=torch.float64) + communicator.rank + step
        sums.append(communicator.all_reduce(x))
    return sums


def _relay(communicator: Any, count: int, numel: int) -> float:
    """A pipeline's stage: takes micro-batches from the rank below, adds one, hands them on; the last returns a sum."""
    rank, last, total = communicator.rank, communicator.size - 1, 0.0
    for step in range(count):
        x = torch.full((numel,), float(step))
        if rank > 0:
            communicator.receive(x, source=rank - 1)
        x += 1
        if rank < last:
            communicator.send(x, to=rank + 1)
        total += float(x.double().sum())
    return total


def _sleep(communicator: Any, seconds: float) -> None:
    time.sleep(seconds)


_EXTRA: dict[str, Callable[..., Any]] = {
    "abort_after": _abort_after,
    "burst": _burst,
    "native": _native,
    "read": _read,
    "relay": _relay,
    "sleep": _sleep,
    "watch": _watch,
}


def _packed(message: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(message, buffer)
    return buffer.getvalue()


def _unpacked(message: bytes) -> Any:
    return torch.load(io.BytesIO(message), weights_only=False)
