"""Grids: what a checkpoint can hold, and the nearest numbers on it."""

from __future__ import annotations

import itertools

import pytest
import torch

from aios_model.errors import CheckpointError
from aios_quant.calibrate.grid import Grid, GridSpec, find_grid
from aios_quant.calibrate.rtn import round_to_fp8

SPECS = [
    GridSpec(bits=bits, group_size=size, symmetric=symmetric, scale_dtype=dtype)
    for bits, size in ((4, 32), (4, 64), (8, None))
    for symmetric, dtype in itertools.product((True, False), (torch.bfloat16, torch.float16))
]


def random_weight(rows: int = 24, columns: int = 192) -> torch.Tensor:
    return torch.randn(rows, columns) * torch.rand(rows, 1).exp() * 0.05


def squared_error(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    groups = (grid.round(weight) - weight).unflatten(1, (grid.scales_NG.shape[1], -1))
    return groups.square().sum(dim=-1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_scales_fit_the_checkpoint_and_zero_points_are_codes(spec):
    grid = find_grid(random_weight(), spec)
    assert torch.equal(grid.scales_NG.to(spec.scale_dtype).float(), grid.scales_NG)
    assert (grid.scales_NG > 0).all()
    assert torch.equal(grid.zero_points_NG, grid.zero_points_NG.round())
    assert 0 <= grid.zero_points_NG.min() <= grid.zero_points_NG.max() < 1 << spec.bits
    assert not spec.symmetric or (grid.zero_points_NG == 1 << (spec.bits - 1)).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_other_code_is_nearer(spec):
    weight = random_weight(rows=4)
    grid = find_grid(weight, spec)
    chosen = (grid.round(weight) - weight).abs()
    scales = grid.scales_NG.repeat_interleave(weight.shape[1] // grid.scales_NG.shape[1], dim=1)
    points = grid.zero_points_NG.repeat_interleave(weight.shape[1] // grid.scales_NG.shape[1], dim=1)
    for code in range(1 << spec.bits):
        other = ((code - points) * scales - weight).abs()
        assert (chosen <= other + 1e-6 * scales).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_mean_what_rounding_gave(spec):
    weight = random_weight()
    grid = find_grid(weight, spec)
    dequantized = grid.with_codes(grid.encode(weight)).dequantize()
    assert (dequantized - grid.round(weight)).abs().max() <= 1e-6 * weight.abs().max()


@pytest.mark.parametrize("spec", SPECS[:4], ids=str)
def test_searching_never_makes_a_group_worse(spec):
    weight = random_weight()
    assert (
        squared_error(weight, find_grid(weight, spec, search=True))
        <= squared_error(weight, Grid(spec=spec, **widest(weight, spec))) * (1 + 1e-5)
    ).all()


def widest(weight: torch.Tensor, spec: GridSpec) -> dict[str, torch.Tensor]:
    """The grid that reaches the largest weight, by the definition."""
    groups = weight.unflatten(1, (-1, spec.group_size_for(weight.shape[1])))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if spec.symmetric:
        scales = (torch.maximum(-low, high) / (2 ** (spec.bits - 1) - 1)).to(spec.scale_dtype).float()
        return {"scales_NG": scales, "zero_points_NG": torch.full_like(scales, 2 ** (spec.bits - 1))}
    scales = ((high - low) / (2**spec.bits - 1)).to(spec.scale_dtype).float()
    return {"scales_NG": scales, "zero_points_NG": (-low / scales).round().clamp(0, 2**spec.bits - 1)}


def test_the_gram_matrix_decides_which_error_counts():
    """One column carries all the input: its weights come out nearly exact, at the others' cost."""
    spec, weight = SPECS[0], random_weight(columns=32)
    gram = torch.full((32,), 1e-4).diag()
    gram[5, 5] = 1.0
    weighted = find_grid(weight, spec, search=True, gram_KK=gram).round(weight) - weight
    plain = find_grid(weight, spec, search=True).round(weight) - weight
    assert weighted[:, 5].norm() < 0.7 * plain[:, 5].norm()
    assert weighted.norm() > plain.norm()


def test_a_group_of_zeros_stays_zero_and_numbers_too_small_for_any_scale_vanish():
    for spec in SPECS:
        weight = torch.zeros(3, 64)
        weight[1] = 1e-42
        assert (find_grid(weight, spec).round(weight) == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_damaged_weights_are_refused(bad):
    weight = random_weight()
    weight[3, 7] = bad
    for spec in SPECS:
        with pytest.raises(CheckpointError, match="NaN or infinity"):
            find_grid(weight, spec)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        round_to_fp8(weight, torch.bfloat16)


def test_fp8_rounds_within_three_bits_of_mantissa():
    weight = random_weight()
    packed = round_to_fp8(weight, torch.bfloat16)
    assert torch.equal(packed.scales_N.to(torch.bfloat16).float(), packed.scales_N)
    large = weight.abs() > weight.abs().amax(dim=1, keepdim=True) / 100
    relative = ((packed.dequantize() - weight).abs() / weight.abs())[large]
    assert relative.max() <= 1 / 16 + 1e-3
