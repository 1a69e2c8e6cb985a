"""`SharedMemoryCommunicator`: ranks that are processes of one host exchange tensors through memory they share.

What costs gloo hundreds of microseconds a call takes 4 here (2,048 floats, two ranks): every rank writes to its slot,
raises a number on a cache line of its own, and looks at the numbers of the others. `native/csrc/group.h` does it.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from aios_model.native.cores import usable_cores
from aios_parallel.communicator import NativeReduce, Traffic
from aios_parallel.errors import CollectiveTimeoutError, ParallelError
from aios_parallel.native.structures import Counters, Status, parallel_address, parallel_function
from aios_parallel.segment_file import SegmentFile
from aios_parallel.tracing.span_ring import SpanRing

_TYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int32: 4,
    torch.int64: 5,
}
_MAX_RANKS = 64
_SPINS = 400  # some 20 µs; ranks that the system has put on one core need six times as long with 4,000
_SPINS_ON_SHARED_CORES = 40  # whom we wait for may be waiting for our core
_POLL = 0.0005


class SharedMemoryCommunicator:
    """A `Communicator` for the processes of one host, on tensors in its memory. Made by `open`.

    One thread makes the calls; another one may `abort`, and read `progress`, `waiting` and `traffic`. The first call
    that fails ends the group on all ranks: later ones fail at once.

    A send of up to `send_ahead` bytes does not wait for the receiver, a larger one does. So two ranks that send each
    other more than that at the same time wait for ever (until the timeout): let one of them receive first.
    """

    def __init__(self, file: SegmentFile, *, rank: int, size: int, timeout: float) -> None:
        self._counters = Counters()
        self._lock = threading.Lock()  # between `abort` and `close`
        self._ring: SpanRing | None = None  # native code writes to it
        self._timeout = timeout
        self.rank = rank
        self.size = size
        self.send_ahead: int = parallel_function("aios_segment_channel_bytes")(size)
        spins = _SPINS if size <= usable_cores() else _SPINS_ON_SHARED_CORES
        self._group: int | None = parallel_function("aios_group_attach")(
            file.descriptor, rank, size, spins, int(timeout * 1e9), ctypes.byref(self._counters)
        )
        if self._group is None:
            raise ParallelError(f"the system does not let rank {rank} map {file.path}: out of address space or memory")
        self._all_reduce = parallel_function("aios_all_reduce")
        self._gather = parallel_function("aios_gather")
        self._broadcast = parallel_function("aios_broadcast")
        self._send = parallel_function("aios_send")
        self._receive = parallel_function("aios_receive")
        self._barrier = parallel_function("aios_barrier")

    @classmethod
    def open(
        cls, path: Path | str, *, rank: int, size: int, timeout: float = 4.0, open_timeout: float = 60.0
    ) -> SharedMemoryCommunicator:
        """Joins the group, and returns once all its ranks have. Then the file is gone: nothing is left behind.

        Args:
            path: Of a file that does not exist yet, in `/dev/shm`, the same for all ranks and new in every run.
            rank: Of the caller, from 0.
            size: Number of ranks, at most 64.
            timeout: Seconds after which a rank that does not come to a call ends the group.
            open_timeout: Seconds to wait for all ranks to come here.

        Raises:
            NativeBuildError: There is no C++ compiler: use `TorchCommunicator` with gloo.
            CollectiveTimeoutError: Not all ranks came.
            ParallelError: The file cannot be used, or somebody else is this rank.
        """
        if not 1 <= size <= _MAX_RANKS or not 0 <= rank < size or not timeout > 0:
            raise ValueError(f"rank {rank} of {size} with a timeout of {timeout} s: need 0 <= rank < size <= 64, > 0 s")
        num_bytes = parallel_function("aios_segment_bytes")(size)
        file = SegmentFile.open(Path(path), size=size, num_bytes=num_bytes)
        try:
            group = cls(file, rank=rank, size=size, timeout=timeout)
            try:
                group._wait_for_all(file, open_timeout)
            except BaseException:
                group.close()
                raise
        finally:
            os.close(file.descriptor)
        return group

    @property
    def traffic(self) -> Traffic:
        """What was exchanged so far, by native code too; as of now."""
        counters = self._counters
        return Traffic(calls=counters.calls, num_bytes=counters.num_bytes, seconds=counters.nanoseconds / 1e9)

    @property
    def progress(self) -> int:
        """Number of calls that this rank has completed."""
        return self._counters.calls

    @property
    def waiting(self) -> bool:
        """Whether it is inside a call right now."""
        return self._counters.inside > 0

    @property
    def native_reduce(self) -> NativeReduce:
        """See Communicator."""
        address = parallel_address("aios_reduce")
        return NativeReduce(function=address, context=self._open_group(), failed=self._failed)

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Communicator. Floats of 16 bits are added up in float32 and rounded once; int32 and int64 work too."""
        kind = _TYPES.get(x.dtype)
        if kind is None:
            known = ", ".join(map(str, _TYPES))
            raise ValueError(f"all_reduce does not add up {x.dtype}; convert it to one of {known}")
        self._check(self._all_reduce(self._open_group(), _address(x), x.numel(), kind))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """See Communicator."""
        out = x.new_empty(self.size, *x.shape)
        self._check(self._gather(self._open_group(), _address(x), out.data_ptr(), x.nbytes, -1))
        return out

    def gather(self, x: Tensor, *, to: int = 0) -> Tensor | None:
        """See Communicator."""
        self._check_peer(to)
        out = x.new_empty(self.size, *x.shape) if to == self.rank else None
        address = None if out is None else out.data_ptr()
        self._check(self._gather(self._open_group(), _address(x), address, x.nbytes, to))
        return out

    def broadcast(self, x: Tensor, *, source: int = 0) -> Tensor:
        """See Communicator."""
        self._check_peer(source)
        self._check(self._broadcast(self._open_group(), _address(x), x.nbytes, source))
        return x

    def send(self, x: Tensor, *, to: int) -> None:
        """See Communicator; waits for the receiver if `x` is larger than `send_ahead`, or earlier sends fill that."""
        self._check_other(to)
        self._check(self._send(self._open_group(), _address(x), x.nbytes, to))

    def receive(self, out: Tensor, *, source: int) -> Tensor:
        """See Communicator."""
        self._check_other(source)
        self._check(self._receive(self._open_group(), _address(out), out.nbytes, source))
        return out

    def barrier(self) -> None:
        """See Communicator."""
        self._check(self._barrier(self._open_group()))

    def trace(self, ring: SpanRing | None) -> None:
        """See Communicator. Sums that native code asks for are recorded too."""
        parallel_function("aios_group_trace")(self._open_group(), None if ring is None else ctypes.byref(ring.header))
        self._ring = ring

    def abort(self) -> None:
        """Makes all calls of all ranks fail at once, those that wait included. Any thread may call it."""
        with self._lock:
            if self._group is not None:
                parallel_function("aios_group_abort")(self._group)

    def close(self) -> None:
        """See Communicator. Others that still wait for this rank fail at once."""
        with self._lock:
            group, self._group = self._group, None
        if group is not None:
            parallel_function("aios_group_detach")(group)

    def _wait_for_all(self, file: SegmentFile, timeout: float) -> None:
        present = parallel_function("aios_group_arrive")(self._group)
        if present >> self.rank & 1:
            raise ParallelError(f"{file.path} has a rank {self.rank}: every rank needs a number, every run a name")
        deadline = time.monotonic() + timeout
        everybody = (1 << self.size) - 1
        try:
            while (present := parallel_function("aios_group_attached")(self._group)) != everybody:
                if time.monotonic() > deadline:
                    raise CollectiveTimeoutError(
                        f"{_ranks(everybody & ~present)} of {self.size} did not open {file.path} within {timeout:g} s"
                    )
                time.sleep(_POLL)
        finally:
            file.unlink()

    def _open_group(self) -> int:
        if self._group is None:
            raise ParallelError(f"rank {self.rank} has closed this group")
        return self._group

    def _failed(self) -> bool:
        return self._counters.status != Status.DONE

    def _check(self, status: int) -> None:
        if status != Status.DONE:
            raise _error(self._counters, rank=self.rank, size=self.size, timeout=self._timeout)

    def _check_peer(self, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"a group of {self.size} has no rank {rank}")

    def _check_other(self, rank: int) -> None:
        self._check_peer(rank)
        if rank == self.rank:
            raise ValueError(f"rank {rank} cannot exchange a tensor with itself")


