"""`TorchCommunicator`: ranks exchange tensors through torch.distributed, by gloo between hosts and by nccl on GPUs.

The sum that these libraries offer goes round a ring: each part of a tensor is added up from another rank on, so a
token's numbers depend on where in its step it lies. Here the summands are exchanged as they are, and added up by our
own hands in the order of the ranks. What that costs is in `benchmarks/collectives.py`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from aios_parallel.communicator import Traffic
from aios_parallel.errors import CollectiveTimeoutError, ParallelError
from aios_parallel.tracing.clock import now
from aios_parallel.tracing.exchange_meter import ExchangeMeter
from aios_parallel.tracing.span_ring import ExchangeKind, SpanRing

# Bytes from which on three ranks and more divide the additions; two have nothing to divide. Over loopback both ways
# cost the same between 256 KB and 1 MB; a network of 10 Gbit/s gains earlier.
_LARGE = 512 << 10
_SENDS_AHEAD = 4
_TRANSFERS, _GATHERS = 0, 1  # tags: a gather must not take what was sent for a later `receive`


class TorchCommunicator:
    """A `Communicator` over a process group of torch.distributed.

    Tensors are on the CPU for gloo and on this rank's GPU for nccl. With gloo, a call that waits too long raises. With
    nccl, calls only queue work on the GPU: there torch's watchdog ends the process once `timeout` is over.

    Up to four sends per receiver are on their way at once, as copies; a fifth waits for the first to be received.

    Args:
        group: A `ProcessGroup` from `new_group`, or a bare backend as `create` makes it.
        timeout: Seconds to wait for other ranks with gloo; None for what the group was made with.
        batch_invariant: False adds up with the library's own `all_reduce`: faster for large tensors and many ranks, but
            an element's sum may then depend on where it lies.
    """

    native_reduce = None

    def __init__(self, group: Any, *, timeout: float | None = None, batch_invariant: bool = True) -> None:
        self.rank: int = group.rank()
        self.size: int = group.size()
        self._meter = ExchangeMeter()
        self._group: Any = group
        self._on_gpu = "nccl" in group.name().lower()
        self._timeout = None if timeout is None else timedelta(seconds=timeout)
        self._batch_invariant = batch_invariant
        self._sent: dict[tuple[int, int], deque[tuple[Any, Tensor]]] = {}
        self._failure: str | None = None
        self._memory = torch.empty(0, dtype=torch.uint8)

    @classmethod
    def create(
        cls,
        store: Store,
        *,
        rank: int,
        size: int,
        backend: Literal["gloo", "nccl"] = "gloo",
        timeout: float = 4.0,
        batch_invariant: bool = True,
        address: str | None = None,
    ) -> TorchCommunicator:
        """Makes a group of its own, without torch's global default group: a process may have as many as it needs.

        Args:
            store: Where the ranks find each other; each group needs one of its own: `PrefixStore("tensor", store)`.
            rank: Of the caller, from 0.
            size: Number of ranks.
            backend: `gloo` takes the network interface of `address`, or that which `GLOO_SOCKET_IFNAME` names; `nccl`
                needs a GPU per rank, the current device of this thread.
            timeout: Seconds after which a rank that does not come to a call ends the group.
            batch_invariant: As of the class.
            address: Of this host, where the others reach it; None leaves the choice to gloo.

        Raises:
            CollectiveTimeoutError: Not all ranks came, or they cannot reach each other.
            ParallelError: This torch or this machine has no such backend.
        """
        limit = timedelta(seconds=timeout)
        if backend == "nccl" and not (dist.is_nccl_available() and torch.cuda.is_available()):
            raise ParallelError("nccl needs a CUDA device and a torch built with it; on CPUs use gloo")
        try:
            group = _gloo(store, rank, size, limit, address) if backend == "gloo" else _nccl(store, rank, size, limit)
        except RuntimeError as error:
            words = str(error).partition("\n")[0]
            raise CollectiveTimeoutError(
                f"rank {rank} could not form a group of {size} over {backend}: {words}; do all ranks run, "
                "and can they reach each other? GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network interface"
            ) from error
        return cls(group, timeout=timeout, batch_invariant=batch_invariant)

    @property
    def traffic(self) -> Traffic:
        """See Communicator."""
        return self._meter.traffic

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Communicator. Floats of 16 bits are added up in float32 and rounded once, if `batch_invariant`."""
        _check_contiguous(x)
        started = now()
        if not self._batch_invariant:
            self._run("all_reduce", lambda: self._group.allreduce([x]))
        elif self.size > 2 and x.nbytes >= _LARGE:
            self._add_shares(x.view(-1))
        elif self.size > 1:
            x_E = x.view(-1)
            _add_in_order(self._exchange(x_E, out=self._reused(x_E, (self.size, len(x_E)))), x_E)
        self._meter.note(ExchangeKind.ALL_REDUCE, x, started)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """See Communicator."""
        started = now()
        out = self._exchange(x)
        self._meter.note(ExchangeKind.ALL_GATHER, x, started)
        return out

    def gather(self, x: Tensor, *, to: int = 0) -> Tensor | None:
        """See Communicator. The others only send; tensors of any size are on their way at once."""
        self._check_peer(to)
        _check_contiguous(x)
        started = now()
        out = None
        if to != self.rank:
            self._post(x, to, _GATHERS)
        else:
            out = x.new_empty(self.size, *x.shape)
            out[to] = x
            for rank in range(self.size):
                if rank != to:
                    self._take(out[rank], rank, _GATHERS)
        self._meter.note(ExchangeKind.GATHER, x, started, peer=to)
        return out

    def broadcast(self, x: Tensor, *, source: int = 0) -> Tensor:
        """See Communicator."""
        self._check_peer(source)
        started = now()
        options = dist.BroadcastOptions()
        options.rootRank = source
        values = _bytes(x)
        if x.numel() and self.size > 1:
            self._run("broadcast", lambda: self._group.broadcast([values], options))
        self._meter.note(ExchangeKind.BROADCAST, x, started, peer=source, gives=source == self.rank)
        return x

    def send(self, x: Tensor, *, to: int) -> None:
        """See Communicator; waits for the receiver once four sends to it are on their way."""
        self._check_other(to)
        started = now()
        self._post(x, to, _TRANSFERS)
        self._meter.note(ExchangeKind.SEND, x, started, peer=to)

    def receive(self, out: Tensor, *, source: int) -> Tensor:
        """See Communicator."""
        self._check_other(source)
        started = now()
        self._take(out, source, _TRANSFERS)
        self._meter.note(ExchangeKind.RECEIVE, out, started, peer=source, gives=False)
        return out

    def barrier(self) -> None:
        """See Communicator."""
        started = now()
        nothing = torch.zeros(1, dtype=torch.uint8, device="cuda" if self._on_gpu else "cpu")
        self._exchange(nothing)
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()
        self._meter.note(ExchangeKind.BARRIER, None, started)

    def trace(self, ring: SpanRing | None) -> None:
        """See Communicator."""
        self._meter.ring = ring

    def close(self) -> None:
        """See Communicator. Waits until what was sent is received, or time is over."""
        group, sent = self._group, self._sent
        self._group, self._sent = None, {}
        for posted in sent.values() if self._failure is None else ():
            for work, _ in posted:
                try:
                    self._wait(work)
                except RuntimeError:  # the receiver has gone
                    break
        if group is not None and self._on_gpu:
            group.shutdown()

    def _exchange(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """All ranks' `x`: [...] -> [size, ...]."""
        out = x.new_empty(self.size, *x.shape) if out is None else out
        values, received = _bytes(x), _bytes(out)
        if x.numel():
            self._run("all_gather", lambda: self._group._allgather_base(received, values))
        return out

    def _reused(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A tensor of x's dtype that lives until the next call: fresh memory costs as much as the sum on a CPU."""
        if self._on_gpu:
            return x.new_empty(shape)
        num_bytes = math.prod(shape) * x.element_size()
        if num_bytes > len(self._memory):
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        return self._memory[:num_bytes].view(x.dtype).view(shape)

    def _add_shares(self, x_E: Tensor) -> None:
        """Each rank adds up its share of the elements and gives the sums to the others."""
        share = -(-len(x_E) // self.size)
        summands = x_E.new_zeros(self.size, share)
        summands.view(-1)[: len(x_E)] = x_E
        mine = self._reused(x_E, (self.size, share))
        given, received = _bytes(summands), _bytes(mine)
        self._run("all_reduce", lambda: self._group.alltoall_base(received, given, [], []))
        total = mine.new_empty(share)
        _add_in_order(mine, total)
        x_E.copy_(self._exchange(total).view(-1)[: len(x_E)])

    def _post(self, x: Tensor, to: int, tag: int) -> None:
        """Starts a send, after the oldest one if too many are on their way."""
        if self._on_gpu:  # ordered by the stream, like everything else there
            self._run("send", lambda: self._group.send([_bytes(x)], to, tag))
            return
        posted = self._sent.setdefault((to, tag), deque())
        if len(posted) >= _SENDS_AHEAD:
            work, _ = posted.popleft()
            self._run("send", lambda: work)
        values = _bytes(x).clone()
        if x.numel():
            posted.append((self._start("send", lambda: self._group.send([values], to, tag)), values))

    def _take(self, out: Tensor, source: int, tag: int) -> None:
        values = _bytes(out)
        if out.numel():
            self._run("receive", lambda: self._group.recv([values], source, tag))

    def _run(self, what: str, start: Callable[[], Any]) -> None:
        """Starts an operation and waits for it."""
        work = self._start(what, start)
        try:
            self._wait(work)
        except RuntimeError as error:
            raise self._failed(what, error) from error

    def _start(self, what: str, start: Callable[[], Any]) -> Any:
        if self._group is None:
            raise ParallelError(f"rank {self.rank} has closed this group")
        if self._failure is not None:
            raise CollectiveTimeoutError(self._failure)
        try:
            return start()
        except RuntimeError as error:
            raise self._failed(what, error) from error

    def _wait(self, work: Any) -> None:
        work.wait(*([] if self._on_gpu or self._timeout is None else [self._timeout]))

    def _failed(self, what: str, error: RuntimeError) -> CollectiveTimeoutError:
        """Ends the group: its ranks are out of step from now on."""
        words = str(error).partition("\n")[0]
        self._failure = (
            f"{what} of rank {self.rank}: another of the {self.size} ranks did not come in time, or is gone; the group "
            f"is over ({words})"
        )
        return CollectiveTimeoutError(self._failure)

    def _check_peer(self, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"a group of {self.size} has no rank {rank}")

    def _check_other(self, rank: int) -> None:
        self._check_peer(rank)
        if rank == self.rank:
            raise ValueError(f"rank {rank} cannot exchange a tensor with itself")


def _gloo(store: Store, rank: int, size: int, timeout: timedelta, address: str | None) -> Any:
    if address is None:
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = timeout
    return gloo(store, rank, size, options)


def _nccl(store: Store, rank: int, size: int, timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _add_in_order(summands_NE: Tensor, out_E: Tensor) -> None:
    """The sum over ranks, element by element; in float32 for floats of 16 bits."""
    narrow = out_E.dtype in (torch.bfloat16, torch.float16)
    first, *others = summands_NE.float() if narrow else summands_NE
    total = torch.add(first, others[0], out=torch.empty_like(first) if narrow else out_E)
    for summand in others[1:]:
        total += summand
    if narrow:
        out_E.copy_(total)


def _bytes(x: Tensor) -> Tensor:
    """The tensor's memory: libraries know few dtypes, and all of them bytes."""
    _check_contiguous(x)
    return x.view(-1).view(torch.uint8)


def _check_contiguous(x: Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(x.shape)} has strides {x.stride()}: make it contiguous")
