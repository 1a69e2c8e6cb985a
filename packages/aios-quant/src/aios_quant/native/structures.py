"""The C structures of `csrc/matrix.h` and `csrc/linear.h`, field by field, and this layer's C functions."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import POINTER, c_int32, c_int64, c_void_p
from typing import Any

from aios_model.native.kernels import MatrixStruct
from aios_model.native.library import LayerKernels, NativeLibrary, load_library

QUANT_KERNELS = LayerKernels("aios_quant", below=("aios_kvcache", "aios_model"))


class LinearStruct(ctypes.Structure):
    """`aios::Linear`."""

    _fields_ = (
        ("matrices", POINTER(MatrixStruct)),
        ("num_matrices", c_int32),
        ("columns", c_int32),
        ("group", c_int32),
        ("step", c_int32),
    )


def quant_library() -> NativeLibrary:
    """This layer's kernels, compiled if need be, opened once.

    Raises:
        NativeBuildError: they cannot be compiled or loaded; ask `native_status` first.
    """
    return load_library(QUANT_KERNELS)


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "aios_strip_bytes": (c_int64, POINTER(MatrixStruct)),
    "aios_pack": (None, c_void_p, POINTER(MatrixStruct), *[c_void_p] * 6),
    "aios_widen": (None, c_void_p, POINTER(MatrixStruct), c_void_p),
    "aios_linear": (None, c_void_p, POINTER(LinearStruct), c_void_p, c_int64, c_int64, c_void_p, c_int64),
    "aios_quantize_activations": (None, c_int32, c_int32, c_int32, c_void_p, c_int64, c_void_p, c_void_p),
    "aios_step_bytes": (c_int64, c_void_p, c_void_p, c_void_p),
    "aios_step": (None, *[c_void_p] * 8),
}


@functools.cache
def quant_function(name: str) -> Callable[..., Any]:
    """A C function of this layer, with its signature."""
    restype, *argtypes = _SIGNATURES[name]
    return quant_library().declare(name, restype, *argtypes)
