"""How the torch path keeps one head's numbers: as it computes with them, or in fewer bits.

`PagedKVCache` hands what it writes and what it has gathered to a `StoredHeads`, so a page holds rows of some numbers,
R per head, and attention sees heads of H. The rounding is that of the native pages.

    a float type   R = H
    fp8            R = H bytes of E4M3, no scale (torch moves hardly anything of that type, so the pool is uint8)
    int8           R = H + 4 bytes: codes, and the head's float32 scale behind them, so that copying a page copies both

Letters of shapes: T tokens, S keys, K kv heads, H head size, R what a head takes in the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aios_kvcache.layout import SCALE_BYTES

SMALLEST_AMAX = 1e-30
"""Heads in which nothing is larger count as zero: 127 / amax would overflow."""

LARGEST_FP8 = 448.0
"""Of E4M3, which has no infinity."""


class StoredHeads(Protocol):
    """Between what attention computes with and what a pool holds."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the pool."""
        ...

    def width(self, head_dim: int) -> int:
        """R: numbers of the pool that one head takes."""
        ...

    def store(self, x_TKH: Tensor) -> Tensor:
        """[T, K, R], to be written to the pool."""
        ...

    def read(self, stored_SKR: Tensor) -> Tensor:
        """[S, K, H] of what lay in the pool, in the dtype that attention computes with."""
        ...


def stored_heads(kept: torch.dtype, *, computed: torch.dtype) -> StoredHeads:
    """How heads of dtype `computed` are kept: a floating dtype, int8 or float8_e4m3fn."""
    if kept == torch.int8:
        return Int8Heads(computed)
    return Fp8Heads(computed) if kept == torch.float8_e4m3fn else FloatHeads(kept, computed)


@dataclass(frozen=True, slots=True)
class FloatHeads:
    """Numbers of another floating dtype, or of the same.

    Attributes:
        dtype: Of the pool.
        computed: Of the attention.
    """

    dtype: torch.dtype
    computed: torch.dtype

    def width(self, head_dim: int) -> int:
        """H."""
        return head_dim

    def store(self, x_TKH: Tensor) -> Tensor:
        """[T, K, H], rounded."""
        return x_TKH.to(self.dtype)

    def read(self, stored_SKR: Tensor) -> Tensor:
        """[S, K, H]; the same tensor if nothing is to be converted."""
        return stored_SKR.to(self.computed)


@dataclass(frozen=True, slots=True)
class Fp8Heads:
    """Numbers of E4M3, at most ±448; NaN stays NaN.

    Attributes:
        computed: The dtype of the attention.
    """

    computed: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """uint8."""
        return torch.uint8

    def width(self, head_dim: int) -> int:
        """H bytes."""
        return head_dim

    def store(self, x_TKH: Tensor) -> Tensor:
        """uint8 [T, K, H]."""
        return round_to_fp8(x_TKH).view(torch.uint8)

    def read(self, stored_SKR: Tensor) -> Tensor:
        """[S, K, H], exact."""
        return stored_SKR.view(torch.float8_e4m3fn).to(self.computed)


@dataclass(frozen=True, slots=True)
class Int8Heads:
    """Codes with one scale per token and head.

    Attributes:
        computed: The dtype of the attention.
    """

    computed: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """uint8."""
        return torch.uint8

    def width(self, head_dim: int) -> int:
        """H bytes of codes and those of the scale."""
        return head_dim + SCALE_BYTES

    def store(self, x_TKH: Tensor) -> Tensor:
        """uint8 [T, K, H + 4]."""
        heads = quantize_heads(x_TKH.float())
        return torch.cat([heads.codes.view(torch.uint8), heads.scales[..., None].view(torch.uint8)], dim=-1)

    def read(self, stored_SKR: Tensor) -> Tensor:
        """[S, K, H]: code * scale, rounded to float32 before it is converted."""
        codes, scales = stored_SKR[..., :-SCALE_BYTES], stored_SKR[..., -SCALE_BYTES:]
        scales_SK1 = scales.clone(memory_format=torch.contiguous_format).view(torch.float32)  # or it is not aligned
        return (codes.view(torch.int8) * scales_SK1).to(self.computed)


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
    """Rounds float32 [..., H]: scale = amax / 127, code = round_half_even(x * (127 / amax)).

    NaN and infinity make the scale so, and thereby all that uses it.
    """
    amax = x.abs().amax(-1)
    full = torch.full_like(amax, 127.0)  # torch computes 127 / tensor as a product with the reciprocal, rounded twice
    zero = amax < SMALLEST_AMAX
    codes = torch.round(x * torch.where(zero, 0.0, full / amax)[..., None])
    return QuantizedHeads(codes=codes.to(torch.int8), scales=torch.where(zero, 0.0, amax / full))


def round_to_fp8(x: Tensor) -> Tensor:
    """float8_e4m3fn of any floating shape: rounded half to even, at most ±448; NaN stays NaN."""
    return x.clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)  # older torch makes NaN of what is larger
