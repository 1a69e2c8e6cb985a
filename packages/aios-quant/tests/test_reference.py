"""The torch reference: products by the definition, and what rounding the inputs costs."""

from __future__ import annotations

import pytest
import torch

from aios_quant.quantized_tensor import Fp8Tensor, QuantizedTensor
from aios_quant.reference import (
    ReferenceKernel,
    activation_group,
    reference_a8,
    reference_a16,
    round_activations,
)
from aios_quant.schemes.registry import find_scheme

# bits, zero, group (0: whole rows), minimums, dtype of scales
FORMATS = [
    (8, 128, 0, False, torch.float32),
    (8, 0, 32, True, torch.float32),
    (4, 8, 32, False, torch.float16),
    (4, 0, 64, True, torch.float16),
    (4, 8, 128, False, torch.float32),
    (5, 16, 32, False, torch.float16),
    (5, 0, 32, True, torch.float32),
    (6, 32, 16, False, torch.float32),
]


def random_weight(rows: int, columns: int, bits: int, zero: int, group: int, mins: bool, dtype) -> QuantizedTensor:
    group = group or columns
    shape = (rows, columns // group)
    return QuantizedTensor(
        codes_NK=torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8),
        bits=bits,
        zero=zero,
        group_size=group,
        scales_NG=(torch.rand(shape) * 0.02 + 0.001).to(dtype),
        mins_NG=(torch.randn(shape) * 0.05).to(dtype) if mins else None,
    )


def by_definition(x: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    """Sums of integer products per group, scaled one after the other, in float64."""
    width = min(activation_group(weight), weight.group_size)
    out = torch.zeros(len(x), weight.shape[0], dtype=torch.float64)
    for start in range(0, x.shape[1], activation_group(weight)):
        inputs = x[:, start : start + activation_group(weight)]
        amax = inputs.abs().amax(1, keepdim=True)
        inverse = torch.where(amax > 0, 127 / amax, torch.zeros_like(amax))
        codes = (inputs * inverse).round().to(torch.int64)
        assert codes.abs().max() <= 127
        for step in range(0, codes.shape[1], width):
            q = codes[:, step : step + width]
            columns = slice(start + step, start + step + q.shape[1])
            group = (start + step) // weight.group_size
            dots = q @ (weight.codes_NK[:, columns].to(torch.int64) - weight.zero).T
            scale = (amax / 127).double()
            out += weight.scales_NG[:, group].double() * scale * dots
            if weight.mins_NG is not None:
                out += weight.mins_NG[:, group].double() * scale * q.sum(1, keepdim=True)
    return out


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a8_is_the_sum_over_groups_of_integer_products(format):
    for groups in (1, 2, 5):
        columns = (format[2] or 40) * groups
        weight = random_weight(23, columns, *format)
        x = torch.randn(7, columns) * torch.rand(7, 1).mul(4).exp()
        x[2] = 0
        exact = by_definition(x, weight)
        torch.testing.assert_close(reference_a8(x, weight, dtype=torch.float64), exact, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(reference_a8(x, weight).double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a8_is_off_by_half_a_step_of_the_inputs_at_most(format):
    weight = random_weight(31, (format[2] or 64) * 4, *format)
    x = torch.randn(5, weight.shape[1], dtype=torch.float64)
    dense = weight.dequantize(torch.float64)
    steps = (round_activations(x, activation_group(weight)) - x).abs()
    group = activation_group(weight)
    amax = x.unflatten(1, (-1, min(group, x.shape[1]))).abs().amax(-1).repeat_interleave(min(group, x.shape[1]), 1)
    assert (steps <= amax / 254 * (1 + 1e-9)).all()
    error = (reference_a8(x, weight, dtype=torch.float64) - x @ dense.T).abs()
    assert (error <= steps @ dense.abs().T + 1e-9).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a16_equals_the_dense_product(format):
    weight = random_weight(31, (format[2] or 64) * 3, *format)
    x = torch.randn(5, weight.shape[1])
    torch.testing.assert_close(reference_a16(x, weight), x @ weight.dequantize().T, rtol=1e-5, atol=1e-5)
    floats = find_scheme("fp8").quantize(torch.randn(9, 40))
    assert isinstance(floats, Fp8Tensor)
    x = torch.randn(3, 40)
    torch.testing.assert_close(reference_a16(x, floats), x @ floats.dequantize().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["a8", "a16"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_kernel_computes_the_reference_and_keeps_the_weight(format, activation):
    weight = random_weight(300, (format[2] or 33) * 3, *format)
    x = torch.randn(4, weight.shape[1])
    kernel = ReferenceKernel(weight, activation, torch.float32)
    expected = reference_a8(x, weight) if activation == "a8" else reference_a16(x, weight)
    torch.testing.assert_close(kernel.forward(x), expected, rtol=0, atol=1e-6)
    assert torch.equal(kernel.dequantize(), weight.dequantize())
    assert kernel.num_rows == 300
    assert kernel.forward(x.bfloat16()).dtype == torch.bfloat16
    assert kernel.forward(x.double()).dtype == torch.float64


def test_large_matrices_are_multiplied_in_pieces_with_the_same_result(monkeypatch):
    monkeypatch.setattr("aios_quant.reference._CPU_PIECE", 500)
    weight = random_weight(70, 96, *FORMATS[2])
    x = torch.randn(3, 96)
    expected = x @ weight.dequantize().T
    torch.testing.assert_close(ReferenceKernel(weight, "a16", torch.float32).forward(x), expected)


def test_four_bit_codes_are_kept_two_to_a_byte():
    weight = random_weight(10, 64, 4, 8, 32, False, torch.float16)
    assert ReferenceKernel(weight, "a8", torch.float32).num_bytes == 10 * 64 // 2 + 10 * 2 * 2
    odd = random_weight(10, 33, 4, 8, 0, False, torch.float32)
    assert ReferenceKernel(odd, "a16", torch.float32).num_bytes == 10 * 33 + 10 * 4


def test_plain_weights_are_kept_in_the_models_dtype():
    weight = torch.randn(6, 10).bfloat16()
    kernel = ReferenceKernel(weight, "a8", torch.float32)
    x = torch.randn(2, 10)
    torch.testing.assert_close(kernel.forward(x), x @ weight.float().T)
    assert kernel.num_bytes == 6 * 10 * 4


def test_nan_inputs_stay_visible():
    weight = random_weight(4, 64, *FORMATS[2])
    x = torch.randn(2, 64)
    x[1, 3] = float("nan")
    out = ReferenceKernel(weight, "a8", torch.float32).forward(x)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_groups_that_no_kernel_could_follow_are_refused():
    with pytest.raises(ValueError, match="24 columns"):
        activation_group(random_weight(2, 48, 4, 8, 24, False, torch.float32))
