"""Native products against torch: every weight format, every instruction set of this CPU, one row and many."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from aios_model.native import native_status
from aios_model.native.isa import available_isas
from aios_model.native.threads import get_pool
from aios_quant.native.matrix import NativeLinear, NativeMatrix
from aios_quant.quantized_tensor import STEP_COLUMNS, CodedScales, Fp8Tensor, QuantizedTensor

pytestmark = pytest.mark.skipif(not native_status().available, reason=native_status().reason)

FORMATS = [
    # bits, zero, group (0: the whole row), with minimums, dtype of scales
    (8, 128, 0, False, torch.float32),
    (8, 128, 32, False, torch.float16),
    (8, 0, 64, True, torch.float32),
    (4, 8, 32, False, torch.float16),
    (4, 0, 32, True, torch.float16),
    (4, 8, 64, False, torch.float32),
    (4, 0, 128, True, torch.float32),
    (4, 8, 0, False, torch.float32),
    (5, 16, 32, False, torch.float16),
    (5, 0, 32, True, torch.float32),
    (6, 32, 16, False, torch.float32),
    # As GGUF's K encodings: scales are products of an integer and a float16.
    (4, 0, 32, True, "coded"),
    (5, 0, 32, True, "coded"),
    (6, 32, 16, False, "coded"),
]


def coded(rows: int, columns: int, group: int, step: float) -> tuple[CodedScales, torch.Tensor]:
    """Random coded scales, and the scales that they are."""
    codes = torch.randint(-63, 64, (rows, columns // group), dtype=torch.int8)
    steps = (torch.rand(rows, columns // STEP_COLUMNS) * step).half()
    values = codes.float().unflatten(1, (-1, STEP_COLUMNS // group)) * steps.float().unsqueeze(-1)
    return CodedScales(codes_NG=codes, steps_NS=steps), values.flatten(1)


def random_weight(rows: int, columns: int, bits: int, zero: int, group: int, mins: bool, dtype) -> QuantizedTensor:
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    if dtype == "coded":
        coded_scales, scales = coded(rows, columns, group, 0.0005)
        coded_mins, minimums = coded(rows, columns, group, 0.001) if mins else (None, None)
        return QuantizedTensor(
            codes_NK=codes,
            bits=bits,
            zero=zero,
            group_size=group,
            scales_NG=scales,
            mins_NG=minimums,
            coded_scales=coded_scales,
            coded_mins=coded_mins,
        )
    group = group or columns
    shape = (rows, columns // group)
    return QuantizedTensor(
        codes_NK=codes,
        bits=bits,
        zero=zero,
        group_size=group,
        scales_NG=(torch.rand(shape) * 0.02 + 0.001).to(dtype),
        mins_NG=(torch.randn(shape) * 0.05).to(dtype) if mins else None,
    )


def quantised_inputs(x: torch.Tensor, group: int) -> torch.Tensor:
    """What the kernels multiply with: x rounded to 8 bits per group of columns, as floats."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    scale = padded.abs().amax(-1, keepdim=True) / 127
    codes = (padded * torch.where(scale > 0, 1 / scale, 0)).round()
    return (codes * scale).flatten(1)[:, : x.shape[1]]


