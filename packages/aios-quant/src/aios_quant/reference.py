"""Products with quantised weights in plain torch: the definition that kernels are tested against, and the fallback.

W8A16, W4A16 and the like ("a16") multiply floating inputs with the dequantised weight. W8A8 and W4A8 ("a8") round the
inputs first, per token t and group of A columns, to 8-bit integers with a scale:

    amax = max |x|;  sa[t, a] = amax / 127;  q = round_half_even(x * (127 / amax))
    y[t, n] = sum over groups of  scale[n] * sa[t] * sum_k (code - zero) * q  +  min[n] * sa[t] * sum_k q

so that a kernel can do the inner sums in integers. Nothing is gained from that here: the same sum is a product of the
rounded inputs, sa * q, with the dequantised weight, and so it is written.

A is 32, or 64 where the weight's own groups allow. It divides the widths of a layer split over devices, so a shard
rounds its inputs as the whole layer does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from aios_quant.kernel import Activation, Weight
from aios_quant.quantized_tensor import Fp8Tensor, PackedWeight, QuantizedTensor

# Elements of a weight dequantised at a time: what a CPU core's cache holds, fewer launches on other devices.
_CPU_PIECE = 1 << 18
_DEVICE_PIECE = 1 << 25

# Below this the quotient 127 / amax could overflow; such inputs count as zeros, here as in the native kernels.
_SMALLEST_AMAX = 1e-30


def activation_group(weight: QuantizedTensor) -> int:
    """A: how many columns of the inputs share a scale in the product with `weight`; 64 or 32.

    Raises:
        ValueError: The weight's groups are neither 16 columns wide nor whole multiples of 32.
    """
    if not weight.is_per_channel and weight.group_size % 32 and weight.group_size != 16:
        raise ValueError(f"groups of {weight.group_size} columns do not fit groups of 32 activations")
    return 64 if weight.group_size % 64 == 0 else 32


def round_activations(x_TK: Tensor, group: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Rounds inputs to 8-bit integers per token and group of columns.

    Args:
        x_TK: [T, K], float32 or float64, in which codes and scales are computed.
        group: Columns that share a scale; the last group may be shorter.
        dtype: What sa * q is computed and returned in; None for that of the input.

    Returns:
        sa * q, [T, K].
    """
    columns = x_TK.shape[1]
    groups = F.pad(x_TK, (0, -columns % group)).unflatten(1, (-1, group))
    amax = groups.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(amax > _SMALLEST_AMAX, 127.0 / amax, 0.0)
    codes, scales = (groups * inverse).round_(), amax / 127.0
    return (codes.to(dtype or x_TK.dtype) * scales.to(dtype or x_TK.dtype)).flatten(1)[:, :columns]


