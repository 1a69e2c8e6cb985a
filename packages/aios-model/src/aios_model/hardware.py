"""What a machine can do at best: the two numbers that bound every token, bytes per second and operations per second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from aios_model.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A device's limits.

    Attributes:
        name: What it is called.
        memory_bytes: Its memory.
        bandwidth: Memory reads, in bytes per second.
        flops: Dense multiply-adds counted as two operations, in operations per second.
        source: Where the figures come from.
    """

    name: str
    memory_bytes: float
    bandwidth: float
    flops: float
    source: str


# BF16 tensor-core rates without sparsity, and memory bandwidth, as the vendors' datasheets state them.
DATASHEETS = {
    hardware.name: hardware
    for hardware in (
        Hardware(name="h200", memory_bytes=141e9, bandwidth=4.8e12, flops=989e12, source="datasheet, SXM"),
        Hardware(name="h100", memory_bytes=80e9, bandwidth=3.35e12, flops=989e12, source="datasheet, SXM"),
        Hardware(name="a100", memory_bytes=80e9, bandwidth=2.04e12, flops=312e12, source="datasheet, SXM 80 GB"),
        Hardware(name="l40s", memory_bytes=48e9, bandwidth=0.864e12, flops=362e12, source="datasheet"),
        Hardware(name="l4", memory_bytes=24e9, bandwidth=0.3e12, flops=121e12, source="datasheet"),
        Hardware(name="t4", memory_bytes=16e9, bandwidth=0.32e12, flops=65e12, source="datasheet, FP16"),
        Hardware(name="rtx4090", memory_bytes=24e9, bandwidth=1.008e12, flops=165e12, source="datasheet"),
        Hardware(name="rtx3090", memory_bytes=24e9, bandwidth=0.936e12, flops=71e12, source="datasheet"),
    )
}


def find_hardware(name: str) -> Hardware:
    """A device by datasheet name, or `this` for a measurement of this machine's processor (takes two seconds)."""
    if name == "this":
        return measure_this_machine()
    if name.lower() not in DATASHEETS:
        raise ConfigError(f"hardware {name!r} is unknown; use 'this' or one of {', '.join(DATASHEETS)}")
    return DATASHEETS[name.lower()]


def measure_this_machine() -> Hardware:
    """Measures read bandwidth and float32 arithmetic of the host with torch's current number of threads."""
    import psutil
    import torch

    return Hardware(
        name=f"this machine, {torch.get_num_threads()} threads",
        memory_bytes=psutil.virtual_memory().total,
        bandwidth=measure_read_bandwidth(),
        flops=_measure_flops(),
        source="measured, float32",
    )


def measure_read_bandwidth(num_bytes: int = 1 << 28) -> float:
    """Bytes per second at which torch's threads read a buffer too large for the caches: the best of five passes."""
    import torch

    buffer = torch.zeros(num_bytes // 4)
    return num_bytes / min(_seconds(buffer.sum) for _ in range(5))


def _measure_flops() -> float:
    import torch

    from aios_model.layers.linear import Linear

    size, rows = 2048, 512
    linear = Linear(size, size)
    linear.set_weight(torch.rand(size, size))
    x = torch.rand(rows, size)
    with torch.inference_mode():
        return 2 * rows * size * size / min(_seconds(lambda: linear(x)) for _ in range(5))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
