"""Schemes: rounding errors stay within what the format allows, GGUF blocks keep their bits, names are found."""

from __future__ import annotations

import gguf
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from aios_model.errors import CheckpointError, ConfigError
from aios_model.weights.gguf_blocks import UNPACKERS, dequantise
from aios_quant.quantized_tensor import Fp8Tensor, QuantizedTensor
from aios_quant.schemes.gguf import GGUF_ENCODINGS, unpack_gguf
from aios_quant.schemes.registry import SCHEME_NAMES, find_scheme

HALF_BITS = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q6_K": (208,)}


def random_rows(encoding: str, rows: int, blocks: int) -> torch.Tensor:
    """Random bytes whose float16 scales are finite, negative, subnormal and zero ones among them."""
    _, size = GGML_QUANT_SIZES[GGMLQuantizationType[encoding]]
    packed = torch.randint(0, 256, (rows, blocks, size), dtype=torch.uint8)
    for offset in HALF_BITS.get(encoding, (0, 2)):
        bits = torch.randint(0, 0x7C00, (rows, blocks)) | torch.randint(0, 2, (rows, blocks)) << 15
        bits[0, 0], bits[-1, -1] = 0x8000, 0x0001
        packed[:, :, offset], packed[:, :, offset + 1] = bits & 0xFF, bits >> 8
    return packed.flatten(1)


@pytest.mark.parametrize("encoding", sorted(UNPACKERS))
def test_gguf_blocks_dequantise_to_the_bits_of_the_decoder_and_of_the_oracle(encoding):
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[encoding]]
    packed = random_rows(encoding, 37, 5)
    decoded = torch.empty(37, 5 * elements)
    dequantise(UNPACKERS[encoding], packed.unflatten(1, (5, size)), decoded.unflatten(1, (5, elements)))
    weight = unpack_gguf(encoding, packed)
    assert torch.equal(weight.dequantize().view(torch.int32), decoded.view(torch.int32))
    oracle = gguf.quants.dequantize(packed.numpy(), GGMLQuantizationType[encoding])
    assert torch.equal(weight.dequantize().view(torch.int32), torch.from_numpy(oracle).view(torch.int32))
    assert int(weight.codes_NK.max()) < 2**weight.bits
    # A block's own float16 stays float16; products of it need float32.
    assert weight.scales_NG.dtype == (torch.float32 if "_K" in encoding else torch.float16)


def test_every_gguf_encoding_that_can_be_decoded_keeps_its_codes():
    assert set(GGUF_ENCODINGS) == set(UNPACKERS)


def test_blocks_at_an_odd_address_are_unpacked_too():
    packed = random_rows("Q4_1", 3, 2)
    shifted = torch.empty(packed.numel() + 1, dtype=torch.uint8)
    shifted[1:] = packed.flatten()
    again = unpack_gguf("Q4_1", shifted[1:].view_as(packed))
    assert torch.equal(again.dequantize(), unpack_gguf("Q4_1", packed).dequantize())


def random_weight(rows: int = 33, columns: int = 192) -> torch.Tensor:
    weight = torch.randn(rows, columns) * torch.rand(rows, 1).mul(5).exp()
    weight[3] = 0
    weight[4, :32] = -0.25
    return weight


def test_int8_is_off_by_half_a_step_at_most():
    weight = random_weight()
    quantized = find_scheme("int8").quantize(weight)
    assert isinstance(quantized, QuantizedTensor)
    assert (quantized.bits, quantized.zero, quantized.group_size) == (8, 128, 192)
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert ((quantized.dequantize() - weight).abs() <= steps * 0.5001).all()
    assert torch.equal(quantized.dequantize()[3], weight[3])


@pytest.mark.parametrize("size", [32, 64])
def test_symmetric_int4_is_off_by_half_a_step_and_no_worse_than_the_even_scale(size):
    weight = random_weight()
    quantized = find_scheme(f"int4-g{size}").quantize(weight)
    groups = weight.unflatten(1, (-1, size))
    amax = groups.abs().amax(-1, keepdim=True)
    error = (quantized.dequantize().unflatten(1, (-1, size)) - groups).abs()
    # Half a step of amax / 7, or a whole one of amax / 8 at the far end of the codes; float16 scales add a little.
    assert (error <= amax / 8 * 1.002).all()
    plain = (groups / (amax / 7).clamp(min=1e-20)).round() * (amax / 7)
    assert (error.square().sum(-1) <= (plain - groups).square().sum(-1) * 1.02 + 1e-12).all()
    assert quantized.scales_NG.dtype == torch.float16
    assert torch.equal(quantized.dequantize()[3], weight[3])


@pytest.mark.parametrize("size", [32, 64])
def test_asymmetric_int4_spans_each_group(size):
    weight = random_weight() + 3
    quantized = find_scheme(f"int4-g{size}-asym").quantize(weight)
    groups = weight.unflatten(1, (-1, size))
    span = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)
    error = (quantized.dequantize().unflatten(1, (-1, size)) - groups).abs()
    assert (error <= span / 30 * 1.01 + 2e-3 * groups.abs().amax(-1, keepdim=True)).all()
    assert quantized.mins_NG is not None


def test_fp8_keeps_three_bits_of_mantissa():
    weight = random_weight()
    quantized = find_scheme("fp8").quantize(weight)
    assert isinstance(quantized, Fp8Tensor)
    smallest = quantized.scales_N.unsqueeze(1) * 2**-10
    error = (quantized.dequantize() - weight).abs()
    assert (error <= (weight.abs() / 16).maximum(smallest) * 1.001).all()


@pytest.mark.parametrize("name", ["int8", "int4", "int4-asym", "fp8"])
def test_a_piece_of_a_matrix_gives_the_same_codes_as_the_matrix(name):
    weight, scheme = random_weight(), find_scheme(name)
    whole, piece = scheme.quantize(weight), scheme.quantize(weight[5:9])
    assert torch.equal(whole.rows(5, 9).codes_NK, piece.codes_NK)
    assert torch.equal(whole.rows(5, 9).dequantize(), piece.dequantize())


@pytest.mark.parametrize("name", ["int8", "int4", "int4-asym", "fp8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(name, value):
    weight = random_weight()
    weight[1, 2] = value
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        find_scheme(name).quantize(weight)


def test_int4_scales_beyond_float16_are_refused_with_advice():
    with pytest.raises(CheckpointError, match="int8"):
        find_scheme("int4").quantize(torch.full((2, 64), 1e6))


def test_int4_takes_the_widest_usual_group_that_fits():
    assert find_scheme("int4").quantize(torch.randn(2, 576)).group_size == 64
    assert find_scheme("int4").quantize(torch.randn(2, 96)).group_size == 32


def test_shapes_that_do_not_fit_are_refused_with_what_does():
    with pytest.raises(ConfigError, match=r"groups of 128 columns, this one has 576; 'int4-g64' fits"):
        find_scheme("int4-g128").check_shape(64, 576)
    with pytest.raises(ConfigError, match="use 'int8'"):
        find_scheme("int4").check_shape(64, 50)
    find_scheme("int8").check_shape(1, 50)


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_every_name_finds_a_scheme_that_knows_its_name(name):
    scheme = find_scheme(name)
    assert scheme.name == name.replace("gguf", "as-stored")
    assert scheme.activation == ("a16" if name.endswith("-a16") or name in ("fp8", "none") else "a8")


@pytest.mark.parametrize("name", ["", "int3", "int4-g16", "int8-asym", "fp8-a16", "INT8"])
def test_unknown_names_are_refused_with_those_that_exist(name):
    with pytest.raises(ConfigError, match="int4-g128"):
        find_scheme(name)
