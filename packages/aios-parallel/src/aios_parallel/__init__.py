"""How do several devices act as one? Tensor, pipeline, expert and data parallelism, on one machine and on many.

Exchanging tensors:
    `Communicator`, `Traffic`   the socket, and what it counts
    `SoloCommunicator`          a group of one
    `SharedMemoryCommunicator`  processes on one host's CPUs, by C++ of our own
    `TorchCommunicator`         torch.distributed: gloo between hosts, nccl on GPUs
Errors:
    `ParallelError`, `CollectiveTimeoutError`, `RankFailedError`, `WireError`

Names are imported when they are first used, so importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aios_parallel.communicator import Communicator, SoloCommunicator, Traffic
    from aios_parallel.errors import CollectiveTimeoutError, ParallelError, RankFailedError, WireError
    from aios_parallel.shared_memory import SharedMemoryCommunicator
    from aios_parallel.torch_group import TorchCommunicator

__all__ = [
    "CollectiveTimeoutError",
    "Communicator",
    "ParallelError",
    "RankFailedError",
    "SharedMemoryCommunicator",
    "SoloCommunicator",
    "TorchCommunicator",
    "Traffic",
    "WireError",
]

_HOMES = {
    "communicator": ("Communicator", "SoloCommunicator", "Traffic"),
    "errors": ("CollectiveTimeoutError", "ParallelError", "RankFailedError", "WireError"),
    "shared_memory": ("SharedMemoryCommunicator",),
    "torch_group": ("TorchCommunicator",),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
