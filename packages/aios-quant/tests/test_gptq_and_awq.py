"""GPTQ and AWQ checkpoints, written here by the formats' definitions, read back code by code and as whole models."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from aios_model.cache import ContiguousCache
from aios_model.decoder import DecoderModel
from aios_model.errors import CheckpointError, UnsupportedModelError
from aios_model.model import load_decoder
from aios_model.weights.hub import resolve_model
from aios_model.weights.safetensors import SafetensorsSource
from aios_quant.checkpoints.quantized_entry import QuantizedEntry
from aios_quant.checkpoints.source import open_quantized_source, quantized_checkpoint
from aios_quant.schemes.registry import find_scheme
from aios_quant.transform import quantize_model


def random_layer(rows: int, columns: int, bits: int, group_size: int, *, symmetric: bool, order: str = "plain") -> dict:
    """Codes [N, K], zero points and scales [groups, N] and the group of each column, all at random."""
    num_groups = columns // group_size
    group_index = np.arange(columns) // group_size
    if order == "permuted":
        group_index = np.random.permutation(group_index)
    elif order == "groups permuted":
        group_index = np.random.permutation(num_groups)[group_index]
    zeros = np.random.randint(1, 2**bits, (num_groups, rows))
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    return {
        "codes": np.random.randint(0, 2**bits, (rows, columns)),
        "zeros": zeros,
        "scales": (np.random.rand(num_groups, rows) * 0.02 + 0.01).astype(np.float16),
        "g_idx": group_index,
    }


def dense(layer: dict) -> torch.Tensor:
    """scale * (code - zero) in float64."""
    scales = layer["scales"].astype(np.float64)[layer["g_idx"]].T
    return torch.from_numpy(scales * (layer["codes"] - layer["zeros"][layer["g_idx"]].T))


def pack(fields: np.ndarray, bits: int, places=None) -> torch.Tensor:
    """[A, B] -> int32 [A, B * bits / 32]; field i of a word is the one at places[i], or the i-th."""
    per_word = 32 // bits
    places = range(per_word) if places is None else places
    words = np.zeros((fields.shape[0], fields.shape[1] // per_word), np.uint32)
    for word in range(words.shape[1]):
        for i, place in enumerate(places):
            words[:, word] |= fields[:, word * per_word + place].astype(np.uint32) << np.uint32(bits * i)
    return torch.from_numpy(words.view(np.int32))


def gptq_tensors(prefix: str, layer: dict, bits: int, *, version: str = "gptq", g_idx: bool = True) -> dict:
    zeros = pack(layer["zeros"], bits)
    if version == "gptq":  # one less in every field, as the writers do it: on the words
        ones = sum(1 << shift for shift in range(0, 32, bits))
        zeros = torch.from_numpy((zeros.numpy().view(np.uint32) - np.uint32(ones)).view(np.int32))
    tensors = {
        f"{prefix}.qweight": pack(layer["codes"], bits).T.contiguous(),
        f"{prefix}.qzeros": zeros,
        f"{prefix}.scales": torch.from_numpy(layer["scales"]),
    }
    if g_idx:
        tensors[f"{prefix}.g_idx"] = torch.from_numpy(layer["g_idx"].astype(np.int32))
    return tensors


def awq_tensors(prefix: str, layer: dict) -> dict:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        f"{prefix}.qweight": pack(layer["codes"].T, 4, order),
        f"{prefix}.qzeros": pack(layer["zeros"], 4, order),
        f"{prefix}.scales": torch.from_numpy(layer["scales"]),
    }


def gptq_config(bits: int = 4, group_size: int = 32, **fields) -> dict:
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, "sym": True, **fields}


def awq_config(group_size: int = 32, **fields) -> dict:
    return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm", **fields}


def open_tensors(path: Path, tensors: dict, config: dict):
    save_file(tensors, path / "layer.safetensors")
    return open_quantized_source(SafetensorsSource([path / "layer.safetensors"]), config).entries()


def check_entry(entry, layer: dict) -> None:
    """Floats and codes both are the definition's; every way of slicing agrees."""
    expected = dense(layer)
    assert isinstance(entry, QuantizedEntry)
    assert entry.shape == tuple(expected.shape)
    assert torch.equal(entry.read(dtype=torch.float64), expected)
    assert torch.equal(entry.read(rows=slice(3, 7), columns=slice(5, 21), dtype=torch.float64), expected[3:7, 5:21])
    index = torch.tensor([7, 0, 7])
    assert torch.equal(entry.gather(index, dtype=torch.float64), expected[index])
    weight = entry.quantized()
    order = entry.column_order_K
    assert torch.equal(weight.dequantize(torch.float64), expected if order is None else expected[:, order])
    assert torch.equal(entry.quantized(rows=slice(2, 5)).dequantize(), weight.dequantize()[2:5])
    entry.release()
    assert torch.equal(entry.read(dtype=torch.float32), expected.float())


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size", "columns"), [(4, 32, 96), (4, 128, 256), (8, 64, 128), (4, -1, 64)])
def test_gptq_layer_equals_its_definition(tmp_path, version, symmetric, bits, group_size, columns):
    layer = random_layer(24, columns, bits, columns if group_size == -1 else group_size, symmetric=symmetric)
    config = gptq_config(bits, group_size, checkpoint_format=version)
    entries = open_tensors(tmp_path, gptq_tensors("a.b", layer, bits, version=version), config)
    assert list(entries) == ["a.b.weight"]
    check_entry(entries["a.b.weight"], layer)
    weight = entries["a.b.weight"].quantized()
    assert (weight.mins_NG is None) == symmetric
    assert weight.zero == (2 ** (bits - 1) if symmetric else 0)
    assert weight.scales_NG.dtype == (torch.float16 if symmetric else torch.float32)


