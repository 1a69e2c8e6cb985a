"""How the ranks of a group find each other, and which transport each exchange takes.

| who | exchanges | by |
|---|---|---|
| the ranks of a stage | partial sums | shared memory on one host's CPUs, nccl on GPUs, gloo otherwise |
| the same rank of all stages | hidden states | the same |

A group that spans hosts meets in a torch store, which the first rank opens. Shared memory needs no meeting but a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
from torch._C._distributed_c10d import PrefixStore, TCPStore

from aios_model.errors import NativeBuildError
from aios_model.native.status import native_status
from aios_parallel.communicator import Communicator, SoloCommunicator
from aios_parallel.mesh import Mesh, Place

GroupStore = TCPStore
"""Where ranks of several hosts meet: a key-value store over TCP, torch's own."""

COLLECTIVE_SECONDS = 300.0
"""A last resort: a rank that is lost is noticed by the driver within seconds, which then ends all others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """What a rank must know of the others; plain data, made by the driver.

    Attributes:
        run_id: Of the group; no other run has it.
        mesh: Its shape.
        hosts: Of every rank, what tells hosts apart.
        store: Address and port of the first rank's store; None where no group needs it.
        addresses: Of every rank, where other hosts reach it; empty within a host.
    """

    run_id: str
    mesh: Mesh
    hosts: tuple[str, ...]
    store: tuple[str, int] | None = None
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RankGroups:
    """The two groups that a rank belongs to.

    Attributes:
        tensor: Those that share its layers.
        pipeline: Those of the same tensor rank, by stage.
    """

    tensor: Communicator
    pipeline: Communicator

    @property
    def num_exchanges(self) -> int:
        """Collectives and transfers that the rank has joined."""
        return self.tensor.traffic.calls + self.pipeline.traffic.calls

    def close(self) -> None:
        """Lets go of both."""
        self.tensor.close()
        self.pipeline.close()


def open_store(address: str) -> GroupStore:
    """The store in which groups meet; to be kept by whoever opened it for as long as they meet."""
    return GroupStore(address, 0, is_master=True, wait_for_workers=False)


def open_groups(
    place: Place, rendezvous: Rendezvous, *, device: torch.device, store: GroupStore | None = None
) -> RankGroups:
    """Joins both groups; returns once all their ranks have.

    Args:
        place: Of the caller.
        rendezvous: Where the others are.
        device: Where tensors live.
        store: The store, on the rank that opened it.

    Raises:
        CollectiveTimeoutError: Not all ranks came, or they cannot reach each other.
        ParallelError: There is no transport for such a group.
    """
    if store is None and rendezvous.store is not None:
        host, port = rendezvous.store
        store = GroupStore(host, port, is_master=False, timeout=timedelta(seconds=60))
    opener = _Opener(place, rendezvous, device, store)
    return RankGroups(
        tensor=opener.open(f"tensor-{place.stage}", place.tensor_ranks),
        pipeline=opener.open(f"pipeline-{place.tensor_rank}", place.pipeline_ranks),
    )


def needs_store(mesh: Mesh, hosts: tuple[str, ...], *, on_gpu: bool) -> bool:
    """Whether some group of ranks meets in a store: it spans hosts, or there is no shared memory to meet in."""
    if on_gpu or not _has_shared_memory():
        return mesh.size > 1
    places = [mesh.place(rank) for rank in range(mesh.size)]
    groups = [group for place in places for group in (place.tensor_ranks, place.pipeline_ranks)]
    return any(len({hosts[rank] for rank in group}) > 1 for group in groups)


class _Opener:
    def __init__(self, place: Place, rendezvous: Rendezvous, device: torch.device, store: GroupStore | None) -> None:
        self._rank = place.rank
        self._rendezvous = rendezvous
        self._device = device
        self._store = store

    def open(self, name: str, ranks: list[int]) -> Communicator:
        """The group of `ranks`, called `name`."""
        if len(ranks) == 1:
            return SoloCommunicator()
        is_local = len({self._rendezvous.hosts[rank] for rank in ranks}) == 1
        if self._device.type == "cpu" and is_local and _has_shared_memory():
            return self._shared_memory(name, ranks)
        return self._torch(name, ranks)

    def _shared_memory(self, name: str, ranks: list[int]) -> Communicator:
        from aios_parallel.shared_memory import SharedMemoryCommunicator

        path = f"/dev/shm/aios-{self._rendezvous.run_id}-{name}"
        index, size = ranks.index(self._rank), len(ranks)
        return SharedMemoryCommunicator.open(path, rank=index, size=size, timeout=COLLECTIVE_SECONDS)

    def _torch(self, name: str, ranks: list[int]) -> Communicator:
        from aios_parallel.torch_group import TorchCommunicator

        assert self._store is not None, "groups that span hosts meet in a store"
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        addresses = self._rendezvous.addresses
        return TorchCommunicator.create(
            PrefixStore(f"{self._rendezvous.run_id}/{name}", self._store),
            rank=ranks.index(self._rank),
            size=len(ranks),
            backend=backend,
            timeout=COLLECTIVE_SECONDS,
            address=addresses[self._rank] if addresses and addresses[self._rank] else None,
        )


def _has_shared_memory() -> bool:
    """Whether this host has what shared memory between ranks takes: native code, and a place for it."""
    from aios_parallel.native.structures import parallel_library

    try:
        return native_status(parallel_library).available
    except NativeBuildError:
        return False
