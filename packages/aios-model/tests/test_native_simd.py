"""The vectors that all kernels are written in: every instruction set of this CPU against torch, number by number."""

from __future__ import annotations

import ctypes
import math
import random
from pathlib import Path

import pytest
import torch

from aios_model.native import native_status
from aios_model.native.isa import available_isas
from aios_model.native.library import NativeLibrary, pointer, source_folder
from aios_model.sampling import noise

pytestmark = pytest.mark.skipif(not native_status().available, reason=native_status().reason)

ISAS = {isa.name: isa for isa in available_isas()}
SOURCE = Path(__file__).with_name("support") / "simd_under_test.cpp"
LANES = 16


class Vectors:
    """The functions of `simd_under_test.cpp`, for one instruction set; tensors in, tensors out."""

    def __init__(self, name: str) -> None:
        headers = [source_folder("aios_model")]
        self._library = NativeLibrary.open(name="simd-test", sources=[SOURCE], include_dirs=headers, isa=ISAS[name])

    def apply(self, name: str, *inputs: torch.Tensor, out: torch.dtype = torch.float32, size: int = 0) -> torch.Tensor:
        """Calls `name(count, inputs..., out)`, where count is that of whole vectors in the first input."""
        function = self._library.declare(name, None, ctypes.c_int64, *[ctypes.c_void_p] * (len(inputs) + 1))
        result = torch.zeros(size or inputs[0].numel(), dtype=out)
        function(inputs[0].numel() // LANES, *(pointer(x) for x in inputs), pointer(result))
        return result


@pytest.fixture(params=ISAS)
def vectors(request) -> Vectors:
    return Vectors(request.param)


def any_floats(count: int) -> torch.Tensor:
    """Random bit patterns: every exponent, denormals, infinities and NaN among them."""
    return torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32).view(torch.float32)


