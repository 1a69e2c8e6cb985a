"""The processor of this machine as a device, measured with numpy: no torch, about a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from aios_model.native.cores import usable_cores
from aios_model.native.isa import available_isas
from aios_parallel.planning.devices import SHARED_MEMORY, Device

_BUFFER_BYTES = 1 << 28
_MATRIX = 1536
_PASSES = 4
_VNNI_SPEEDUP = 4  # four products of bytes in the place of one of floats


def measure_processor(*, devices_per_host: int) -> Device:
    """One of `devices_per_host` processes that share this machine: its part of memory, bandwidth and arithmetic.

    The host is measured with all cores at work and divided evenly, since its processes run at the same time.
    """
    import psutil

    cores = usable_cores()
    rate = _float_rate() / devices_per_host
    return Device(
        name="cpu",
        kind="cpu",
        memory_bytes=psutil.virtual_memory().total / devices_per_host,
        bandwidth=_read_bandwidth(cores) / devices_per_host,
        flops={"float": rate, **({"int8": _VNNI_SPEEDUP * rate} if _multiplies_bytes() else {})},
        links=(SHARED_MEMORY,),
        source=f"measured on this machine with {cores} cores, 1/{devices_per_host} of it per device",
    )


def given_processor(*, memory_bytes: float, bandwidth: float, flops: float) -> Device:
    """A processor whose figures per device are all given, so that nothing has to be measured."""
    return Device(
        name="cpu",
        kind="cpu",
        memory_bytes=memory_bytes,
        bandwidth=bandwidth,
        flops={"float": flops},
        links=(SHARED_MEMORY,),
        source="given by options",
    )


def _multiplies_bytes() -> bool:
    """Whether the native kernels have instructions for products of bytes (VNNI)."""
    return any("vnni" in " ".join(isa.cpu_flags) for isa in available_isas())


def _read_bandwidth(threads: int) -> float:
    """Bytes per second at which the cores read buffers of their own that no cache holds."""
    import numpy as np

    chunks = [np.zeros(_BUFFER_BYTES // threads // 8) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        seconds = _best_seconds(lambda: list(pool.map(np.max, chunks)))
    return sum(chunk.nbytes for chunk in chunks) / seconds


def _float_rate() -> float:
    """Operations per second of a float32 matrix product."""
    import numpy as np

    matrix = np.ones((_MATRIX, _MATRIX), dtype=np.float32)
    return 2 * _MATRIX**3 / _best_seconds(lambda: matrix @ matrix)


def _best_seconds(work: Callable[[], object]) -> float:
    def timed() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return min(timed() for _ in range(_PASSES))
