"""INT4 in groups of columns, rounded to nearest.

Symmetric: w = scale * (code - 8). The codes reach from -8 to 7, one further down than up, so two scales are tried per
group and the one with the smaller squared error is taken: amax / 7, which covers both sides, and the one that puts the
largest magnitude on -8 exactly (it is negative where that number is positive; Q4_0 of ggml does the same).
Asymmetric: w = scale * code + min, the sixteen codes spread evenly from the group's smallest to its largest number.

Scales and minimums are rounded to float16 before the codes are chosen, so the codes make up for it: a weight costs
4 + 16 / G bits, or 4 + 32 / G with minimums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aios_model.errors import ConfigError
from aios_quant.kernel import Activation
from aios_quant.quantized_tensor import QuantizedTensor
from aios_quant.schemes.base import as_float16_scales

GROUP_SIZES = (32, 64, 128)
ZERO = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Scheme:
    """Groups of 32, 64 or 128 columns.

    Attributes:
        group_size: Columns per scale; None for 64 where it divides K, else 32.
        symmetric: Whether codes are centred on zero, or minimums are stored.
        activation: W4A8 with dynamic inputs (`a8`) or W4A16 (`a16`).
    """

    group_size: int | None = None
    symmetric: bool = True
    activation: Activation = "a8"
    bits: int = 4
    keeps_stored: bool = False

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ConfigError(f"INT4 groups have {GROUP_SIZES} columns, got group_size = {self.group_size}")

    @property
    def name(self) -> str:
        """`int4`, `int4-g128`, `int4-asym-a16`, …"""
        group = "" if self.group_size is None else f"-g{self.group_size}"
        return f"int4{group}{'' if self.symmetric else '-asym'}{'' if self.activation == 'a8' else '-a16'}"

    def check_shape(self, n: int, k: int) -> None:
        """Raises ConfigError unless K is a multiple of the group size."""
        self.group_size_for(k)

    def group_size_for(self, k: int) -> int:
        """The group size used for rows of `k` columns; ConfigError if there is none."""
        size = self.group_size or (64 if k % 64 == 0 else 32)
        if k % size:
            fitting = [str(other) for other in GROUP_SIZES if k % other == 0]
            advice = f"'int4-g{fitting[-1]}' fits" if fitting else "no group size does; use 'int8'"
            raise ConfigError(f"{self.name} needs rows in whole groups of {size} columns, this one has {k}; {advice}")
        return size

    def quantize(self, weight_NK: Tensor) -> QuantizedTensor:
        """See `QuantScheme.quantize`."""
        size = self.group_size_for(weight_NK.shape[1])
        groups = weight_NK.to(torch.float32).unflatten(1, (-1, size))
        return _symmetric(groups) if self.symmetric else _asymmetric(groups)


def _symmetric(groups_NGS: Tensor) -> QuantizedTensor:
    low, high = groups_NGS.amin(dim=-1), groups_NGS.amax(dim=-1)
    extreme = torch.where(high > -low, high, low)
    even = as_float16_scales(extreme.abs() / 7.0)
    exact = (extreme / -8.0).to(torch.float16)  # smaller, so in range too
    even_codes, even_error = _round(groups_NGS, even)
    exact_codes, exact_error = _round(groups_NGS, exact)
    better = exact_error < even_error
    codes = torch.where(better.unsqueeze(-1), exact_codes, even_codes)
    return QuantizedTensor(
        codes_NK=codes.add_(ZERO).to(torch.uint8).flatten(1),
        bits=4,
        zero=ZERO,
        group_size=groups_NGS.shape[-1],
        scales_NG=torch.where(better, exact, even),
    )


def _round(groups_NGS: Tensor, scales_NG: Tensor) -> tuple[Tensor, Tensor]:
    """Centred codes as floats [N, G, S] and the norms of their errors [N, G]."""
    codes = (groups_NGS * _inverse(scales_NG)).round_().clamp_(-ZERO, 15 - ZERO)
    error = (codes * scales_NG.to(torch.float32).unsqueeze(-1)).sub_(groups_NGS)
    return codes, torch.linalg.vector_norm(error, dim=-1)


def _asymmetric(groups_NGS: Tensor) -> QuantizedTensor:
    low, high = groups_NGS.amin(dim=-1), groups_NGS.amax(dim=-1)
    scales, mins = as_float16_scales((high - low) / 15.0), as_float16_scales(low)
    offsets = groups_NGS - mins.to(torch.float32).unsqueeze(-1)
    codes = offsets.mul_(_inverse(scales)).round_().clamp_(0, 15)
    return QuantizedTensor(
        codes_NK=codes.to(torch.uint8).flatten(1),
        bits=4,
        zero=0,
        group_size=groups_NGS.shape[-1],
        scales_NG=scales,
        mins_NG=mins,
    )


def _inverse(scales_NG: Tensor) -> Tensor:
    """1 / scale [N, G, 1], 0 where a scale is 0: all of that group is 0, or too small for float16."""
    scales = scales_NG.to(torch.float32).unsqueeze(-1)
    return torch.where(scales == 0, 0.0, 1.0 / scales)
