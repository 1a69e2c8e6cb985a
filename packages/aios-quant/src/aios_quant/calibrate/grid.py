"""Which numbers a group of weights may become: scales and zero points, found before the codes are chosen.

    w[n, k] ≈ scale[n, g] * (code[n, k] - zero_point[n, g]),   g = k // G

with whole zero points, as the compressed-tensors convention stores them: the middle code for symmetric grids, any code
for asymmetric ones. Scales are rounded to what the checkpoint will hold before codes are chosen, so that every reader
of the checkpoint gets exactly the numbers that were compared here.

The widest grid, which reaches the largest weight of its group, is seldom the best one: a narrower grid cuts off one
weight and rounds the others more finely. `search` tries several and keeps the one with the smallest squared error, of
the weights or, given the inputs' Gram matrix, of the group's share of the output.

N rows, K columns, G columns per group (in shapes also the number of groups).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aios_quant.quantized_tensor import QuantizedTensor
from aios_quant.schemes.base import check_finite

# Widths tried, as shares of the widest grid. Below half of it no group of a real layer was ever best.
_SEARCHED_WIDTHS = tuple(1.0 - 0.05 * step for step in range(11))
# RTN weighs only whether the largest magnitude becomes the outermost code of the longer side or of both.
_PLAIN_WIDTHS = (1.0, 7 / 8)

# Elements of weights and candidates compared at a time.
_PIECE = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class GridSpec:
    """What grids of a checkpoint have in common.

    Attributes:
        bits: 4 or 8.
        group_size: G; None for one scale per row.
        symmetric: Whether the zero point is the middle code.
        scale_dtype: What scales are rounded to.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    scale_dtype: torch.dtype

    @property
    def num_codes(self) -> int:
        """2**bits."""
        return 1 << self.bits

    def group_size_for(self, columns: int) -> int:
        """G for rows of `columns`."""
        return self.group_size or columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Scales and zero points of one matrix.

    Attributes:
        spec: What kind of grid it is.
        scales_NG: float32, each a number of `spec.scale_dtype`, none 0.
        zero_points_NG: float32, whole numbers from 0 to 2**bits - 1.
    """

    spec: GridSpec
    scales_NG: Tensor
    zero_points_NG: Tensor

    def encode(self, weight_NK: Tensor) -> Tensor:
        """The nearest codes, uint8 [N, K]."""
        groups = weight_NK.unflatten(1, (self.scales_NG.shape[1], -1))
        return _codes(groups, self.scales_NG, self.zero_points_NG, self.spec.num_codes).flatten(1).to(torch.uint8)

    def round(self, weight_NK: Tensor) -> Tensor:
        """The nearest numbers of the grid, float32 [N, K]."""
        groups = weight_NK.unflatten(1, (self.scales_NG.shape[1], -1))
        return _round(groups, self.scales_NG, self.zero_points_NG, self.spec.num_codes).flatten(1)

    def with_codes(self, codes_NK: Tensor) -> QuantizedTensor:
        """The matrix that `codes_NK` (uint8) mean on this grid."""
        mins = None if self.spec.symmetric else -self.scales_NG * self.zero_points_NG
        return QuantizedTensor(
            codes_NK=codes_NK,
            bits=self.spec.bits,
            zero=self.spec.num_codes // 2 if self.spec.symmetric else 0,
            group_size=codes_NK.shape[1] // self.scales_NG.shape[1],
            scales_NG=self.scales_NG,
            mins_NG=mins,
        )


def find_grid(weight_NK: Tensor, spec: GridSpec, *, search: bool = False, gram_KK: Tensor | None = None) -> Grid:
    """The grid of each group of `weight_NK`.

    Args:
        weight_NK: float32.
        spec: What kind of grid.
        search: Whether many widths are tried instead of the usual ones.
        gram_KK: Σ x xᵀ of the inputs, float32; None weighs all columns alike.

    Raises:
        CheckpointError: The weight holds NaN or infinity.
    """
    columns = weight_NK.shape[1]
    size = spec.group_size_for(columns)
    groups_NGS = weight_NK.unflatten(1, (-1, size))
    gram_GSS = None if gram_KK is None else _diagonal_blocks(gram_KK, size)
    widths = _SEARCHED_WIDTHS if search else _PLAIN_WIDTHS if spec.symmetric and spec.bits < 8 else (1.0,)
    step = max(1, _PIECE // columns)
    pieces = [_best(piece, spec, widths, gram_GSS) for piece in groups_NGS.split(step)]
    scales, zero_points = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return Grid(spec=spec, scales_NG=scales, zero_points_NG=zero_points)


def _best(
    groups_NGS: Tensor, spec: GridSpec, widths: tuple[float, ...], gram_GSS: Tensor | None
) -> tuple[Tensor, Tensor]:
    low, high = groups_NGS.amin(dim=-1).clamp(max=0), groups_NGS.amax(dim=-1).clamp(min=0)
    check_finite(high - low)
    scales, zero_points = _candidate(low, high, spec)
    if len(widths) == 1:
        return scales, zero_points
    least = _error(groups_NGS, scales, zero_points, spec, gram_GSS)
    for width in widths[1:]:
        other_scales, other_points = _candidate(low * width, high * width, spec)
        error = _error(groups_NGS, other_scales, other_points, spec, gram_GSS)
        better = error < least
        least = torch.where(better, error, least)
        scales = torch.where(better, other_scales, scales)
        zero_points = torch.where(better, other_points, zero_points)
    return scales, zero_points


def _candidate(low_NG: Tensor, high_NG: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """Scales and zero points of the grid from `low` (0 or less) to `high` (0 or more)."""
    last = spec.num_codes - 1
    if spec.symmetric:
        scales = _storable(torch.maximum(-low_NG, high_NG) / (spec.num_codes // 2 - 1), spec)
        return scales, torch.full_like(scales, spec.num_codes // 2)
    scales = _storable((high_NG - low_NG) / last, spec)
    return scales, (-low_NG / scales).round_().clamp_(0, last)


def _storable(scales: Tensor, spec: GridSpec) -> Tensor:
    """Scales as the checkpoint can hold them. Groups of zeros, or of numbers too small for any scale, get 1."""
    stored = scales.to(spec.scale_dtype).float()
    check_finite(stored)
    return torch.where(stored == 0, 1.0, stored)


def _codes(groups_NGS: Tensor, scales_NG: Tensor, zero_points_NG: Tensor, num_codes: int) -> Tensor:
    codes = (groups_NGS / scales_NG.unsqueeze(-1)).round_()
    return codes.add_(zero_points_NG.unsqueeze(-1)).clamp_(0, num_codes - 1)


def _round(groups_NGS: Tensor, scales_NG: Tensor, zero_points_NG: Tensor, num_codes: int) -> Tensor:
    codes = _codes(groups_NGS, scales_NG, zero_points_NG, num_codes)
    return codes.sub_(zero_points_NG.unsqueeze(-1)).mul_(scales_NG.unsqueeze(-1))


def _error(
    groups_NGS: Tensor, scales_NG: Tensor, zero_points_NG: Tensor, spec: GridSpec, gram_GSS: Tensor | None
) -> Tensor:
    """Squared error of each group, [N, G]: of its weights, or of what it adds to the output."""
    delta = _round(groups_NGS, scales_NG, zero_points_NG, spec.num_codes).sub_(groups_NGS)
    if gram_GSS is None:
        return delta.square_().sum(dim=-1)
    delta_GNS = delta.transpose(0, 1)
    return (torch.bmm(delta_GNS, gram_GSS).mul_(delta_GNS)).sum(dim=-1).T


def _diagonal_blocks(gram_KK: Tensor, size: int) -> Tensor:
    """The blocks [G, S, S] on the diagonal of a Gram matrix."""
    blocks = gram_KK.unflatten(0, (-1, size)).unflatten(2, (-1, size))
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
