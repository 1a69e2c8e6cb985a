"""The native layout and its rounding in plain torch: the oracle of the kernels' tests, and a second way to read them.

Legend: X pages, C tokens per page, K kv heads, H head size, W value width, S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aios_kvcache.layout import LANES, NativeKvDtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_kvcache.native.native_cache import NativeLayer

SMALLEST_AMAX = 1e-30
"""Heads in which nothing is larger count as zero: 127 / amax would overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedHeads:
    """Keys or values as int8 pages keep them: number = code * scale.

    Attributes:
        codes: int8 [..., H].
        scales: float32 [...], one per token and head.
    """

    codes: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """float32 [..., H]."""
        return self.codes.float() * self.scales[..., None]


def quantize_heads(x: Tensor) -> QuantizedHeads:
    """Rounds float32 [..., H] as `store_kv` does: scale = amax / 127, code = round_half_even(x * (127 / amax))."""
    amax = x.abs().amax(-1)
    full = torch.full_like(amax, 127.0)  # torch computes 127 / tensor as a product with the reciprocal, rounded twice
    zero = amax < SMALLEST_AMAX
    codes = torch.round(x * torch.where(zero, 0.0, full / amax)[..., None])
    return QuantizedHeads(codes=codes.to(torch.int8), scales=torch.where(zero, 0.0, amax / full))


def round_as_stored(x: Tensor, dtype: NativeKvDtype) -> Tensor:
    """What float32 [..., H] reads as once it has been in a page: float32."""
    if dtype == "int8":
        return quantize_heads(x).dequantize()
    return x.to(torch.bfloat16).float() if dtype == "bfloat16" else x


def read_keys(layer: NativeLayer, block_table: Sequence[int], num_tokens: int) -> Tensor:
    """A sequence's keys out of their pages: float32 [S, K, H]."""
    pages = layer.keys[list(block_table)].float()
    if pages.dim() == 6:  # pairs [W, K, C/16, H/2, 16, 2] -> [W, K, C/16, H, 16]
        pages = pages.movedim(-1, -2).flatten(3, 4)
    tokens = pages.movedim(-1, -2).flatten(2, 3).transpose(1, 2).flatten(0, 1)
    if layer.key_scales is not None:
        tokens = tokens * _read_scales(layer.key_scales, block_table)
    return tokens[:num_tokens]


def read_values(layer: NativeLayer, block_table: Sequence[int], num_tokens: int) -> Tensor:
    """A sequence's values out of their pages: float32 [S, K, W]; W >= H, zeros behind H."""
    pages = layer.values[list(block_table)]
    tokens = (unpair_values(pages) if pages.dtype == torch.bfloat16 else pages).float().transpose(1, 2).flatten(0, 1)
    if layer.value_scales is not None:
        tokens = tokens * _read_scales(layer.value_scales, block_table)
    return tokens[:num_tokens]


def unpair_values(values: Tensor) -> Tensor:
    """[..., W] as bfloat16 pages keep it, 0 16 1 17 …, put back into the order of the head."""
    paired = values.shape[-1] // (2 * LANES) * 2 * LANES
    whole = values[..., :paired].unflatten(-1, (-1, LANES, 2)).transpose(-1, -2).flatten(-3)
    return torch.cat([whole, values[..., paired:]], dim=-1)


def _read_scales(scales_XKC: Tensor, block_table: Sequence[int]) -> Tensor:
    return scales_XKC[list(block_table)].transpose(1, 2).flatten(0, 1)[..., None]
