"""A `config.json` of our own says what the original said, to us and to transformers."""

from __future__ import annotations

import json
from dataclasses import replace

import checkpoints
import pytest
import torch
import transformers

from aios_model.config import ModelConfig
from aios_model.config_file import read_model_config
from aios_model.errors import UnsupportedModelError
from aios_model.families import FAMILIES, find_hf_family
from aios_model.layers.rope import scaled_frequencies
from aios_model.weights.hub import resolve_model
from aios_quant.writing.hf_config import hf_config
from aios_quant.writing.rope_factors import with_llama3_scaling


def original(case: str) -> tuple[transformers.PretrainedConfig, ModelConfig]:
    name, fields = checkpoints.CASES[case]
    config = getattr(transformers, name)(**{**checkpoints.SHAPE, **fields}, architectures=[ARCHITECTURES[name]])
    raw = json.loads(config.to_json_string(use_diff=False))
    return config, find_hf_family(raw).read_hf(raw)


ARCHITECTURES = {
    f"{architecture.removesuffix('ForCausalLM')}Config": architecture
    for family in FAMILIES
    for architecture in family.architectures
}


def comparable(config: ModelConfig) -> ModelConfig:
    """Without fields that mean nothing to a model without experts."""
    config = replace(config, torch_dtype=None)
    return config if config.num_experts else replace(config, moe_intermediate_size=0, norm_topk_prob=True)


@pytest.mark.parametrize("case", checkpoints.CASES)
def test_every_family_reads_back_what_was_written(case):
    _, config = original(case)
    raw = json.loads(json.dumps(hf_config(config, dtype="bfloat16")))
    read = find_hf_family(raw).read_hf(raw)
    assert comparable(read) == comparable(config)
    assert read.torch_dtype == "bfloat16"


@pytest.mark.parametrize("case", checkpoints.CASES)
def test_transformers_builds_the_same_model_from_it(case, tmp_path):
    theirs, config = original(case)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(config, dtype="float32")))
    ours = transformers.AutoConfig.from_pretrained(tmp_path)
    models = []
    for each in (theirs, ours):
        torch.manual_seed(0)
        each._attn_implementation = "eager"
        models.append(
            transformers.AutoModelForCausalLM.from_config(each, experts_implementation="eager").eval().float()
        )
    tokens = torch.randint(0, 160, (1, 40))
    with torch.inference_mode():
        first, second = (model(tokens).logits for model in models)
    assert torch.equal(first, second)


def test_a_head_apart_is_said_so():
    _, config = original("qwen3")
    assert config.tie_word_embeddings
    raw = hf_config(config, dtype="bfloat16", tie_word_embeddings=False, token_ids={"eos_token_id": [2, 5]})
    assert not find_hf_family(raw).read_hf(raw).tie_word_embeddings
    assert raw["eos_token_id"] == [2, 5]


def test_a_window_makes_a_gguf_llama_a_mistral():
    _, config = original("llama3")
    windowed = replace(config, layers=tuple(replace(layer, window=9) for layer in config.layers))
    raw = hf_config(windowed, dtype="bfloat16")
    assert raw["model_type"] == "mistral"
    assert raw["sliding_window"] == 9


@pytest.mark.parametrize(
    ("case", "trait", "complaint"),
    [
        ("mistral", {"qkv_bias": True}, "qkv_bias = True"),
        ("llama3", {"qkv_bias": True}, "output_bias = False"),  # only both, or none
        ("qwen2", {"output_bias": True}, "output_bias = True"),
        ("qwen3", {"qk_norm": False}, "qk_norm = False"),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob = False"),
    ],
)
def test_what_a_family_cannot_say_is_refused_by_name(case, trait, complaint):
    _, config = original(case)
    with pytest.raises(UnsupportedModelError, match=f"cannot say that {complaint}"):
        hf_config(replace(config, **trait), dtype="bfloat16")


def test_the_bundled_model_has_a_config():
    config = read_model_config(resolve_model(None))
    raw = hf_config(config, dtype="bfloat16")
    assert raw["architectures"] == ["LlamaForCausalLM"]
    assert comparable(find_hf_family(raw).read_hf(raw)) == comparable(config)


@pytest.mark.parametrize(("factor", "context"), [(8.0, 8192), (32.0, 8192), (8.0, 32)])
def test_llama3_scaling_is_recognised_in_its_table(factor, context):
    _, config = original("llama3.1")
    scaling = replace(config.rope_scaling, factor=factor, original_max_position_embeddings=context)
    config = replace(config, head_dim=64, rope_theta=500_000.0, rope_scaling=scaling)
    scaled, _ = scaled_frequencies(config, 128)
    plain, _ = scaled_frequencies(replace(config, rope_scaling=None), 128)
    found = with_llama3_scaling(replace(config, rope_scaling=None), plain / scaled)
    torch.testing.assert_close(scaled_frequencies(found, 128)[0], scaled)


def test_a_table_nobody_published_is_refused():
    _, config = original("llama3")
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        with_llama3_scaling(config, 1 + torch.rand(config.head_dim // 2))
