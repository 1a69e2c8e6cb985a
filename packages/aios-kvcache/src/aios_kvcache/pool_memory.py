"""Memory for pools: reserved as a whole, taken page by page when it is first written, where the device allows that."""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

from aios_kvcache.errors import PoolTooSmallError


def allocate_pool(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, which on a CPU take no memory until they are written.

    Raises:
        PoolTooSmallError: The operating system refuses to reserve that much.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = prod(shape) * dtype.itemsize
    try:
        memory = _map_anonymously(num_bytes)
    except (OSError, ValueError, OverflowError) as error:
        raise PoolTooSmallError(
            f"{num_bytes / 2**30:.2f} GiB for one layer's keys and values cannot be reserved ({error}); "
            "ask for fewer blocks or less KV cache memory"
        ) from error
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _map_anonymously(num_bytes: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_ANONYMOUS"):  # private: shared memory would be charged to tmpfs, and not read as zero pages
        return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, num_bytes)
