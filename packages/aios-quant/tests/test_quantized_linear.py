"""Quantised layers and whole quantised models, read from the files that people have."""

from __future__ import annotations

import checkpoints
import gguf
import pytest
import torch

from aios_model.cache import ContiguousCache
from aios_model.decoder import DecoderModel
from aios_model.errors import CheckpointError, ConfigError
from aios_model.layers.linear import Linear
from aios_model.model import load_decoder, weight_bytes
from aios_model.weights.dummy import DummySource
from aios_model.weights.hub import resolve_model
from aios_quant.linear import QuantizedLinear
from aios_quant.reference import ReferenceKernel
from aios_quant.schemes.registry import find_scheme
from aios_quant.transform import quantize_model

# V in finer blocks than Q and K, as llama.cpp's mixed files have it.
MIXED = {
    "attn_q": "Q4_0",
    "attn_k": "Q4_0",
    "attn_v": "Q8_0",
    "attn_output": "Q5_0",
    "ffn_gate": "Q4_1",
    "ffn_up": "Q4_1",
    "ffn_down": "Q5_1",
    "token_embd": "Q8_0",
    "output": "F16",
}


@pytest.fixture
def folder(tmp_path):
    return checkpoints.save_safetensors(checkpoints.random_model("llama3", seed=3), tmp_path / "hf", sharded=False)


@pytest.fixture
def mixed_gguf(tmp_path, folder):
    model = checkpoints.random_model("llama3", seed=3)
    path = tmp_path / "mixed.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    checkpoints._write_metadata(writer, model.config)
    tensors = checkpoints._gguf_tensors(checkpoints._saved_tensors(folder), model.config, "llama")
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[next((MIXED[key] for key in MIXED if key in name), "F32")]
        if "norm" in name:
            kind = gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(
    path, scheme: str | None = None, *, dtype: str = "float32", head: str | None = None, **options
) -> DecoderModel:
    head_scheme = None if head is None else find_scheme(head)
    transforms = [] if scheme is None else [quantize_model(find_scheme(scheme), head_scheme)]
    return load_decoder(resolve_model(str(path)), device="cpu", dtype=dtype, transforms=transforms, **options)


def logits_of(decoder: DecoderModel) -> torch.Tensor:
    tokens = torch.arange(24) * 7 % decoder.config.vocab_size
    cache = ContiguousCache(decoder.config, max_length=24, dtype=decoder.dtype, device=decoder.device)
    with torch.inference_mode():
        return decoder.logits(decoder(tokens, torch.arange(24), cache))


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def quantized_layers(decoder: DecoderModel) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in decoder.named_modules() if isinstance(module, QuantizedLinear)}


def test_gguf_blocks_stay_as_they_are_and_give_the_weights_of_the_plain_layer(mixed_gguf):
    plain, packed = load(mixed_gguf), load(mixed_gguf, "as-stored-a16")
    for name, layer in quantized_layers(packed).items():
        expected = plain.get_submodule(name)
        assert isinstance(expected, Linear)
        assert torch.equal(layer.dense_weight(), expected.dense_weight()), name
    assert len(quantized_layers(packed)) == 3 * 4 + 1
    torch.testing.assert_close(logits_of(packed), logits_of(plain), rtol=1e-4, atol=1e-4)


def test_parts_of_one_format_become_one_matrix_and_others_their_own(mixed_gguf):
    packed = load(mixed_gguf, "as-stored")
    attention = packed.layers[0].attention
    assert [kernel.num_rows for kernel in attention.qkv.kernels] == [64 + 32, 32]
    assert len(packed.layers[0].mlp.gate_up.kernels) == 1
    assert "4 bits in groups of 32 + 8 bits in groups of 32" in repr(attention.qkv)
    assert "float16" in repr(packed.head)


def test_eight_bit_inputs_cost_little(mixed_gguf):
    plain = logits_of(load(mixed_gguf))
    assert relative_error(logits_of(load(mixed_gguf, "as-stored")), plain) < 0.05


@pytest.mark.parametrize(
    ("scheme", "bound"),
    [("int8", 0.08), ("int8-a16", 0.08), ("int4-g32", 0.7), ("int4-g32-asym", 0.7), ("fp8", 0.3), ("none", 1e-5)],
)
def test_quantised_model_gives_nearly_the_same_logits(folder, scheme, bound):
    """Bounds are wide: a random model of three layers amplifies what a trained one forgives."""
    plain, quantized = logits_of(load(folder)), logits_of(load(folder, scheme))
    assert relative_error(quantized, plain) < bound


def test_a_quantised_model_computes_with_the_weights_it_shows(folder):
    quantized, plain = load(folder, "int4-g32-a16", dtype="float64"), load(folder, dtype="float64")
    for name, layer in quantized_layers(quantized).items():
        plain.get_submodule(name).set_weight(layer.dense_weight())
    torch.testing.assert_close(logits_of(quantized), logits_of(plain), rtol=1e-9, atol=1e-9)


def test_the_head_may_have_a_scheme_of_its_own(folder):
    quantized = load(folder, "int4-g32", head="int8")
    assert quantized.head.scheme.name == "int8"
    assert quantized.layers[0].mlp.down.scheme.name == "int4-g32"


