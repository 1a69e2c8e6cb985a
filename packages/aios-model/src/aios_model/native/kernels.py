"""The kernels of this layer on their own, as tensors see them. No torch at import.

What serves tokens calls them from C++, many in one call (aios-quant's fused step); here each can be tried and tested.
All compute in float32, row by row: a row's result does not depend on the other rows, nor on the number of threads.

Shapes: T rows, D their width, N heads (or outputs), H head size, K inputs, F feed-forward.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from aios_model.native.base_library import model_library
from aios_model.native.library import pointer

if TYPE_CHECKING:
    from torch import Tensor

    from aios_model.native.threads import ThreadPool

LANES = 16
"""Numbers in a vector, rows in a strip of weights."""


class WeightType(IntEnum):
    """How numbers of a matrix are stored; integer formats are their number of bits."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    FP8 = 3
    INT4 = 4
    INT5 = 5
    INT6 = 6
    INT8 = 8


class ScaleType(IntEnum):
    """How scales of groups are stored: as floats, or as 8-bit integers times a float16 per 256 columns."""

    FLOAT16 = 0
    FLOAT32 = 1
    CODED = 2


_WEIGHT_TYPES = {
    "torch.float32": WeightType.FLOAT32,
    "torch.bfloat16": WeightType.BFLOAT16,
    "torch.float16": WeightType.FLOAT16,
    "torch.float8_e4m3fn": WeightType.FP8,
}


class MatrixStruct(ctypes.Structure):
    """`aios::Matrix` of `csrc/matrix.h`, field by field."""

    _fields_ = (
        ("type", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
        ("group", c_int32),
        ("zero", c_int32),
        ("has_mins", c_int32),
        ("scale_type", c_int32),
        ("quantize_inputs", c_int32),
        ("strips", c_void_p),
        ("strip_bytes", c_int64),
        ("row_scales", c_void_p),
        ("bias", c_void_p),
    )


class FloatMatrix:
    """A weight matrix in strips of sixteen rows, the order in which the kernels read it, as wide as it was given.

    Args:
        weight_NK: [N, K], float32, bfloat16, float16 or float8_e4m3fn without NaN; copied.
        row_scales_N: [N], multiplied with the outputs; None for ones.
        bias_N: [N], added to the outputs; None for zeros.
    """

    def __init__(self, weight_NK: Tensor, *, row_scales_N: Tensor | None = None, bias_N: Tensor | None = None) -> None:
        num_rows, num_columns = weight_NK.shape
        self._strips = _strips_of(weight_NK)
        self._row_scales = None if row_scales_N is None else _padded(row_scales_N)
        self._bias = None if bias_N is None else bias_N.float().contiguous()
        self.struct = MatrixStruct(
            type=_WEIGHT_TYPES[str(weight_NK.dtype)],
            rows=num_rows,
            columns=num_columns,
            strips=pointer(self._strips),
            strip_bytes=self._strips[:1].nbytes,
            row_scales=None if self._row_scales is None else pointer(self._row_scales),
            bias=None if self._bias is None else pointer(self._bias),
        )

    def multiply(self, x_TK: Tensor, *, pool: ThreadPool, add_to_TN: Tensor | None = None) -> Tensor:
        """x Wᵀ * row scales + bias, [T, K] -> [T, N] float32; added to `add_to_TN`, in place, if that is given."""
        out = x_TK.new_empty(len(x_TK), self.struct.rows) if add_to_TN is None else add_to_TN
        _function("aios_matmul_float")(
            pool.pointer,
            ctypes.byref(self.struct),
            _rows(x_TK),
            x_TK.stride(0),
            len(x_TK),
            _rows(out),
            out.stride(0),
            add_to_TN is not None,
        )
        return out


def rms_norm(x_TD: Tensor, weight_D: Tensor, *, eps: float, pool: ThreadPool) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight, [T, D] -> [T, D] (arXiv 1910.07467)."""
    out = x_TD.new_empty(x_TD.shape)
    _function("aios_rms_norm")(
        pool.pointer, _rows(x_TD), x_TD.stride(0), pointer(weight_D), pointer(out), out.stride(0), *x_TD.shape, eps
    )
    return out


def rotate(x_TNH: Tensor, cos_TP: Tensor, sin_TP: Tensor, *, pool: ThreadPool) -> None:
    """Turns the pairs (i, i + H/2) of every head by their token's P = H/2 angles, in place (arXiv 2104.09864)."""
    num_tokens, num_heads, head_dim = x_TNH.shape
    _function("aios_rotate")(
        pool.pointer,
        pointer(x_TNH),
        num_heads * head_dim,
        pointer(cos_TP),
        pointer(sin_TP),
        num_tokens,
        num_heads,
        head_dim,
    )


def silu_and_multiply(gate_up_T2F: Tensor, *, pool: ThreadPool) -> Tensor:
    """silu(gate) * up, [T, 2F] (gate in front) -> [T, F] (arXiv 2002.05202)."""
    size = gate_up_T2F.shape[1] // 2
    out = gate_up_T2F.new_empty(len(gate_up_T2F), size)
    gate, stride = _rows(gate_up_T2F), gate_up_T2F.stride(0)
    _function("aios_silu_and_multiply")(
        pool.pointer, gate, gate + 4 * size, stride, pointer(out), size, len(gate_up_T2F), size
    )
    return out


def _strips_of(weight_NK: Tensor) -> Tensor:
    """[strips, K, 16], rows behind the last one zero."""
    num_rows, num_columns = weight_NK.shape
    padded = weight_NK.new_zeros(-(-num_rows // LANES) * LANES, num_columns)
    padded[:num_rows] = weight_NK
    return padded.view(-1, LANES, num_columns).transpose(1, 2).contiguous()


def _padded(scales_N: Tensor) -> Tensor:
    padded = scales_N.new_zeros(-(-len(scales_N) // LANES) * LANES).float()
    padded[: len(scales_N)] = scales_N
    return padded


def _rows(x: Tensor) -> int:
    """Address of float32 rows, which need not follow each other closely."""
    assert str(x.dtype) == "torch.float32", x.dtype
    return pointer(x[0] if len(x) else x)


_MATRIX = POINTER(MatrixStruct)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "aios_rms_norm": (c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int32, c_float),
    "aios_rotate": (c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int32, c_int32),
    "aios_silu_and_multiply": (c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int32),
    "aios_matmul_float": (c_void_p, _MATRIX, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int32),
}


@functools.cache
def _function(name: str) -> Callable[..., None]:
    return model_library().declare(name, None, *_SIGNATURES[name])
