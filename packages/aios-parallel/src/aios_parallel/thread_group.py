"""A group whose ranks are threads of one process: quick to start, easy to step through in a debugger.

For the course and for tests: what a rank computes and exchanges is what it would be in a process of its own, but for
the interpreter lock, which the threads share.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

from aios_parallel.communicator import Traffic
from aios_parallel.errors import CollectiveTimeoutError
from aios_parallel.tracing.clock import now
from aios_parallel.tracing.exchange_meter import ExchangeMeter
from aios_parallel.tracing.span_ring import ExchangeKind, SpanRing

T = TypeVar("T")


class ThreadGroup:
    """What the threads of a group share.

    Args:
        size: Number of ranks.
        timeout: Seconds a rank waits for the others.
    """

    def __init__(self, size: int, *, timeout: float = 60.0) -> None:
        self.size = size
        self.timeout = timeout
        self.slots: list[Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout)
        self.queues = {(a, b): SimpleQueue[Tensor]() for a in range(size) for b in range(size) if a != b}

    def communicators(self) -> list[ThreadCommunicator]:
        """One for each rank."""
        return [ThreadCommunicator(self, rank) for rank in range(self.size)]


class ThreadCommunicator:
    """A rank's view of a ThreadGroup; see Communicator."""

    native_reduce = None

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self._group = group
        self.rank = rank
        self.size = group.size
        self._meter = ExchangeMeter()

    @property
    def traffic(self) -> Traffic:
        """See Communicator."""
        return self._meter.traffic

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Communicator."""
        started = now()
        stacked = self._exchange(x)
        total = stacked[0].clone()
        for other in stacked[1:]:
            total += other
        x.copy_(total)
        self._meter.note(ExchangeKind.ALL_REDUCE, x, started)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """See Communicator."""
        started = now()
        gathered = torch.stack(self._exchange(x))
        self._meter.note(ExchangeKind.ALL_GATHER, x, started)
        return gathered

    def gather(self, x: Tensor, *, to: int = 0) -> Tensor | None:
        """See Communicator."""
        started = now()
        gathered = torch.stack(self._exchange(x))
        self._meter.note(ExchangeKind.GATHER, x, started, peer=to)
        return gathered if self.rank == to else None

    def broadcast(self, x: Tensor, *, source: int = 0) -> Tensor:
        """See Communicator."""
        started = now()
        x.copy_(self._exchange(x)[source])
        self._meter.note(ExchangeKind.BROADCAST, x, started, peer=source)
        return x

    def send(self, x: Tensor, *, to: int) -> None:
        """See Communicator."""
        started = now()
        self._group.queues[self.rank, to].put(x.clone())
        self._meter.note(ExchangeKind.SEND, x, started, peer=to)

    def receive(self, out: Tensor, *, source: int) -> Tensor:
        """See Communicator."""
        started = now()
        try:
            out.copy_(self._group.queues[source, self.rank].get(timeout=self._group.timeout))
        except Empty as error:
            raise CollectiveTimeoutError(f"rank {source} sent nothing for {self._group.timeout:g} s") from error
        self._meter.note(ExchangeKind.RECEIVE, out, started, peer=source)
        return out

    def barrier(self) -> None:
        """See Communicator."""
        started = now()
        self._wait()
        self._meter.note(ExchangeKind.BARRIER, None, started)

    def trace(self, ring: SpanRing | None) -> None:
        """See Communicator."""
        self._meter.ring = ring

    def close(self) -> None:
        """See Communicator."""
        self._group.barrier.abort()

    def _exchange(self, x: Tensor) -> list[Tensor]:
        """Copies of all ranks' `x`."""
        group = self._group
        group.slots[self.rank] = x
        self._wait()
        copies = [slot.clone() for slot in group.slots if slot is not None]
        self._wait()
        return copies

    def _wait(self) -> None:
        try:
            self._group.barrier.wait()
        except threading.BrokenBarrierError as error:
            raise CollectiveTimeoutError("another rank did not come, or has left") from error


def run_ranks(size: int, work: Callable[[ThreadCommunicator], T], *, timeout: float = 60.0) -> list[T]:
    """Runs `work` once per rank, each in a thread of its own; raises what the first failing rank raised.

    Args:
        size: Number of ranks.
        work: Gets the rank's communicator.
        timeout: Seconds a rank waits for the others.
    """
    return run_threads([lambda each=each: work(each) for each in ThreadGroup(size, timeout=timeout).communicators()])


def run_threads(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Runs `calls` side by side and returns what they return; raises what one of them raised."""
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, CollectiveTimeoutError)), errors[0])
    return [results[index] for index in range(len(calls))]