def representable_inputs(tokens: int, columns: int, group: int) -> torch.Tensor:
    """Inputs that 8 bits per group hold exactly (steps of 1/64, the largest in every group), so none can tie."""
    codes = torch.randint(-127, 128, (tokens, columns))
    codes[:, ::group] = 127
    return codes / 64


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("activation", ["a8", "a16"])
def test_product_equals_the_dequantised_one(format, activation) -> None:
    group = format[2]
    pool = get_pool(1)
    for tokens in (1, 3, 4, 5, 6, 13, 33):
        rows = random.choice([1, 15, 16, 17, 48, 97])
        width = STEP_COLUMNS if format[4] == "coded" else group or random.choice([8, 40, 64, 96])
        columns = width * random.choice([1, 2, 3, 5])
        columns += columns % 32 if group == 16 else 0
        weight = random_weight(rows, columns, *format)
        kernel = NativeMatrix(weight, activation=activation, pool=pool)
        step = max(kernel.input_step, 32) if kernel.input_step else 0
        dequantised = weight.dequantize(torch.float64).T
        exact = representable_inputs(tokens, columns, step or 32)
        expected = exact.double() @ dequantised
        assert (kernel.forward(exact) - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-5, (rows, columns)
        # Of any inputs one in thousands may round the other way at a tie: a step of its scale times a weight.
        inputs = torch.randn(tokens, columns)
        expected = (quantised_inputs(inputs, step) if step else inputs).double() @ dequantised
        flipped = inputs.abs().max() / 127 * dequantised.abs().max() if step else 0
        tolerance = 1e-5 * expected.abs().max() + 1e-5 + flipped
        assert (kernel.forward(inputs) - expected).abs().max() <= tolerance, (tokens, rows, columns)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_dequantised_matrix_is_that_of_the_format(format) -> None:
    for rows, groups in itertools.product((1, 16, 37), (1, 2, 6)):
        columns = (STEP_COLUMNS if format[4] == "coded" else format[2] or 48) * groups
        columns += columns % 32 if format[2] == 16 else 0
        weight = random_weight(rows, columns, *format)
        kernel = NativeMatrix(weight, activation="a8", pool=get_pool(1))
        assert torch.equal(kernel.dequantize(), weight.dequantize())


@pytest.mark.parametrize(("format", "bits"), [(FORMATS[-3], 4.625), (FORMATS[-2], 5.625), (FORMATS[-1], 6.5625)])
def test_coded_scales_stay_coded(format, bits) -> None:
    rows, columns = 48, 1024
    kernel = NativeMatrix(random_weight(rows, columns, *format), activation="a8", pool=get_pool(1))
    assert kernel.num_bytes == rows * columns * bits / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_product_equals_torch(dtype) -> None:
    for tokens, rows, columns in ((1, 64, 96), (2, 70, 33), (5, 16, 8), (9, 33, 130), (40, 100, 64)):
        weight = torch.randn(rows, columns).to(dtype)
        x = torch.randn(tokens, columns)
        kernel = NativeMatrix(weight, activation="a8", pool=get_pool(1))
        expected = x.double() @ weight.double().T
        assert (kernel.forward(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert torch.equal(kernel.dequantize(), weight.float())


def test_fp8_product_equals_torch() -> None:
    weight = torch.randn(50, 72).to(torch.float8_e4m3fn)
    scales = torch.rand(50)
    fp8 = Fp8Tensor(codes_NK=weight.view(torch.uint8), scales_N=scales)
    kernel = NativeMatrix(fp8, activation="a16", pool=get_pool(1))
    x = torch.randn(7, 72)
    expected = x.double() @ fp8.dequantize(torch.float64).T
    assert (kernel.forward(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(kernel.dequantize(), fp8.dequantize())


@pytest.mark.parametrize("format", [*FORMATS, None], ids=str)
def test_row_is_bitwise_the_same_alone_and_in_any_batch_with_any_number_of_threads(format) -> None:
    rows, columns = 150, 512
    weight = torch.randn(rows, columns).bfloat16() if format is None else random_weight(rows, columns, *format)
    for activation in ("a8", "a16"):
        kernel = NativeMatrix(weight, activation=activation, pool=get_pool(1))
        x = torch.randn(70, columns)
        alone = torch.cat([kernel.forward(row[None]) for row in x])
        for threads in (1, 2, 3):
            get_pool(threads)
            for size in (2, 4, 5, 6, 7, 11, 32, 70):
                assert torch.equal(kernel.forward(x[:size]), alone[:size]), (activation, threads, size)
        get_pool(1)


def test_stacked_matrices_of_different_formats_are_one_linear() -> None:
    pool = get_pool(1)
    weights = [random_weight(20, 64, *FORMATS[4]), random_weight(33, 64, *FORMATS[10]), torch.randn(5, 64)]
    bias = torch.randn(58)
    kernels = [NativeMatrix(weight, activation="a8", pool=pool) for weight in weights]
    start = 0
    for kernel in kernels:
        kernel.set_bias(bias[start : start + kernel.num_rows])
        start += kernel.num_rows
    x = torch.randn(9, 64)
    got = NativeLinear(kernels, pool=pool).forward(x)
    dense = torch.cat([kernel.dequantize() for kernel in kernels])
    expected = x @ dense.T + bias
    assert (got - expected).abs().max() <= 0.02 * expected.abs().max()


def test_nan_and_infinity_reach_the_output() -> None:
    kernel = NativeMatrix(random_weight(32, 64, *FORMATS[0]), activation="a8", pool=get_pool(1))
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(3, 64)
        x[1, 40] = bad
        out = kernel.forward(x)
        assert not out[1].isfinite().any()
        assert out[0].isfinite().all()
        assert out[2].isfinite().all()


def test_zero_and_tiny_inputs_give_zero() -> None:
    kernel = NativeMatrix(random_weight(32, 64, *FORMATS[3]), activation="a8", pool=get_pool(1))
    x = torch.zeros(2, 64)
    x[1] = 1e-38
    assert kernel.forward(x).abs().max() == 0


@pytest.mark.parametrize("isa", [isa.name for isa in available_isas()])
def test_every_instruction_set_computes_the_same(isa, run_with_isa) -> None:
    run_with_isa(isa, __file__, "-k", "not instruction_set")
