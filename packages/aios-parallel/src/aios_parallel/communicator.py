"""How ranks exchange tensors: the one socket behind which every transport sits, and what it counts.

Parallel layers call a `Communicator` and nothing else, so that every byte between ranks is explicit, counted and timed.
Sums are made in the order of the ranks, wherever an element lies: all ranks get the same bits, and a token's numbers do
not depend on the other tokens of its step.

    `SoloCommunicator`          one rank, nothing to do
    `ThreadCommunicator`        ranks as threads of one process, for tests and for the course  (`thread_group.py`)
    `SharedMemoryCommunicator`  processes on one host's CPUs                                   (`shared_memory.py`)
    `TorchCommunicator`         torch.distributed: gloo between hosts, nccl on GPUs            (`torch_group.py`)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from aios_parallel.errors import CollectiveTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from aios_parallel.tracing.span_ring import SpanRing


class Communicator(Protocol):
    """A group of ranks as one of them sees it.

    Calls are collective: all ranks of the group make the same ones in the same order, with contiguous tensors of the
    same shape and dtype. `send` and `receive` are the exception: they pair two ranks.

    Errors of every call: CollectiveTimeoutError if another rank does not come in time.
    """

    @property
    def rank(self) -> int:
        """Of the caller, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    @property
    def traffic(self) -> Traffic:
        """What was exchanged so far."""
        ...

    @property
    def native_reduce(self) -> NativeReduce | None:
        """`all_reduce` of float32 as a C function, for steps that run in native code; None if there is none."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """Replaces `x` by the sum over all ranks, added up in their order; returns `x`."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' `x`, stacked in their order: [...] -> [size, ...]."""
        ...

    def gather(self, x: Tensor, *, to: int = 0) -> Tensor | None:
        """As `all_gather`, for one rank only; the others get None."""
        ...

    def broadcast(self, x: Tensor, *, source: int = 0) -> Tensor:
        """Overwrites `x` with that of rank `source`; returns `x`."""
        ...

    def send(self, x: Tensor, *, to: int) -> None:
        """Hands `x` to rank `to`, which receives it; `x` may be changed once this returns."""
        ...

    def receive(self, out: Tensor, *, source: int) -> Tensor:
        """Waits for a tensor from rank `source` and writes it to `out`; returns `out`."""
        ...

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        ...

    def trace(self, ring: SpanRing | None) -> None:
        """Records every exchange of this rank in `ring` from now on; None for none.

        For the thread that makes the calls, between two of them. With nccl a span ends when the work is queued.
        """
        ...

    def close(self) -> None:
        """Lets go of the group; calling it twice is fine."""
        ...


@dataclass(frozen=True, slots=True)
class NativeReduce:
    """A C function `void reduce(void* context, float* values, int64_t count)`: sums over ranks, in place.

    Attributes:
        function: Its address.
        context: Its first argument, an address; valid until the communicator is closed.
        failed: Whether an earlier call gave up on the other ranks: its sums, and all later ones, are not to be used.
    """

    function: int
    context: int
    failed: Callable[[], bool]

    def check(self) -> None:
        """Raises CollectiveTimeoutError if a call gave up."""
        if self.failed():
            raise CollectiveTimeoutError("another rank did not come to a sum of this step")


@dataclass(slots=True)
class Traffic:
    """What a rank exchanged with others.

    Attributes:
        calls: Number of collectives and transfers.
        num_bytes: Bytes of the tensors that the rank gave to them.
        seconds: Time spent in them, waiting for other ranks included.
    """

    calls: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


class SoloCommunicator:
    """A group of one: nothing is exchanged."""

    rank = 0
    size = 1
    native_reduce = None

    def __init__(self) -> None:
        self.traffic = Traffic()

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Communicator."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """See Communicator."""
        return x.unsqueeze(0)

    def gather(self, x: Tensor, *, to: int = 0) -> Tensor | None:
        """See Communicator."""
        return x.unsqueeze(0)

    def broadcast(self, x: Tensor, *, source: int = 0) -> Tensor:
        """See Communicator."""
        return x

    def send(self, x: Tensor, *, to: int) -> None:
        """Refused: there is nobody else."""
        raise ValueError(f"a group of one has no rank {to} to send to")

    def receive(self, out: Tensor, *, source: int) -> Tensor:
        """Refused: there is nobody else."""
        raise ValueError(f"a group of one has no rank {source} to receive from")

    def barrier(self) -> None:
        """See Communicator."""

    def trace(self, ring: SpanRing | None) -> None:
        """See Communicator."""

    def close(self) -> None:
        """See Communicator."""
