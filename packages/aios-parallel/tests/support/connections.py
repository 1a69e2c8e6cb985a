"""How a rank's process makes its communicator."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from aios_parallel.shared_memory import SharedMemoryCommunicator
from aios_parallel.torch_group import TorchCommunicator


def shared(*, rank: int, size: int, path: str, isa: str = "", **options: Any) -> SharedMemoryCommunicator:
    os.environ["AIOS_ISA"] = isa
    return SharedMemoryCommunicator.open(path, rank=rank, size=size, **options)


def gloo(*, rank: int, size: int, path: str, **options: Any) -> TorchCommunicator:
    store = dist.PrefixStore("group", dist.FileStore(path, size))
    return TorchCommunicator.create(store, rank=rank, size=size, **options)


def gloo_in_default_group(*, rank: int, size: int, path: str, **options: Any) -> TorchCommunicator:
    store = dist.FileStore(path, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=20))
    return TorchCommunicator(dist.new_group(list(range(size))), **options)
