"""GGUF's block encodings in the common form: nothing is rounded, only unpacked.

The blocks' layouts are described in `aios_model.weights.gguf_blocks`, whose unpackers do the work. Scales stay float16
where a block stores them so; the K encodings multiply a block's float16 with a group's 6- or 8-bit integer, which needs
float32 to be exact; the factors are kept beside the product.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from aios_model.weights.gguf_blocks import UNPACKERS, Codes, ScaledCodes
from aios_model.weights.gguf_encodings import GGML_TYPES, BlockLayout
from aios_model.weights.source import PIECE_ELEMENTS
from aios_quant.quantized_tensor import CodedScales, QuantizedTensor, collect_rows

_LAYOUTS: Mapping[str, BlockLayout] = MappingProxyType({layout.name: layout for layout in GGML_TYPES.values()})

# Bits of a code, and what is subtracted from it.
_BITS_AND_ZERO: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "Q4_0": (4, 8),
        "Q4_1": (4, 0),
        "Q5_0": (5, 16),
        "Q5_1": (5, 0),
        "Q8_0": (8, 128),
        "Q4_K": (4, 0),
        "Q5_K": (5, 0),
        "Q6_K": (6, 32),
    }
)

GGUF_ENCODINGS = tuple(_BITS_AND_ZERO)
"""The encodings that keep their codes."""


def unpack_gguf(encoding: str, packed_NB: Tensor) -> QuantizedTensor:
    """Unpacks the rows of a GGUF tensor.

    Args:
        encoding: One of `GGUF_ENCODINGS`.
        packed_NB: uint8 [N, bytes per row], whole blocks, as `TensorEntry.raw` gives them.

    Returns:
        The matrix [N, K]; its `dequantize()` is what `TensorEntry.read` gives, to the last bit.
    """
    layout = _LAYOUTS[encoding]
    num_blocks = packed_NB.shape[1] // layout.block_bytes
    step = max(1, PIECE_ELEMENTS // (num_blocks * layout.block_elements))
    return collect_rows((_unpack(encoding, piece, layout) for piece in packed_NB.split(step)), len(packed_NB))


def _unpack(encoding: str, packed_NB: Tensor, layout: BlockLayout) -> QuantizedTensor:
    bits, zero = _BITS_AND_ZERO[encoding]
    aligned = packed_NB if packed_NB.storage_offset() % 2 == 0 else packed_NB.clone()  # scales are viewed as float16
    blocks = aligned.unflatten(1, (-1, layout.block_bytes))
    unpacked = UNPACKERS[encoding](blocks)
    group_size = unpacked.codes.shape[-1]
    scale_dtype = torch.float32 if unpacked.codes.shape[-2] > 1 else torch.float16
    return QuantizedTensor(
        codes_NK=_unsigned(unpacked, zero).flatten(1),
        bits=bits,
        zero=zero,
        group_size=group_size,
        scales_NG=unpacked.scale.flatten(1).to(scale_dtype),
        mins_NG=None if unpacked.offset is None else unpacked.offset.flatten(1).to(scale_dtype),
        coded_scales=_coded(unpacked.coded_scale),
        coded_mins=_coded(unpacked.coded_offset),
    )


def _coded(scales: ScaledCodes | None) -> CodedScales | None:
    if scales is None:
        return None
    return CodedScales(codes_NG=scales.codes.flatten(1).to(torch.int8), steps_NS=scales.step.flatten(1).half())


def _unsigned(unpacked: Codes, zero: int) -> Tensor:
    """The codes as stored; the unpackers centre them on zero where there is no offset."""
    if unpacked.codes.dtype == torch.uint8:
        return unpacked.codes
    return unpacked.codes.view(torch.uint8) + zero  # wraps around as two's complement does
