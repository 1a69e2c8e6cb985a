"""compressed-tensors checkpoints, written and decoded by the library of that name as the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file

from aios_model.cache import ContiguousCache
from aios_model.errors import CheckpointError, UnsupportedModelError
from aios_model.model import load_decoder
from aios_model.weights.hub import resolve_model
from aios_model.weights.safetensors import SafetensorsSource
from aios_quant.checkpoints.source import open_quantized_source, quantized_checkpoint
from aios_quant.quantized_tensor import Fp8Tensor
from aios_quant.schemes.registry import find_scheme
from aios_quant.transform import quantize_model

PACKED, INT, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
INPUTS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}

# format, weights
CASES = [
    (PACKED, {"num_bits": 4, "strategy": "group", "group_size": 32}),
    (PACKED, {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False}),
    (PACKED, {"num_bits": 4, "strategy": "channel"}),
    (PACKED, {"num_bits": 4, "strategy": "channel", "symmetric": False}),
    (PACKED, {"num_bits": 8, "strategy": "group", "group_size": 128}),
    (PACKED, {"num_bits": 8, "strategy": "channel"}),
    (PACKED, {"num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False}),
    (INT, {"num_bits": 8, "strategy": "channel"}),
    (INT, {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    (INT, {"num_bits": 8, "strategy": "tensor"}),
    (NAIVE, {"num_bits": 8, "strategy": "channel"}),
    (FLOAT, {"num_bits": 8, "type": "float", "strategy": "channel"}),
    (FLOAT, {"num_bits": 8, "type": "float", "strategy": "tensor"}),
]


def scheme_of(layout: str, weights: dict) -> QuantizationScheme:
    inputs = INPUTS if layout == INT else {**INPUTS, "type": "float"} if layout == FLOAT else None
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs, format=layout)


def config_of(layout: str, weights: dict, **fields) -> dict:
    group = scheme_of(layout, weights).model_dump(mode="json")
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        **fields,
    }


def compress(weight: torch.Tensor, layout: str, weights: dict, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the oracle stores for a weight; scales and zero points are random, as the format allows."""
    rows, columns = weight.shape
    groups = columns // weights["group_size"] if weights["strategy"] == "group" else 1
    shape = (1,) if weights["strategy"] == "tensor" else (rows, groups)
    levels = 448.0 if weights.get("type") == "float" else 2.0 ** (weights["num_bits"] - 1)
    scale = (torch.rand(shape) * 0.5 + 0.75) * float(weight.abs().max()) / levels
    state = {"weight": weight, "weight_scale": scale.to(scale_dtype)}
    if not weights.get("symmetric", True):
        half = 2 ** (weights["num_bits"] - 1)
        state["weight_zero_point"] = torch.randint(-half, half, shape, dtype=torch.int8)
    compressor = BaseCompressor.get_value_from_registry(layout)
    return compressor.compress(state, scheme_of(layout, weights))


def decompress(stored: dict[str, torch.Tensor], layout: str, weights: dict) -> torch.Tensor:
    return BaseCompressor.get_value_from_registry(layout).decompress(stored, scheme_of(layout, weights))["weight"]


def open_layer(path: Path, stored: dict[str, torch.Tensor], config: dict):
    save_file({f"a.b.{name}": tensor.contiguous() for name, tensor in stored.items()}, path / "layer.safetensors")
    return open_quantized_source(SafetensorsSource([path / "layer.safetensors"]), config).entries()


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("layout", "weights"), CASES, ids=str)
def test_layers_of_the_oracle_are_read_as_the_oracle_reads_them(tmp_path, layout, weights, scale_dtype):
    stored = compress(torch.randn(44, 256), layout, weights, scale_dtype)
    expected = decompress(stored, layout, weights)
    entries = open_layer(tmp_path, stored, config_of(layout, weights))
    assert list(entries) == ["a.b.weight"]
    entry = entries["a.b.weight"]
    assert entry.shape == (44, 256)
    # Exact, but for float32 scales with zero points: scale * code and the minimum are then rounded apart.
    exact = scale_dtype != torch.float32 or weights.get("symmetric", True)
    tolerance = 0 if exact else 1e-6 * float(expected.abs().max())
    torch.testing.assert_close(entry.read(dtype=scale_dtype), expected, rtol=0, atol=tolerance)
    weight = entry.quantized()
    torch.testing.assert_close(weight.dequantize(scale_dtype), expected, rtol=0, atol=tolerance)
    assert isinstance(weight, Fp8Tensor) == (layout == FLOAT)
    index = torch.tensor([43, 0])
    torch.testing.assert_close(entry.gather(index, dtype=scale_dtype), expected[index], rtol=0, atol=tolerance)