def test_gptq_zero_points_of_zero_are_read_as_their_writers_meant_them(tmp_path):
    layer = random_layer(16, 64, 4, 32, symmetric=False)
    layer["zeros"][:, ::3] = 0
    entries = open_tensors(tmp_path, gptq_tensors("a", layer, 4), gptq_config())
    check_entry(entries["a.weight"], layer)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_with_act_order_brings_its_columns_together(tmp_path, symmetric):
    layer = random_layer(16, 128, 4, 32, symmetric=symmetric, order="permuted")
    entries = open_tensors(tmp_path, gptq_tensors("a", layer, 4), gptq_config(desc_act=True))
    assert entries["a.weight"].column_order_K is not None
    check_entry(entries["a.weight"], layer)


def test_gptq_with_whole_groups_in_another_order_needs_no_permutation(tmp_path):
    layer = random_layer(16, 128, 4, 32, symmetric=False, order="groups permuted")
    entries = open_tensors(tmp_path, gptq_tensors("a", layer, 4), gptq_config())
    assert entries["a.weight"].column_order_K is None
    check_entry(entries["a.weight"], layer)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "columns"), [(32, 96), (128, 128), (-1, 64), (128, 64)])
def test_awq_layer_equals_its_definition(tmp_path, symmetric, group_size, columns):
    actual = columns if group_size == -1 else min(group_size, columns)
    layer = random_layer(24, columns, 4, actual, symmetric=symmetric)
    entries = open_tensors(tmp_path, awq_tensors("a.b", layer), awq_config(group_size))
    assert list(entries) == ["a.b.weight"]
    check_entry(entries["a.b.weight"], layer)