def reference_a8(x_TK: Tensor, weight: QuantizedTensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The product of rounded inputs and a quantised weight.

    Args:
        x_TK: [T, K]; rounded in float32, or in float64 if it is that.
        weight: [N, K].
        dtype: What the product is computed and returned in: float32 or float64.

    Returns:
        [T, N].
    """
    wide = torch.float64 if x_TK.dtype == torch.float64 else torch.float32
    rounded_TK = round_activations(x_TK.to(wide), activation_group(weight), dtype=dtype)
    return reference_a16(rounded_TK, weight, dtype=dtype)


def reference_a16(x_TK: Tensor, weight: PackedWeight, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The product of floating inputs [T, K] and a weight [N, K]: [T, N] in `dtype`, float32 or float64."""
    return _multiply(x_TK.to(dtype), weight.rows, weight.shape, dtype)


class ReferenceKernel:
    """One matrix, computed by the definition above in float32 (float64 for float64 inputs).

    Codes of 4 bits are kept two to a byte, others one to a byte; a product dequantises a few rows at a time.

    Args:
        weight: The matrix, on the device that will compute.
        activation: Whether inputs of an integer matrix are rounded.
        dtype: What a plain floating matrix is kept in.
    """

    def __init__(self, weight: Weight, activation: Activation, dtype: torch.dtype, /) -> None:
        self._rows = None if isinstance(weight, Tensor) else _Rows(weight)
        self._dense = weight.to(dtype) if isinstance(weight, Tensor) else None
        self._activation_group: int | None = None
        if isinstance(weight, QuantizedTensor) and activation == "a8":
            self._activation_group = activation_group(weight)
        self.num_rows: int = weight.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of codes, scales and minimums, or of the floats."""
        if self._dense is not None:
            return self._dense.nbytes
        assert self._rows is not None
        return self._rows.num_bytes

    def forward(self, x_TK: Tensor) -> Tensor:
        """[T, K] -> [T, N], in the dtype of the input."""
        if self._dense is not None:
            return F.linear(x_TK.to(self._dense.dtype), self._dense).to(x_TK.dtype)
        assert self._rows is not None
        wide = torch.float64 if x_TK.dtype == torch.float64 else torch.float32
        inputs_TK = x_TK.to(wide)
        if self._activation_group is not None:
            inputs_TK = round_activations(inputs_TK, self._activation_group)
        return _multiply(inputs_TK, self._rows.take, self._rows.shape, wide).to(x_TK.dtype)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        """See WeightKernel."""
        if self._dense is not None:
            self._dense = change(self._dense)
        if self._rows is not None:
            self._rows.map_tensors(change)

    def dequantize(self) -> Tensor:
        """The matrix [N, K]: float32, or what a plain matrix is kept in."""
        if self._dense is not None:
            return self._dense
        assert self._rows is not None
        return self._rows.take(0, self.num_rows).dequantize()


class _Rows:
    """A quantised matrix whose 4-bit codes are packed, and which gives back any run of its rows unpacked."""

    def __init__(self, weight: PackedWeight) -> None:
        self._weight = weight.rows(0, 0)  # all but the rows
        self.shape = weight.shape
        self._packs = isinstance(weight, QuantizedTensor) and weight.bits == 4 and weight.shape[1] % 2 == 0
        self._codes = _pack_nibbles(weight.codes_NK) if self._packs else weight.codes_NK.contiguous()
        self._scales = weight.scales_NG if isinstance(weight, QuantizedTensor) else weight.scales_N
        self._mins = weight.mins_NG if isinstance(weight, QuantizedTensor) else None

    @property
    def num_bytes(self) -> int:
        return self._codes.nbytes + self._scales.nbytes + (0 if self._mins is None else self._mins.nbytes)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        self._codes, self._scales = change(self._codes), change(self._scales)
        self._mins = None if self._mins is None else change(self._mins)

    def take(self, start: int, stop: int) -> PackedWeight:
        codes = self._codes[start:stop]
        codes = _unpack_nibbles(codes) if self._packs else codes
        if isinstance(self._weight, Fp8Tensor):
            return Fp8Tensor(codes_NK=codes, scales_N=self._scales[start:stop])
        mins = None if self._mins is None else self._mins[start:stop]
        return replace(self._weight, codes_NK=codes, scales_NG=self._scales[start:stop], mins_NG=mins)


def _multiply(
    x_TK: Tensor, rows: Callable[[int, int], PackedWeight], shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    num_rows, columns = shape
    out_TN = x_TK.new_empty(len(x_TK), num_rows)
    step = max(1, (_CPU_PIECE if x_TK.device.type == "cpu" else _DEVICE_PIECE) // max(1, columns))
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        out_TN[:, start:stop] = F.linear(x_TK, rows(start, stop).dequantize(dtype))
    return out_TN


def _pack_nibbles(codes_NK: Tensor) -> Tensor:
    """Byte k holds columns k and k + K/2: unpacked by whole runs, four times as quick as pairs of neighbours."""
    half = codes_NK.shape[1] // 2
    return codes_NK[:, :half] | (codes_NK[:, half:] << 4)


def _unpack_nibbles(packed: Tensor) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), dim=1)
