"""Configs are read in all their spellings, and what we cannot honour is refused by name."""

from __future__ import annotations

import pytest

from aios_model.config import check_context_length
from aios_model.errors import ConfigError, UnsupportedModelError
from aios_model.families import find_gguf_family, find_hf_family

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def read(**changes):
    raw = {**BASE, **changes}
    return find_hf_family(raw).read_hf(raw)


def test_old_and_new_spellings_of_rope_scaling_read_alike():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    old = read(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    new = read(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    assert old == new
    assert old.rope_theta == 5e5
    assert read(rope_scaling={"type": "linear", "factor": 2.0}).rope_scaling.factor == 2.0


def test_missing_kv_heads_and_head_size_follow_from_the_others():
    config = read()
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)
    assert config.layers[0].scale == 0.25


def test_qwen_windows_follow_layer_types_or_max_window_layers():
    raw = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8}
    assert [spec.window for spec in read(**raw, max_window_layers=1).layers] == [None, 8]
    kinds = ["sliding_attention", "full_attention"]
    assert [spec.window for spec in read(**raw, layer_types=kinds).layers] == [8, None]
    assert [spec.window for spec in read(**{**raw, "use_sliding_window": False}).layers] == [None, None]


def test_dynamic_rope_lets_the_context_grow_by_its_factor():
    config = read(rope_scaling={"type": "dynamic", "factor": 2.0})
    check_context_length(config, 256)
    with pytest.raises(ConfigError, match=r"257.*256"):
        check_context_length(config, 257)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM"),
        ({"architectures": None, "model_type": "bert"}, "bert"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope'.*llama3"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be 1.0 or more, got 0.5"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1]}}, "mrope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"num_attention_heads": 0, "head_dim": 16}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": 15}, "odd"),
        ({"vocab_size": "many"}, "vocab_size must be an integer, got 'many'"),
        ({"num_hidden_layers": 0}, "no layers"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        read(**changes)


def test_too_many_experts_per_token_are_refused():
    with pytest.raises(UnsupportedModelError, match="num_experts_per_tok = 9"):
        read(architectures=["MixtralForCausalLM"], num_local_experts=8, num_experts_per_tok=9)


def test_unknown_gguf_architectures_are_refused_with_the_known_ones():
    with pytest.raises(UnsupportedModelError, match=r"'falcon'.*qwen3moe"):
        find_gguf_family({"general.architecture": "falcon"})


def test_a_gguf_of_llama_architecture_with_experts_is_mixtral():
    assert find_gguf_family({"general.architecture": "llama", "llama.expert_count": 8}).name == "mixtral"
    assert find_gguf_family({"general.architecture": "llama"}).name == "llama"