@pytest.mark.parametrize("columns", [36, 41])
def test_rows_that_end_inside_a_word_are_cut_where_the_weight_ends(tmp_path, columns):
    weights = {"num_bits": 4, "strategy": "channel"}
    stored = compress(torch.randn(5, columns), PACKED, weights, torch.float16)
    entry = open_layer(tmp_path, stored, config_of(PACKED, weights))["a.b.weight"]
    assert torch.equal(entry.read(dtype=torch.float16), decompress(stored, PACKED, weights))


def test_older_files_with_columns_grouped_by_importance_are_read(tmp_path):
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32}
    stored = compress(torch.randn(6, 128), PACKED, weights, torch.float16)
    groups = torch.randperm(128) // 32
    stored["weight_g_idx"] = groups.to(torch.int32)
    codes = stored["weight_packed"].view(torch.uint8)
    codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1).float() - 8
    config = config_of(PACKED, weights)
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    entry = open_layer(tmp_path, stored, config)["a.b.weight"]
    assert torch.equal(entry.read(dtype=torch.float32), codes * stored["weight_scale"].float()[:, groups])


def write_model(folder: Path, layout: str, weights: dict) -> dict[str, torch.Tensor]:
    """A tiny Llama whose projections the oracle has compressed; returns their weights as the oracle decodes them."""
    checkpoints.save_safetensors(checkpoints.random_model("llama3", seed=4), folder, sharded=False)
    tensors = load_file(folder / "model.safetensors")
    decoded = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name)
        stored = compress(weight, layout, weights, torch.float32)
        decoded[name] = decompress(stored, layout, weights)
        prefix = name.removesuffix(".weight")
        tensors.update({f"{prefix}.{kind}": tensor.contiguous() for kind, tensor in stored.items()})
        tensors[f"{prefix}.input_scale"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = config_of(layout, weights)
    (folder / "config.json").write_text(json.dumps(config))
    return decoded


def logits_of(folder: Path, scheme: str | None) -> torch.Tensor:
    transforms = [] if scheme is None else [quantize_model(find_scheme(scheme))]
    decoder = load_decoder(
        resolve_model(str(folder)),
        device="cpu",
        dtype="float32",
        transforms=transforms,
        source_transforms=[quantized_checkpoint],
    )
    tokens = torch.arange(20) * 11 % decoder.config.vocab_size
    cache = ContiguousCache(decoder.config, max_length=20, dtype=decoder.dtype, device=decoder.device)
    with torch.inference_mode():
        return decoder.logits(decoder(tokens, torch.arange(20), cache))


@pytest.mark.parametrize(("layout", "weights"), [CASES[0], CASES[7], CASES[11]], ids=str)
def test_whole_checkpoints_load_plain_and_packed_with_the_same_logits(tmp_path, layout, weights):
    decoded = write_model(tmp_path, layout, weights)
    plain = load_decoder(
        resolve_model(str(tmp_path)), device="cpu", dtype="float32", source_transforms=[quantized_checkpoint]
    )
    torch.testing.assert_close(
        plain.layers[1].mlp.down.dense_weight(), decoded["model.layers.1.mlp.down_proj.weight"], rtol=1e-6, atol=1e-9
    )
    expected = logits_of(tmp_path, None)
    torch.testing.assert_close(logits_of(tmp_path, "as-stored-a16"), expected, rtol=1e-3, atol=1e-3)
    assert (logits_of(tmp_path, "as-stored") - expected).norm() < 0.1 * expected.norm()


def changed(config: dict, path: str, value: object) -> dict:
    config = json.loads(json.dumps(config))
    *parents, field = path.split("/")
    target = config
    for parent in parents:
        target = target[parent]
    target[field] = value
    return config


GROUP = "config_groups/group_0"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "nvfp4-pack-quantized", "format = 'nvfp4-pack-quantized' is not supported"),
        ("format", None, "format = None"),
        ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config"),
        ("transform_config", {"config_groups": {}}, "transform_config"),
        ("quantization_status", "frozen", "quantization_status = 'frozen'"),
        ("config_groups", {}, "config_groups"),
        ("config_groups", {"W4A16": ["Linear"]}, "W4A16"),
        (f"{GROUP}/weights", None, "does not say how weights are stored"),
        (f"{GROUP}/weights/num_bits", 3, "num_bits = 3 is not supported; supported: 4, 8"),
        (f"{GROUP}/weights/num_bits", 2**65, "num_bits"),
        (f"{GROUP}/weights/num_bits", -4, "num_bits = -4"),
        (f"{GROUP}/weights/type", "float", "num_bits = 4"),
        (f"{GROUP}/weights/strategy", "block", "strategy = 'block'"),
        (f"{GROUP}/weights/group_size", 2**60, "group_size"),
        (f"{GROUP}/weights/group_size", "32", "group_size = '32'"),
        (f"{GROUP}/weights/dynamic", True, "dynamic"),
        (f"{GROUP}/targets", "Linear", "targets must be a list"),
        (f"{GROUP}/targets", ["re:("], "no valid pattern"),
        ("ignore", [3], "ignore must be a list"),
    ],
)
def test_unsupported_options_are_named(tmp_path, path, value, message):
    layout, weights = CASES[0]
    stored = compress(torch.randn(8, 64), layout, weights, torch.float16)
    with pytest.raises(UnsupportedModelError, match=message):
        open_layer(tmp_path, stored, changed(config_of(layout, weights), path, value))


