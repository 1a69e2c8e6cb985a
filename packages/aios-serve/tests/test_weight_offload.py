"""`--cpu-offload-gb` through the loading of a model: plain and packed weights, what is reported, what is refused.

On the device of the tests of aios-parallel, which computes on the CPU and checks what orders copies and reads.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from fake_streaming import FakeDevice

from aios_model.cache import ContiguousCache
from aios_model.errors import ConfigError
from aios_model.model import load_decoder, weight_bytes
from aios_model.weights.hub import resolve_model
from aios_parallel.offload.streaming import tensors_of
from aios_parallel.offload.weights import WeightOffload
from aios_quant.schemes.registry import find_scheme
from aios_quant.transform import quantize_model
from aios_serve.assembly import scheduler_config
from aios_serve.build import describe
from aios_serve.config import EngineConfig
from aios_serve.model_part import ModelPart

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the device of the tests is a CPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("six-layers")
    shape = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **shape, **heads}))
    return path


@torch.inference_mode()
def logits_of(decoder, num_steps=3):
    cache = ContiguousCache(decoder.config, max_length=64, dtype=decoder.dtype, device=decoder.device)
    out = []
    for step in range(num_steps):
        tokens = torch.arange(5) * (step + 3) % decoder.config.vocab_size
        hidden = decoder(tokens, torch.arange(cache.length, cache.length + 5), cache)
        cache.advance(5)
        out.append(decoder.logits(hidden))
    return torch.cat(out)


def watch(device, decoder):
    for layer in decoder.layers:
        device.watch(layer, tensors_of(layer))


def load(folder, config, device):
    return ModelPart.load(
        config, resolve_model(folder, tokenizer_only=True), streaming=device, progress=lambda *_: None
    )


@pytest.mark.parametrize("scheme", ["int8", "int8-a16", "int4-g32", "fp8"])
def test_packed_weights_are_offloaded_too(folder, scheme):
    transform, files = quantize_model(find_scheme(scheme)), resolve_model(folder, tokenizer_only=True)
    plain = load_decoder(files, device="cpu", load_format="dummy", dtype="float32", transforms=[transform])
    sizes = [sum(tensor.nbytes for tensor in tensors_of(layer)) for layer in plain.layers]
    device = FakeDevice()
    offload = WeightOffload(sizes[0] * 4, device, dtype=torch.float32)
    moved = load_decoder(
        files,
        device="cpu",
        load_format="dummy",
        dtype="float32",
        transforms=[transform, offload.choose],
        on_loaded=offload.take,
    )
    weights = offload.install(moved)
    assert len(weights.layers) == 4
    assert weights.num_host_bytes == 4 * sizes[0]
    watch(device, moved)
    assert torch.equal(logits_of(moved), logits_of(plain))
    assert device.num_copies > 8
    assert weight_bytes(moved) == weight_bytes(plain)


def test_an_engine_says_what_is_where(folder):
    plain = load(folder, EngineConfig(load_format="dummy", dtype="float64", quantization="none"), None)
    size = sum(tensor.nbytes for tensor in tensors_of(plain.decoder.layers[0]))
    config = EngineConfig(
        load_format="dummy", dtype="float64", quantization="none", cpu_offload_gb=3 * size / 2**30, max_model_len=64
    )
    device = FakeDevice()
    part = load(folder, config, device)
    watch(device, part.decoder)
    assert torch.equal(logits_of(part.decoder), logits_of(plain.decoder))
    plan = part.plan()
    limits = scheduler_config(config, plan, on_cpu=True)
    files = resolve_model(folder, tokenizer_only=True)
    info = describe(config, files, part, plan, limits, import_seconds=0, load_seconds=0)
    assert info.num_offloaded_bytes == 3 * size
    assert 2 * size <= info.num_staging_bytes < 3 * size
    assert info.num_weight_bytes == weight_bytes(plain.decoder)
    info = describe(config, files, plain, plan, limits, import_seconds=0, load_seconds=0)
    assert info.num_offloaded_bytes == info.num_staging_bytes == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"cpu_offload_gb cannot be used on device 'cpu': its weights are in host memory already"),
        ({"cpu_offload_gb": 1e9}, r"of host memory are free for each of 1 processes"),
        ({"cpu_offload_gb": 0.05}, r"all layers held here have .* GiB; ask for less"),
        ({"cpu_offload_gb": 1e-6}, r"would free nothing"),
    ],
)
def test_what_cannot_be_honoured_is_refused(folder, change, message):
    config = EngineConfig(load_format="dummy", dtype="float64", quantization="none", cpu_offload_gb=0.001)
    with pytest.raises(ConfigError, match=message):
        load(folder, replace(config, **change), FakeDevice() if change else None)
