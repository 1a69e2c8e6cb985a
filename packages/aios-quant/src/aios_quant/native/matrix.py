"""A weight matrix in the order in which the kernels read it: strips of sixteen rows; see `csrc/weight_strip.h`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from aios_model.errors import ConfigError
from aios_model.native.kernels import MatrixStruct, ScaleType, WeightType
from aios_model.native.library import pointer
from aios_model.native.threads import ThreadPool
from aios_quant.kernel import Activation, Weight
from aios_quant.native.structures import LinearStruct, quant_function
from aios_quant.quantized_tensor import Fp8Tensor, QuantizedTensor

LANES = 16
"""Rows of a strip."""

_FLOAT_TYPES = {
    torch.float32: WeightType.FLOAT32,
    torch.bfloat16: WeightType.BFLOAT16,
    torch.float16: WeightType.FLOAT16,
}


class NativeMatrix:
    """A packed matrix [N, K] and the C structure that describes it: a `WeightKernel` on its own.

    Args:
        weight: What to pack; it can be dropped afterwards.
        activation: `a8`: inputs of integer weights become 8-bit integers. Float weights always take float32.
        pool: Threads that compute.
    """

    def __init__(self, weight: Weight, *, activation: Activation, pool: ThreadPool) -> None:
        self._pool = pool
        self._bias: Tensor | None = None
        self._row_scales: Tensor | None = None
        self.struct = MatrixStruct()
        if isinstance(weight, QuantizedTensor):
            self._strips = self._pack_integers(weight, quantize_inputs=activation == "a8")
        else:
            self._strips = self._pack_floats(weight)
        self.struct.strips = pointer(self._strips)

    @property
    def num_rows(self) -> int:
        """N."""
        return self.struct.rows

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights and their scales."""
        return self._strips.nbytes + (0 if self._row_scales is None else self._row_scales.nbytes)

    @property
    def input_step(self) -> int:
        """Columns that a kernel adds up as integers: 16, 32 or 64; 0 if it takes float inputs."""
        if not self.struct.quantize_inputs:
            return 0
        width = self.struct.group or self.struct.columns
        return 64 if width % 64 == 0 else 16 if width % 32 and self.struct.group else 32

    def set_bias(self, bias: Tensor | None) -> None:
        """Takes a bias [N], added to every output."""
        self._bias = None if bias is None else bias.to(torch.float32).contiguous()
        self.struct.bias = None if self._bias is None else pointer(self._bias)

    def forward(self, x_TK: Tensor) -> Tensor:
        """[T, K] -> [T, N], in the dtype of the input."""
        return NativeLinear([self], pool=self._pool).forward(x_TK)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        """Refused: the kernels compute from host memory."""
        raise ConfigError("native kernels read their weights where they are packed, in host memory; nothing to move")

    def dequantize(self) -> Tensor:
        """The matrix as the kernels see it, float32 [N, K]."""
        struct = self.struct
        if struct.type >= WeightType.INT4:
            out = torch.empty(struct.rows, struct.columns)
            quant_function("aios_widen")(self._pool.pointer, ctypes.byref(struct), pointer(out))
            return out
        columns = self._strips.view(-1, struct.columns, LANES).transpose(1, 2).reshape(-1, struct.columns)
        if struct.type == WeightType.FP8:
            assert self._row_scales is not None
            return (columns.view(torch.float8_e4m3fn).float() * self._row_scales[:, None])[: struct.rows]
        return columns[: struct.rows].float()

    def _pack_integers(self, weight: QuantizedTensor, *, quantize_inputs: bool) -> Tensor:
        rows, columns = weight.codes_NK.shape
        struct = self.struct
        by_row = weight.group_size == columns and weight.mins_NG is None
        struct.type, struct.rows, struct.columns = weight.bits, rows, columns
        struct.group = 0 if by_row else weight.group_size
        struct.zero, struct.has_mins = weight.zero, weight.mins_NG is not None
        struct.scale_type = _scale_type(weight)
        struct.quantize_inputs = quantize_inputs
        struct.strip_bytes = quant_function("aios_strip_bytes")(ctypes.byref(struct))
        if by_row:
            self._row_scales = _padded(weight.scales_NG.float().flatten(), rows)
            struct.row_scales = pointer(self._row_scales)
        strips = torch.zeros(_num_strips(rows) * struct.strip_bytes, dtype=torch.uint8)
        parts = [part if part is None else part.contiguous() for part in _scale_parts(weight)]
        quant_function("aios_pack")(
            self._pool.pointer,
            ctypes.byref(struct),
            pointer(weight.codes_NK.contiguous()),
            *[None if part is None else pointer(part) for part in parts],
            pointer(strips),
        )
        return strips

    def _pack_floats(self, weight: Fp8Tensor | Tensor) -> Tensor:
        values = weight.codes_NK if isinstance(weight, Fp8Tensor) else weight
        rows, columns = values.shape
        struct = self.struct
        struct.rows, struct.columns = rows, columns
        if isinstance(weight, Fp8Tensor):
            struct.type = WeightType.FP8
            self._row_scales = _padded(weight.scales_N, rows)
            struct.row_scales = pointer(self._row_scales)
        else:
            if values.dtype not in _FLOAT_TYPES:
                values = values.float()
            struct.type = _FLOAT_TYPES[values.dtype]
        struct.strip_bytes = columns * LANES * values.element_size()
        strips = values.new_zeros(_num_strips(rows), columns, LANES)
        full = rows // LANES
        strips[:full] = values[: full * LANES].view(full, LANES, columns).transpose(1, 2)
        if rows % LANES:
            strips[full, :, : rows % LANES] = values[full * LANES :].T
        return strips


