"""Native kernels against the modules whose work they do, on every instruction set of this CPU."""

from __future__ import annotations

import ctypes
import math
import random

import pytest
import torch
from torch.nn import functional as F

from aios_model.layers.norm import RMSNorm
from aios_model.layers.rope import Rotation
from aios_model.native import native_status
from aios_model.native.base_library import model_library
from aios_model.native.isa import available_isas
from aios_model.native.kernels import FloatMatrix, rms_norm, rotate, silu_and_multiply
from aios_model.native.threads import get_pool

pytestmark = pytest.mark.skipif(not native_status().available, reason=native_status().reason)

SIZES = [1, 2, 15, 16, 17, 31, 33, 64, 100, 576]
WEIGHT_TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def rows_and_size() -> tuple[int, int]:
    return random.choice([1, 2, 3, 7, 40]), random.choice([*SIZES, random.randint(1, 700)])


def expected_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    module = RMSNorm(x.shape[1], eps=eps)
    module.weight = weight.double()
    module._exact = torch.float64
    module._eps = torch.tensor(eps, dtype=torch.float64)
    return module(x.double())


def expected_rotation(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rotation = Rotation(torch.cat((cos, cos), -1)[:, None].double(), torch.cat((-sin, sin), -1)[:, None].double())
    return rotation.apply(heads.double())


def close(got: torch.Tensor, expected: torch.Tensor, *, relative: float = 2e-6) -> bool:
    return bool((got - expected).abs().max() <= relative * expected.abs().max())


def float_weight(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, columns).clamp(-4, 4).to(dtype)


def test_norm_is_that_of_the_module():
    for _ in range(40):
        rows, size = rows_and_size()
        x, weight = torch.randn(rows, size) * random.choice([1e-3, 1, 100]), torch.randn(size)
        eps = random.choice([1e-6, 1e-5])
        assert close(rms_norm(x, weight, eps=eps, pool=get_pool(1)), expected_norm(x, weight, eps)), (rows, size)


def test_rotation_is_that_of_the_module():
    for _ in range(40):
        rows, heads, half = random.randint(1, 9), random.randint(1, 5), random.choice([1, 2, 8, 15, 16, 17, 32, 48, 64])
        angles = torch.rand(rows, half) * 2 * math.pi
        x, cos, sin = torch.randn(rows, heads, 2 * half), angles.cos(), angles.sin()
        expected = expected_rotation(x, cos, sin)
        rotate(x, cos, sin, pool=get_pool(1))
        assert close(x, expected), (rows, heads, half)


def test_gate_is_silu_times_up():
    for _ in range(40):
        rows, size = rows_and_size()
        gate_up = (torch.randn(rows, 2 * size) * random.choice([1, 10, 60])).clamp(-85, 85)  # saturates behind that
        gate, up = gate_up.double().chunk(2, dim=-1)
        assert close(silu_and_multiply(gate_up, pool=get_pool(1)), F.silu(gate) * up, relative=1e-6), (rows, size)


def test_gate_saturates_far_from_zero():
    gate = torch.tensor([-1e30, -3000.0, -100.0, -88.5, -87.0, -20.0, 0.0, 20.0, 87.0, 89.0, 1e30, math.inf])
    got = silu_and_multiply(torch.cat((gate, torch.ones(len(gate))))[None], pool=get_pool(1))[0]
    torch.testing.assert_close(got, F.silu(gate), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", WEIGHT_TYPES, ids=str)
def test_product_is_that_of_torch(dtype):
    for _ in range(20):
        rows, columns, outputs = random.choice([1, 2, 4, 5, 9, 33]), random.randint(1, 150), random.randint(1, 150)
        weight, x = float_weight(outputs, columns, dtype), torch.randn(rows, columns)
        bias = torch.randn(outputs) if random.random() < 0.5 else None
        scales = torch.rand(outputs) if random.random() < 0.5 else None
        matrix = FloatMatrix(weight, row_scales_N=scales, bias_N=bias)
        wide = weight.double() if scales is None else weight.double() * scales[:, None]
        expected = F.linear(x.double(), wide, None if bias is None else bias.double())
        got = matrix.multiply(x, pool=get_pool(1))
        assert close(got, expected, relative=1e-5), (rows, columns, outputs)
        residual = torch.randn(rows, outputs)
        expected = expected + residual
        assert matrix.multiply(x, pool=get_pool(1), add_to_TN=residual) is residual
        assert close(residual, expected, relative=1e-5), (rows, columns, outputs)


def test_rows_may_lie_apart():
    wide = torch.randn(5, 3, 40)
    x, weight = wide[:, 1], torch.randn(40)
    assert torch.equal(
        rms_norm(x, weight, eps=1e-6, pool=get_pool(1)), rms_norm(x.contiguous(), weight, eps=1e-6, pool=get_pool(1))
    )
    matrix = FloatMatrix(torch.randn(33, 40))
    assert torch.equal(matrix.multiply(x, pool=get_pool(1)), matrix.multiply(x.contiguous(), pool=get_pool(1)))
    assert torch.equal(silu_and_multiply(x, pool=get_pool(1)), silu_and_multiply(x.contiguous(), pool=get_pool(1)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_stays_visible_and_in_its_row(bad):
    pool = get_pool(1)
    for size in (17, 64):
        x = torch.randn(3, 2 * size)
        x[1, random.randrange(size)] = bad
        place = int(x[1].isfinite().logical_not().nonzero()[0])
        outputs = [
            rms_norm(x, torch.ones(2 * size), eps=1e-6, pool=pool),
            FloatMatrix(torch.randn(20, 2 * size)).multiply(x, pool=pool),
        ]
        for out in outputs:
            assert not out[1].isfinite().all()
            assert out[[0, 2]].isfinite().all()
        if math.isnan(bad):
            assert outputs[0][1].isnan().all()
            assert outputs[1][1].isnan().all()
            gated = silu_and_multiply(x, pool=pool)
            assert gated[1].isnan().nonzero().tolist() == [[place]]
            heads = x.view(3, 1, 2 * size).clone()
            rotate(heads, torch.ones(3, size), torch.ones(3, size), pool=pool)
            assert heads[1, 0].isnan().nonzero()[:, 0].tolist() == [place, place + size]


def test_a_row_is_bitwise_the_same_alone_and_in_any_batch_with_any_number_of_threads():
    size, rows = 200, 37
    x, weight = torch.randn(rows, 2 * size), torch.randn(2 * size)
    matrix = FloatMatrix(torch.randn(77, 2 * size).bfloat16())

    def all_of(part: torch.Tensor) -> torch.Tensor:
        pool = get_pool()
        outputs = (rms_norm(part, weight, eps=1e-6, pool=pool), silu_and_multiply(part, pool=pool))
        return torch.cat((*outputs, matrix.multiply(part, pool=pool)), dim=1)

    get_pool(1)
    alone = torch.cat([all_of(row[None]) for row in x])
    for threads in (1, 2, 3):
        get_pool(threads)
        for count in (2, 3, 5, 8, rows):
            assert torch.equal(all_of(x[:count]), alone[:count]), (threads, count)
    get_pool(1)


def test_no_rows_are_no_work():
    pool = get_pool(1)
    assert rms_norm(torch.empty(0, 8), torch.ones(8), eps=1e-6, pool=pool).shape == (0, 8)
    assert FloatMatrix(torch.randn(3, 8)).multiply(torch.empty(0, 8), pool=pool).shape == (0, 3)
    assert silu_and_multiply(torch.empty(0, 8), pool=pool).shape == (0, 4)


@pytest.mark.parametrize("isa", [isa.name for isa in available_isas()[1:]])
def test_every_instruction_set_computes_the_same(isa, run_with_isa):
    run_with_isa(isa, __file__, "-k", "not instruction_set")


def test_the_library_can_tell_the_limits_of_the_machine():
    library = model_library()
    read = library.declare("aios_read_once", ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64)
    numbers = torch.zeros(1 << 16, dtype=torch.uint8)
    numbers[70] = 3
    # Eight streams of 64 bytes are joined by `or`, and the lanes' fours added up.
    assert read(numbers.data_ptr(), len(numbers)) == 3
    for name in ("aios_multiply_floats", "aios_multiply_bytes"):
        multiply = library.declare(name, ctypes.c_int64, ctypes.c_int64)
        assert 1 <= multiply(1) == multiply(2) < 10_000
        assert multiply(1_000_000) >= 1_000_000