def test_biases_stay_floats_and_are_added(tmp_path):
    checkpoints.save_safetensors(checkpoints.random_model("llama-biases", seed=5), tmp_path, sharded=False)
    plain, quantized = load(tmp_path), load(tmp_path, "int8-a16")
    assert torch.equal(quantized.layers[1].attention.qkv.bias, plain.layers[1].attention.qkv.bias)
    assert relative_error(logits_of(quantized), logits_of(plain)) < 0.08


@pytest.mark.parametrize("case", ["qwen3-moe", "mixtral"])
def test_experts_are_quantised_and_their_router_is_not(tmp_path, case):
    checkpoints.save_safetensors(checkpoints.random_model(case, seed=5), tmp_path, sharded=False)
    quantized = load(tmp_path, "int8")
    moe = quantized.layers[0].mlp
    assert not isinstance(moe.router, QuantizedLinear)
    assert all(isinstance(expert.gate_up, QuantizedLinear) for expert in moe.experts)
    assert relative_error(logits_of(quantized), logits_of(load(tmp_path))) < 0.15


def test_stacked_experts_of_a_gguf_are_read_one_by_one(tmp_path):
    model = checkpoints.random_model("mixtral", seed=6)
    hf = checkpoints.save_safetensors(model, tmp_path / "hf", sharded=False)
    path = checkpoints.save_gguf(model, hf, tmp_path / "model.gguf")
    assert relative_error(logits_of(load(path, "int8-a16")), logits_of(load(path))) < 0.15


def test_narrow_floats_stay_narrow_and_exact(tmp_path, monkeypatch):
    model = checkpoints.random_model("llama3", seed=8).bfloat16()
    checkpoints.save_safetensors(model, tmp_path, sharded=False)
    seen = []

    def factory(weight, activation, dtype):
        seen.append(weight.dtype)
        return ReferenceKernel(weight, activation, dtype)

    transform = quantize_model(find_scheme("as-stored"), kernel_factory=factory)
    stored = load_decoder(resolve_model(str(tmp_path)), device="cpu", dtype="float32", transforms=[transform])
    assert set(seen) == {torch.bfloat16}
    assert torch.equal(stored.head.dense_weight(), load(tmp_path).head.dense_weight())


def test_weight_bytes_count_codes_scales_and_biases(folder):
    quantized = load(folder, "int8")
    layers = quantized_layers(quantized).values()
    expected = sum(layer.out_features * (layer.in_features + 4) for layer in layers)
    norms = sum(module.weight.nbytes for name, module in quantized.named_modules() if name.endswith("norm"))
    assert weight_bytes(quantized) == expected + norms
    assert all(layer.weight.device.type == "meta" for layer in layers)


def test_int4_takes_an_eighth_of_float32(folder):
    assert weight_bytes(load(folder, "int4-g32")) < 0.16 * weight_bytes(load(folder))


def test_dummy_weights_can_be_quantised_too(folder):
    quantized = load(folder, "int8", load_format="dummy")
    plain = load(folder, load_format="dummy")
    assert relative_error(quantized.head.dense_weight(), plain.head.dense_weight()) < 0.01


def test_a_scheme_that_does_not_fit_names_the_layer_before_anything_is_read(folder):
    with pytest.raises(ConfigError, match=r"attention.qkv.q \[64, 64\] cannot be quantised: int4-g128 needs rows"):
        load(folder, "int4-g128")


def test_a_weight_with_nan_is_refused_by_name(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][2, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: .* NaN"):
        load(folder, "int8")


def test_a_weight_set_by_hand_is_quantised():
    layer = QuantizedLinear(64, 10, scheme=find_scheme("int8-a16"))
    assert layer.num_bytes == 0
    weight = torch.randn(10, 64)
    layer.set_weight(weight)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=0.05, atol=0.2)
    assert layer.num_bytes == 10 * (64 + 4)


def test_a_large_matrix_is_read_in_pieces_with_the_same_result(monkeypatch):
    entry = DummySource({"w.weight": (50, 96)}).entries()["w.weight"]
    whole = find_scheme("int4-g32").quantize(entry.read(dtype=torch.float32))
    monkeypatch.setattr("aios_quant.reading.PIECE_ELEMENTS", 700)
    layer = QuantizedLinear(96, 50, scheme=find_scheme("int4-g32"))
    layer.load({"": entry}, {}, dtype=torch.float32, device=torch.device("cpu"))
    assert torch.equal(layer.dense_weight(), whole.dequantize())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("scheme", ["int8", "int4-g32-asym", "fp8", "none"])
def test_the_reference_runs_on_a_cuda_device(folder, scheme):
    transform = quantize_model(find_scheme(scheme))
    there = load_decoder(resolve_model(str(folder)), device="cuda", dtype="float32", transforms=[transform])
    tokens = torch.arange(24, device="cuda") * 7 % there.config.vocab_size
    cache = ContiguousCache(there.config, max_length=24, dtype=there.dtype, device=there.device)
    with torch.inference_mode():
        got = there.logits(there(tokens, torch.arange(24, device="cuda"), cache)).cpu()
    assert relative_error(got, logits_of(load(folder, scheme))) < 0.01