class NativeLinear:
    """Matrices stacked along their rows over one input: what the C side calls `Linear`.

    Args:
        matrices: Top to bottom; all of the same K.
        pool: Threads that compute.
        input_group: Columns that share an input scale, 32 or 64. None: the widest that all matrices agree with.
        input_step: Columns added up as integers. None: the finest that a matrix needs.
    """

    def __init__(
        self,
        matrices: list[NativeMatrix],
        *,
        pool: ThreadPool,
        input_group: int | None = None,
        input_step: int | None = None,
    ) -> None:
        self._pool = pool
        self._matrices = matrices
        self._structs = (MatrixStruct * len(matrices))(*(matrix.struct for matrix in matrices))
        self._num_rows = sum(matrix.num_rows for matrix in matrices)
        steps = [matrix.input_step for matrix in matrices if matrix.input_step]
        step = (input_step or min(steps)) if steps else 0
        self.struct = LinearStruct(
            matrices=self._structs,
            num_matrices=len(matrices),
            columns=matrices[0].struct.columns,
            group=(input_group or max(step, 32)) if steps else 0,
            step=step,
        )

    def forward(self, x_TK: Tensor) -> Tensor:
        """[T, K] -> [T, N], in the dtype of the input."""
        x = x_TK.to(torch.float32).contiguous()
        out = torch.empty(len(x), self._num_rows)
        if len(x):
            quant_function("aios_linear")(
                self._pool.pointer,
                ctypes.byref(self.struct),
                pointer(x),
                x.shape[1],
                len(x),
                pointer(out),
                self._num_rows,
            )
        return out.to(x_TK.dtype)


def _scale_type(weight: QuantizedTensor) -> ScaleType:
    if weight.coded_scales is not None:
        return ScaleType.CODED
    return ScaleType.FLOAT16 if weight.scales_NG.dtype == torch.float16 else ScaleType.FLOAT32


def _scale_parts(weight: QuantizedTensor) -> tuple[Tensor | None, ...]:
    """Scales, minimums, and what both are multiplied with where they are coded."""
    scales, mins = weight.coded_scales, weight.coded_mins
    if scales is None:
        floats = None if weight.mins_NG is None else weight.mins_NG.to(weight.scales_NG.dtype)
        return weight.scales_NG, floats, None, None
    if mins is None:
        return scales.codes_NG, None, scales.steps_NS, None
    return scales.codes_NG, mins.codes_NG, scales.steps_NS, mins.steps_NS


def _num_strips(rows: int) -> int:
    return -(-rows // LANES)


def _padded(scales_N: Tensor, rows: int) -> Tensor:
    padded = torch.zeros(_num_strips(rows) * LANES)
    padded[:rows] = scales_N
    return padded
