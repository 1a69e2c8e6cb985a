"""What this machine can do at best: bytes read and operations done per second by some threads together.

Native kernels measure it where they can be compiled; torch does elsewhere, whose float32 products stay a little below
the arithmetic and tell nothing of 8-bit products.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aios_model.errors import ConfigError, NativeBuildError
from aios_model.native.base_library import model_library

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LARGE, CACHED = 256 << 20, 64 << 20
TRIES = 7
OPERATIONS = 20_000_000_000  # a tenth of a second or so


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of all threads together, per second.

    Attributes:
        threads: How many.
        large_read: Bytes read from a buffer of 256 MiB, which fits no cache but the largest.
        cached_read: Bytes read from a buffer of 64 MiB, again and again.
        float_operations: float32 multiplications and additions.
        byte_operations: Multiplications and additions in products of 8-bit numbers; None where it is not known.
        source: What measured them.
    """

    threads: int
    large_read: float
    cached_read: float
    float_operations: float
    byte_operations: float | None
    source: str


def measure_limits(threads: int) -> Limits:
    """Takes about three seconds, plus those that compiling takes the first time."""
    try:
        library = model_library()
        read = library.declare("aios_read_once", ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64)
        floats = library.declare("aios_multiply_floats", ctypes.c_int64, ctypes.c_int64)
        byte_products = library.declare("aios_multiply_bytes", ctypes.c_int64, ctypes.c_int64)
    except (NativeBuildError, ConfigError, AttributeError):
        return _measure_with_torch(threads)
    return Limits(
        threads=threads,
        large_read=_read_rate(read, LARGE, threads),
        cached_read=_read_rate(read, CACHED, threads),
        float_operations=_operation_rate(floats, threads),
        byte_operations=_operation_rate(byte_products, threads),
        source=f"native kernels for {library.isa.name}",
    )


def _read_rate(read: Callable[[int, int], int], num_bytes: int, threads: int) -> float:
    """Every thread reads a part of its own; the fastest of some passes counts."""
    with mmap.mmap(-1, num_bytes) as buffer:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            buffer.madvise(mmap.MADV_HUGEPAGE)
        _touch(buffer)
        view = (ctypes.c_char * num_bytes).from_buffer(buffer)
        start, part = ctypes.addressof(view), num_bytes // threads
        seconds = min(
            _together([lambda at=start + i * part: read(at, part) for i in range(threads)]) for _ in range(TRIES)
        )
        del view  # the mapping cannot be closed while it is exported
    return part * threads / seconds


def _touch(buffer: mmap.mmap) -> None:
    """Pages that were never written are all the same page of zeros, which is always in cache."""
    megabyte = b"\1" * (1 << 20)
    for _ in range(len(buffer) >> 20):
        buffer.write(megabyte)


def _operation_rate(multiply: Callable[[int], int], threads: int) -> float:
    done = multiply(1)  # how many come in one go; also warms up
    num_operations = OPERATIONS // done * done
    seconds = min(_together([lambda: multiply(num_operations)] * threads) for _ in range(TRIES))
    return num_operations * threads / seconds


def _together(works: Sequence[Callable[[], object]]) -> float:
    """Seconds from the moment when all threads are ready until the last one is done. C calls release Python's lock."""
    ready = threading.Barrier(len(works) + 1)

    def run(work: Callable[[], object]) -> None:
        ready.wait()
        work()

    workers = [threading.Thread(target=run, args=(work,)) for work in works]
    for worker in workers:
        worker.start()
    ready.wait()
    start = time.perf_counter()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start


def _measure_with_torch(threads: int) -> Limits:
    import torch

    from aios_model.hardware import measure_read_bandwidth, measure_this_machine

    torch.set_num_threads(threads)
    return Limits(
        threads=threads,
        large_read=measure_read_bandwidth(LARGE),
        cached_read=measure_read_bandwidth(CACHED),
        float_operations=measure_this_machine().flops,
        byte_operations=None,
        source="torch",
    )