def _address(x: Tensor) -> int:
    if not x.is_cpu or not x.is_contiguous():
        raise ValueError(f"shared memory takes contiguous CPU tensors; this one is on {x.device}, strides {x.stride()}")
    return x.data_ptr()


def _error(counters: Counters, *, rank: int, size: int, timeout: float) -> ParallelError:
    """Why a group is over, in words."""
    group = f"the group of {size} ranks is over"
    match Status(counters.status):
        case Status.TIMED_OUT:
            missing = _ranks(counters.missing)
            return CollectiveTimeoutError(f"{missing} did not come within {timeout:g} s; {group}")
        case Status.PEER_GAVE_UP:
            return CollectiveTimeoutError(f"rank {counters.culprit} gave up on the others; {group}")
        case Status.PEER_CLOSED:
            return CollectiveTimeoutError(f"rank {counters.culprit} has closed the group while others need it; {group}")
        case Status.ABORTED:
            return CollectiveTimeoutError(f"aborted by rank {counters.culprit}; {group}")
        case _:
            return ParallelError(
                f"rank {counters.culprit} made another call than rank {rank}, or with a tensor of another size; {group}"
            )


def _ranks(mask: int) -> str:
    ranks = [str(rank) for rank in range(_MAX_RANKS) if mask >> rank & 1]
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks)}"