def write_model(folder: Path, method: str, *, act_order: bool = False, bits: int = 4) -> dict[str, torch.Tensor]:
    """A tiny checkpoint in `method`'s format; returns its dense weights."""
    model = checkpoints.random_model("llama3", seed=11)
    checkpoints.save_safetensors(model, folder, sharded=False)
    tensors = load_file(folder / "model.safetensors")
    denses = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors.pop(name).shape
        prefix = name.removesuffix(".weight")
        layer = random_layer(rows, columns, bits, 32, symmetric=False, order="permuted" if act_order else "plain")
        if act_order and not prefix.endswith("q_proj"):
            layer["g_idx"] = denses.setdefault(f"order {columns} {prefix.split('.')[2]}", layer["g_idx"])
        layer["zeros"] = np.clip(layer["zeros"], 2 ** (bits - 1) - 2, 2 ** (bits - 1) + 2)
        layer["scales"] = (layer["scales"] * (0.8 if bits == 4 else 0.05)).astype(np.float16)
        denses[name] = dense(layer)
        tensors.update(gptq_tensors(prefix, layer, bits) if method == "gptq" else awq_tensors(prefix, layer))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = gptq_config(bits, desc_act=act_order) if method == "gptq" else awq_config()
    (folder / "config.json").write_text(json.dumps(config))
    return {name: weight for name, weight in denses.items() if name.endswith(".weight")}


def load(folder: Path, scheme: str | None, dtype: str = "float64") -> DecoderModel:
    transforms = [] if scheme is None else [quantize_model(find_scheme(scheme))]
    return load_decoder(
        resolve_model(str(folder)),
        device="cpu",
        dtype=dtype,
        transforms=transforms,
        source_transforms=[quantized_checkpoint],
    )


def logits_of(decoder: DecoderModel) -> torch.Tensor:
    tokens = torch.arange(20) * 11 % decoder.config.vocab_size
    cache = ContiguousCache(decoder.config, max_length=20, dtype=decoder.dtype, device=decoder.device)
    with torch.inference_mode():
        return decoder.logits(decoder(tokens, torch.arange(20), cache))


@pytest.mark.parametrize(
    ("method", "act_order", "bits"), [("gptq", False, 4), ("gptq", True, 4), ("gptq", False, 8), ("awq", False, 4)]
)
def test_quantised_checkpoints_load_and_equal_their_dequantised_weights(tmp_path, method, act_order, bits):
    denses = write_model(tmp_path, method, act_order=act_order, bits=bits)
    plain = load(tmp_path, None)
    assert torch.equal(plain.layers[2].mlp.down.dense_weight(), denses["model.layers.2.mlp.down_proj.weight"])
    keys = [denses[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(plain.layers[1].attention.qkv.dense_weight(), torch.cat(keys))
    expected = logits_of(plain)
    torch.testing.assert_close(logits_of(load(tmp_path, "as-stored-a16")), expected, rtol=1e-5, atol=1e-5)
    error = (logits_of(load(tmp_path, "as-stored")) - expected).norm() / expected.norm()
    assert error < 0.1
    qkv = load(tmp_path, "as-stored-a16").layers[1].attention.qkv
    torch.testing.assert_close(qkv.dense_weight(), torch.cat(keys), rtol=1e-6, atol=1e-6)
    assert len(qkv.kernels) == (2 if act_order else 1)  # q has an order of its own, k and v share theirs


def test_zeros_written_as_biases_of_a_model_that_has_none_are_left_out(tmp_path):
    write_model(tmp_path, "gptq")
    expected = logits_of(load(tmp_path, None))
    tensors = load_file(tmp_path / "model.safetensors")
    rows = tensors["model.layers.0.mlp.down_proj.scales"].shape[1]
    tensors["model.layers.0.mlp.down_proj.bias"] = torch.zeros(rows, dtype=torch.float16)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits_of(load(tmp_path, None)), expected)
    tensors["model.layers.0.mlp.down_proj.bias"][3] = 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj\.bias, which llama does not use"):
        load(tmp_path, None)


def test_a_quantised_checkpoint_can_be_quantised_to_another_scheme(tmp_path):
    write_model(tmp_path, "awq")
    layer = load(tmp_path, "int8-a16", "float32").layers[0].mlp.gate_up
    assert "8 bits per row" in repr(layer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "bits = 3 is not supported; supported: 4, 8"),
        ({"bits": 2**70}, "bits"),
        ({"bits": True}, "bits = True"),
        ({"group_size": 0}, "group_size = 0"),
        ({"group_size": 20}, "group_size = 20"),
        ({"group_size": "all"}, "group_size = 'all'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
        ({"is_marlin_format": True}, "is_marlin_format"),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, "settings of their own"),
        ({"quant_method": "aqlm"}, "quant_method = 'aqlm' is not supported; supported: gptq, awq, compressed-tensors"),
        ({"quant_method": None}, "quant_method = None"),
    ],
)
def test_unsupported_gptq_options_are_named(tmp_path, changes, message):
    layer = random_layer(16, 64, 4, 32, symmetric=True)
    with pytest.raises(UnsupportedModelError, match=message):
        open_tensors(tmp_path, gptq_tensors("a", layer, 4), {**gptq_config(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "bits = 8 is not supported; supported: 4"),
        ({"version": "gemv"}, "version = 'gemv'"),
        ({"backend": "llm-awq"}, "llm-awq"),
        ({"zero_point": "yes"}, "zero_point"),
    ],
)
def test_unsupported_awq_options_are_named(tmp_path, changes, message):
    layer = random_layer(16, 64, 4, 32, symmetric=True)
    with pytest.raises(UnsupportedModelError, match=message):
        open_tensors(tmp_path, awq_tensors("a", layer), {**awq_config(), **changes})