def test_missing_misshapen_and_contradicting_tensors_are_named(tmp_path):
    layout, weights = CASES[1]
    config = config_of(layout, weights)
    good = compress(torch.randn(8, 64), layout, weights, torch.float16)
    for changes, message in (
        ({"weight_scale": None}, r"lacks a\.b\.weight_scale"),
        ({"weight_shape": None}, r"lacks a\.b\.weight_shape"),
        ({"weight_zero_point": None}, r"lacks a\.b\.weight_zero_point"),
        ({"weight_shape": torch.tensor([8, -1])}, r"weight_shape says \[8, -1\]"),
        ({"weight_shape": torch.tensor([8, 2**40])}, "weight_shape says"),
        ({"weight_shape": torch.tensor([8, 32])}, "too many for 32 columns"),
        ({"weight_scale": torch.ones(8, 3)}, r"a\.b\.weight_scale has shape \[8, 3\], expected \[8, 1\]"),
        ({"weight_zero_point": torch.ones(8, 1)}, r"a\.b\.weight_zero_point has shape"),
        ({"weight_packed": good["weight_packed"].long()}, r"a\.b\.weight_packed is stored as I64"),
    ):
        stored = {name: tensor for name, tensor in {**good, **changes}.items() if tensor is not None}
        with pytest.raises(CheckpointError, match=message):
            open_layer(tmp_path, stored, config)
    with pytest.raises(CheckpointError, match="not to be quantised"):
        open_layer(tmp_path, good, changed(config, "ignore", ["re:a.*"]))
    with pytest.raises(CheckpointError, match="stored as int-quantized"):
        open_layer(tmp_path, good, config_of(*CASES[7]))


def test_the_most_specific_target_decides(tmp_path):
    coarse, fine = CASES[0][1], CASES[1][1]
    config = config_of(PACKED, coarse)
    config["config_groups"]["group_1"] = {**scheme_of(PACKED, fine).model_dump(mode="json"), "targets": ["re:.*b$"]}
    stored = compress(torch.randn(8, 64), PACKED, fine, torch.float16)
    entry = open_layer(tmp_path, stored, config)["a.b.weight"]
    assert torch.equal(entry.read(dtype=torch.float16), decompress(stored, PACKED, fine))


def test_plain_tensors_beside_quantised_ones_pass_through(tmp_path):
    stored = compress(torch.randn(8, 64), *CASES[0], torch.float16)
    tensors = {"bias": torch.randn(8), **stored}
    entries = open_layer(tmp_path, tensors, config_of(*CASES[0]))
    assert set(entries) == {"a.b.weight", "a.b.bias"}