def ulps(got: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error in units of float32's last place."""
    exponent = torch.frexp(exact).exponent.clamp(min=-125)
    return float(((got.double() - exact) / torch.exp2(exponent.double() - 24)).abs().max())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the sign of zero; of NaN only that it is one."""
    assert a.dtype == b.dtype
    number = a.isnan().logical_not()
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(number, ~b.isnan()) and torch.equal(a.view(integer)[number], b.view(integer)[number])


def test_exp_is_right_to_two_places(vectors):
    for low, high in ((-87.3, 88.3), (-1.0, 1.0), (-1e-3, 1e-3)):
        x = torch.empty(1 << 18).uniform_(low, high)
        assert ulps(vectors.apply("exps", x), x.double().exp()) <= 2


def test_exp_at_its_edges(vectors):
    x = torch.tensor(
        [0.0, -0.0, -math.inf, math.inf, math.nan, -87.34, -1e30, 1e-40, -1e-40, 88.5, 1e38, 88.37, 1, -1, 0, 0]
    )
    got = vectors.apply("exps", x)
    assert got[[0, 1, 7, 8]].tolist() == [1.0] * 4
    assert got[[2, 5, 6]].tolist() == [0.0] * 3, "e^-inf must be 0 exactly"
    assert got[4].isnan()
    assert got[[3, 9, 10]].tolist() == [got[3].item()] * 3, "saturates"
    assert 2.3e38 < got[3] < math.inf


def test_log_is_right_to_two_places(vectors):
    near_one = 1 - torch.rand(1 << 16) * torch.exp2(-torch.rand(1 << 16) * 24)
    every_exponent = torch.randint(0x00800000, 0x7F800000, (1 << 18,), dtype=torch.int32).view(torch.float32)
    for x in (near_one[near_one < 1][: 1 << 15], torch.rand(1 << 16) + 2.0**-24, every_exponent):
        x = x[: x.numel() // LANES * LANES]
        assert ulps(vectors.apply("logs", x), x.double().log()) <= 2


def test_silu_is_that_of_torch(vectors):
    x = torch.randn(1 << 16) * 20
    exact = torch.nn.functional.silu(x.double())
    assert ((vectors.apply("silus", x) - exact).abs() <= 1e-6 * exact.abs() + 1e-36).all()
    assert vectors.apply("silus", torch.full((LANES,), math.nan)).isnan().all()


def test_every_bfloat16_and_float16_widens_as_in_torch(vectors):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    assert same_bits(vectors.apply("widen_bf16s", patterns), patterns.view(torch.bfloat16).float())
    assert same_bits(vectors.apply("widen_f16s", patterns), patterns.view(torch.float16).float())


def test_every_byte_widens_as_in_torch(vectors):
    patterns = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    assert torch.equal(vectors.apply("widen_u8s", patterns), patterns.float())
    assert torch.equal(vectors.apply("widen_i8s", patterns), patterns.view(torch.int8).float())
    numbers = (patterns & 0x7F) != 0x7F  # the others are NaN, which the kernels never meet
    got, expected = vectors.apply("widen_e4m3s", patterns), patterns.view(torch.float8_e4m3fn).float()
    assert same_bits(got[numbers], expected[numbers])
    bytes_of_lanes = vectors.apply("bytes_to_floats", patterns)
    assert torch.equal(bytes_of_lanes.view(4, 4, LANES).transpose(1, 2).flatten(), patterns.float())


def test_rounding_to_bfloat16_is_that_of_torch(vectors):
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    ties = (halves | 0x8000).view(torch.float32)
    for x in (any_floats(1 << 18), torch.randn(1 << 16), ties, halves.view(torch.float32)):
        expected = x.bfloat16()
        assert same_bits(vectors.apply("narrow_bf16s", x, out=torch.bfloat16), expected)
        assert same_bits(vectors.apply("narrow_bf16_one_by_one", x, out=torch.bfloat16), expected)


def test_dot_products_of_bytes_are_exact_at_their_extremes(vectors):
    zeros = torch.zeros(LANES, dtype=torch.int32)
    for u, s in ((255, -128), (255, 127), (0, -128), (128, -1)):
        unsigned = torch.full((4 * LANES,), u, dtype=torch.uint8)
        signed = torch.full((4 * LANES,), s, dtype=torch.int8)
        got = vectors.apply("dots", zeros, unsigned, signed, out=torch.int32)
        assert got.tolist() == [4 * u * s] * LANES
    unsigned = torch.randint(0, 256, (256, LANES, 4), dtype=torch.uint8)
    signed = torch.randint(-128, 128, (256, LANES, 4), dtype=torch.int8)
    start = torch.randint(-(2**20), 2**20, (256, LANES), dtype=torch.int32)
    expected = start + (unsigned.int() * signed.int()).sum(-1, dtype=torch.int32)
    assert torch.equal(vectors.apply("dots", start, unsigned, signed, out=torch.int32), expected.flatten())


@pytest.mark.parametrize("count", range(LANES + 1))
def test_part_of_a_vector_is_read_and_written_and_nothing_else(vectors, count):
    source, other = torch.randn(LANES), torch.randn(LANES)
    number = torch.full((LANES,), count, dtype=torch.int32)
    padded = torch.cat((source[:count], torch.full((LANES - count,), math.nan)))
    assert torch.equal(
        vectors.apply("load_part", padded, number), torch.cat((source[:count], torch.zeros(LANES - count)))
    )
    mixed = torch.cat((source[:count], other[count:]))
    assert torch.equal(vectors.apply("store_part", source, number, other), mixed)
    assert torch.equal(vectors.apply("select_part", source, number, other), mixed)


def test_selected_lanes_may_lie_beyond_either_end(vectors):
    a, b = torch.randn(LANES), torch.randn(LANES)
    for count, expected in ((-3, b), (-100, b), (17, a), (1000, a)):
        assert torch.equal(vectors.apply("select_part", a, torch.full((LANES,), count, dtype=torch.int32), b), expected)


def test_lanes_are_added_in_one_order_on_every_instruction_set(vectors):
    x = torch.randn(4096, LANES) * torch.exp2(torch.randint(-20, 20, (4096, LANES)).float())
    expected = x
    for half in (8, 4, 2, 1):
        expected = expected[:, :half] + expected[:, half:]
    got = vectors.apply("sums", x, size=4096)
    assert torch.equal(got, expected[:, 0])
    whole = torch.randint(-(2**26), 2**26, (64, LANES), dtype=torch.int32)
    assert torch.equal(vectors.apply("integer_sums", whole, out=torch.int32, size=64), whole.sum(-1, dtype=torch.int32))


def test_largest_lane_and_largest_magnitude(vectors):
    x = torch.randn(512, LANES) * 100
    assert torch.equal(vectors.apply("largests", x, size=512), x.amax(-1))
    assert torch.equal(vectors.apply("magnitudes", x, size=512), x.abs().amax(-1))
    folded = vectors.apply("larger_magnitudes", x, x.flip(0).contiguous())
    assert torch.equal(folded, torch.maximum(x.abs(), x.flip(0).abs()).flatten())
    for lane in range(LANES):
        for bad in (math.nan, -math.nan, math.inf, -math.inf):
            x = torch.randn(LANES)
            x[lane] = bad
            found = vectors.apply("magnitudes", x, size=1)[0]
            assert found.isnan() if math.isnan(bad) else found == math.inf


def test_of_two_operands_the_second_keeps_its_nan(vectors):
    numbers, nans = torch.randn(LANES), torch.full((LANES,), math.nan)
    for name in ("maxima", "minima"):
        assert vectors.apply(name, numbers, nans).isnan().all()
        assert torch.equal(vectors.apply(name, nans, numbers), numbers)
    assert torch.equal(vectors.apply("maxima", numbers, -numbers), numbers.abs())
    assert torch.equal(vectors.apply("minima", numbers, -numbers), -numbers.abs())


def test_rounding_to_whole_numbers_is_to_even_at_ties(vectors):
    x = torch.cat((torch.arange(-64, 64) / 2, torch.randn(1024) * 1e4))
    assert torch.equal(vectors.apply("rounds", x), x.round())
    assert torch.equal(vectors.apply("integers", x, out=torch.int32), x.round().int())
    low = vectors.apply("low_bytes", x, out=torch.int8)
    assert torch.equal(low, x.round().int().to(torch.int8))


def test_fused_product_is_rounded_once_where_the_cpu_can(vectors, request):
    x, y, z = torch.randn(3, 1 << 14).unbind()
    got = vectors.apply("fmas", x, y.contiguous(), z.contiguous())
    exact = x.double() * y.double() + z.double()
    if request.node.callspec.params["vectors"] != "portable":
        assert torch.equal(got, exact.float())
    assert (got - exact).abs().max() <= 1e-6 * exact.abs().max()


# simd_integer.h and noise.h ------------------------------------------------------------------------------------------


def test_noise_is_that_of_torch_bit_for_bit_and_its_logarithm_nearly(vectors):
    for _ in range(8):
        seed, position = random.randrange(-(2**63), 2**63), random.randrange(2**40)
        keys = noise.row_keys(torch.tensor([seed]), torch.tensor([position]))
        first = random.choice([0, 150_000, 2**31 - 4096])
        tokens = torch.arange(first, first + 4096, dtype=torch.int32)
        row = torch.tensor([seed, position])
        bits = vectors.apply("noise", tokens, row, out=torch.int32)
        assert torch.equal(bits, noise._hash_32(keys, tokens)[0] & 0x7FFFFFFF)
        got, expected = vectors.apply("exponentials", tokens, row), noise.exponential_noise(keys, tokens)[0]
        assert ((got - expected).abs() <= 1e-6 * expected).all()
    extremes = torch.tensor([0, 1, 2**31 - 1, 2**31 - 2, 2**30, 64, 2**24, 2**31 - 64] * 2, dtype=torch.int32)
    got = vectors.apply("exponentials_of_bits", extremes)
    exact = -torch.log1p(-(extremes.double() + 0.5) * 2.0**-31 * (1 - 2.0**-24))
    assert got.isfinite().all()
    assert (got > 0).all()
    assert ((got - exact).abs() <= 1e-6 * exact)[exact < 15].all()


def test_integers_wrap_and_shift_as_in_torch(vectors):
    a, b = torch.randint(-(2**31), 2**31, (2, 4096), dtype=torch.int32).unbind()
    a, b = a.contiguous(), b.contiguous()
    wide = a.long() & 0xFFFFFFFF
    expected = {
        "integer_products": a * b,
        "integer_additions": a + b,
        "integer_differences": a - b,
        "exclusive": a ^ b,
        "common": a & b,
        "shifted_left": (wide << 23).to(torch.int32),
        "shifted_right": (wide >> 15).to(torch.int32),
        "shifted_right_signed": a >> 23,
    }
    for name, result in expected.items():
        assert torch.equal(vectors.apply(name, a, b, out=torch.int32), result), name


def test_lanes_are_compared_and_packed_in_order(vectors):
    x = torch.randn(256, LANES).where(torch.rand(256, LANES) > 0.1, math.nan)
    bounds = torch.randn(256, LANES).where(torch.rand(256, LANES) > 0.1, math.nan)
    chosen = x >= bounds
    sets = vectors.apply("at_least", x, bounds, out=torch.int32, size=256)
    assert torch.equal(sets, (chosen * 2 ** torch.arange(LANES)).sum(-1).int())
    with_nan = vectors.apply("nans", x, bounds, out=torch.int32, size=256)
    assert torch.equal(with_nan.bool(), (x.isnan() | bounds.isnan()).any(-1))
    packed = vectors.apply("packed", x, sets).view(256, LANES)
    numbers = vectors.apply("packed_integers", x.view(torch.int32), sets, out=torch.int32).view(256, LANES)
    for row in range(256):
        count = int(chosen[row].sum())
        assert torch.equal(packed[row, :count], x[row][chosen[row]])
        assert torch.equal(numbers[row, :count], x[row].view(torch.int32)[chosen[row]])
