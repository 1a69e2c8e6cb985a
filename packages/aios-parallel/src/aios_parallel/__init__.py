"""How do several devices act as one? Tensor, pipeline, expert and data parallelism, on one machine and on many.

Exchanging tensors:
    `Communicator`, `Traffic`   the socket, and what it counts
    `SoloCommunicator`          a group of one
    `SharedMemoryCommunicator`  processes on one host's CPUs, by C++ of our own
    `TorchCommunicator`         torch.distributed: gloo between hosts, nccl on GPUs
Planning (without torch):
    `Cluster`, `Device`, `Link`, `find_device`       hardware, from datasheets
    `Workload`, `Layout`, `find_plans`, `best_plan`  the ways to spread a model, and the best
    `Plan`, `PlanCosts`                              bytes and times of one
    `weak_scaling`                                   tokens per second as devices are added
Tracing (without torch):
    `GroupTracer`, `GroupTrace`  where the time of ranks goes: recording, and what was recorded
Errors:
    `ParallelError`, `CollectiveTimeoutError`, `PlanError`, `RankFailedError`, `WireError`

Names are imported when they are first used, so importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aios_parallel.communicator import Communicator, SoloCommunicator, Traffic
    from aios_parallel.errors import CollectiveTimeoutError, ParallelError, RankFailedError, WireError
    from aios_parallel.planning.costs import PlanCosts
    from aios_parallel.planning.devices import Device, Link, find_device
    from aios_parallel.planning.errors import PlanError
    from aios_parallel.planning.hardware import Cluster, Workload
    from aios_parallel.planning.loads import Layout
    from aios_parallel.planning.plans import Plan, best_plan, find_plans
    from aios_parallel.planning.scaling import weak_scaling
    from aios_parallel.shared_memory import SharedMemoryCommunicator
    from aios_parallel.torch_group import TorchCommunicator
    from aios_parallel.tracing.group_trace import GroupTrace
    from aios_parallel.tracing.group_tracer import GroupTracer

__all__ = [
    "Cluster",
    "CollectiveTimeoutError",
    "Communicator",
    "Device",
    "GroupTrace",
    "GroupTracer",
    "Layout",
    "Link",
    "ParallelError",
    "Plan",
    "PlanCosts",
    "PlanError",
    "RankFailedError",
    "SharedMemoryCommunicator",
    "SoloCommunicator",
    "TorchCommunicator",
    "Traffic",
    "WireError",
    "Workload",
    "best_plan",
    "find_device",
    "find_plans",
    "weak_scaling",
]

_HOMES = {
    "communicator": ("Communicator", "SoloCommunicator", "Traffic"),
    "errors": ("CollectiveTimeoutError", "ParallelError", "RankFailedError", "WireError"),
    "shared_memory": ("SharedMemoryCommunicator",),
    "torch_group": ("TorchCommunicator",),
    "tracing.group_trace": ("GroupTrace",),
    "tracing.group_tracer": ("GroupTracer",),
    "planning.costs": ("PlanCosts",),
    "planning.devices": ("Device", "Link", "find_device"),
    "planning.errors": ("PlanError",),
    "planning.hardware": ("Cluster", "Workload"),
    "planning.loads": ("Layout",),
    "planning.plans": ("Plan", "best_plan", "find_plans"),
    "planning.scaling": ("weak_scaling",),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