def test_missing_and_misshapen_companions_are_named(tmp_path):
    layer = random_layer(16, 64, 4, 32, symmetric=True)
    good = gptq_tensors("a", layer, 4)
    wrong_groups = torch.zeros(64, dtype=torch.int32)
    for changes, message in (
        ({"a.scales": None}, "holds a.qweight but lacks a.scales"),
        ({"a.qzeros": None}, "lacks a.qzeros"),
        ({"a.scales": good["a.scales"][:1]}, r"tensor a.scales has shape \[1, 16\], expected \[2, 16\]"),
        ({"a.qzeros": good["a.qzeros"].to(torch.int64)}, "tensor a.qzeros is stored as I64, expected I32"),
        ({"a.qweight": good["a.qweight"].float()}, "tensor a.qweight is stored as F32"),
        ({"a.qweight": good["a.qweight"].flatten()}, r"tensor a.qweight has shape \[128\], expected a matrix"),
        ({"a.qweight": good["a.qweight"][:7]}, "do not divide it"),
        ({"a.g_idx": wrong_groups + 5}, "tensor a.g_idx names groups 5 to 5 of 2"),
        ({"a.g_idx": torch.arange(64, dtype=torch.int32) % 3 // 2}, "tensor a.g_idx gives a group"),
        ({"a.g_idx": wrong_groups[:9]}, "tensor a.g_idx has shape"),
    ):
        tensors = {name: tensor for name, tensor in {**good, **changes}.items() if tensor is not None}
        with pytest.raises(CheckpointError, match=message):
            open_tensors(tmp_path, {name: tensor.contiguous() for name, tensor in tensors.items()}, gptq_config())
    awq = awq_tensors("a", layer)
    del awq["a.qzeros"]
    with pytest.raises(CheckpointError, match=r"lacks a\.qzeros"):
        open_tensors(tmp_path, awq, awq_config())


def test_a_quantised_checkpoint_is_refused_where_nothing_reads_it(tmp_path):
    write_model(tmp_path, "gptq")
    with pytest.raises(UnsupportedModelError, match=r"quantised \(gptq\).*aios-quant"):
        load_decoder(resolve_model(str(tmp_path)), device="cpu")


def test_plain_checkpoints_pass_through_the_source_transform(tmp_path):
    checkpoints.save_safetensors(checkpoints.random_model("llama3", seed=2), tmp_path, sharded=False)
    files = resolve_model(str(tmp_path))
    source = SafetensorsSource(files.weight_paths)
    assert quantized_checkpoint(source, files) is source
