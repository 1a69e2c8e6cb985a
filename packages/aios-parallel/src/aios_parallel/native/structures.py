"""The C structures of `csrc/group.h`, field by field, and this layer's C functions. No torch here."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import POINTER, c_int32, c_int64, c_uint64, c_void_p
from enum import IntEnum
from typing import Any, cast

from aios_model.native.library import LayerKernels, NativeLibrary, load_library
from aios_parallel.tracing.span_ring import RingHeader

PARALLEL_KERNELS = LayerKernels("aios_parallel", below=("aios_model",))


class Status(IntEnum):
    """`aios::Status`: how a call ended."""

    DONE = 0
    TIMED_OUT = 1
    ABORTED = 2
    PEER_GAVE_UP = 3
    PEER_CLOSED = 4
    MISMATCH = 5


class Counters(ctypes.Structure):
    """`aios::Counters`: what a group writes and any thread may read."""

    _fields_ = (
        ("calls", c_int64),
        ("num_bytes", c_int64),
        ("nanoseconds", c_int64),
        ("inside", c_int64),
        ("status", c_int32),
        ("culprit", c_int32),
        ("missing", c_uint64),
    )


def parallel_library() -> NativeLibrary:
    """This layer's C++, compiled if need be, opened once.

    Raises:
        NativeBuildError: It cannot be compiled or loaded; ask `native_status(parallel_library)` first.
    """
    return load_library(PARALLEL_KERNELS)


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "aios_segment_bytes": (c_int64, c_int32),
    "aios_segment_slot_bytes": (c_int64, c_int32),
    "aios_segment_channel_bytes": (c_int64, c_int32),
    "aios_group_attach": (c_void_p, c_int32, c_int32, c_int32, c_int64, c_int64, POINTER(Counters)),
    "aios_group_arrive": (c_uint64, c_void_p),
    "aios_group_attached": (c_uint64, c_void_p),
    "aios_group_detach": (None, c_void_p),
    "aios_group_abort": (None, c_void_p),
    "aios_group_trace": (None, c_void_p, POINTER(RingHeader)),
    "aios_all_reduce": (c_int32, c_void_p, c_void_p, c_int64, c_int32),
    "aios_reduce": (None, c_void_p, c_void_p, c_int64),
    "aios_gather": (c_int32, c_void_p, c_void_p, c_void_p, c_int64, c_int32),
    "aios_broadcast": (c_int32, c_void_p, c_void_p, c_int64, c_int32),
    "aios_send": (c_int32, c_void_p, c_void_p, c_int64, c_int32),
    "aios_receive": (c_int32, c_void_p, c_void_p, c_int64, c_int32),
    "aios_barrier": (c_int32, c_void_p),
}


@functools.cache
def parallel_function(name: str) -> Callable[..., Any]:
    """A C function of this layer, with its signature."""
    restype, *argtypes = _SIGNATURES[name]
    return parallel_library().declare(name, restype, *argtypes)


def parallel_address(name: str) -> int:
    """Where a C function of this layer is, for other native code to call."""
    address = ctypes.cast(cast("Any", parallel_function(name)), c_void_p).value
    assert address is not None
    return address
