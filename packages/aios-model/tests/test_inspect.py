"""The arithmetic of a model agrees with the model that is built, and with figures known from elsewhere."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from aios_model.errors import ConfigError
from aios_model.families import find_hf_family
from aios_model.hardware import DATASHEETS, find_hardware
from aios_model.inspect import active_parameters, count_parameters, flops_per_token, kv_bytes, num_parameters, roofline

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}


def config_of(raw):
    return find_hf_family(raw).read_hf(raw)


def test_a_7b_model_has_its_known_parameters_and_14_gflop_per_token():
    config = config_of(LLAMA_2_7B)
    assert num_parameters(config) == 6_738_415_616
    assert flops_per_token(config, context=1) == pytest.approx(13.2e9, rel=0.01)
    assert config.kv_bytes_per_token(2) == 2 * 32 * 32 * 128 * 2


def test_a_mixture_counts_all_experts_as_parameters_and_the_visited_ones_as_work():
    config = config_of(QWEN3_30B_A3B)
    assert num_parameters(config) == 30_532_122_624
    assert active_parameters(config) == pytest.approx(3.0e9, rel=0.02)


def test_windows_bound_what_is_read_back():
    raw = {**LLAMA_2_7B, "architectures": ["MistralForCausalLM"], "sliding_window": 1024}
    config = config_of(raw)
    assert kv_bytes(config, context=4096, dtype_bytes=2) == kv_bytes(config, context=1024, dtype_bytes=2)
    assert flops_per_token(config, context=4096) == flops_per_token(config, context=1024)


@pytest.mark.parametrize("raw", [LLAMA_2_7B, QWEN3_30B_A3B], ids=["dense", "moe"])
def test_counts_agree_with_the_decoder_that_is_built(raw):
    from aios_model.decoder import DecoderModel
    from aios_model.loader import parameter_shapes

    small = {**raw, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]}
    config = config_of(small)
    shapes = parameter_shapes(DecoderModel(config))
    assert num_parameters(config) == sum(math.prod(shape) for shape in shapes.values())


def test_the_roofline_is_bytes_over_bandwidth_and_batches_until_arithmetic_binds():
    config = config_of(LLAMA_2_7B)
    limit = roofline(config, find_hardware("h100"), context=1, bytes_per_weight=2, kv_dtype_bytes=2)
    assert limit.tokens_per_second == pytest.approx(3.35e12 / 13.2e9, rel=0.01)
    assert limit.balanced_batch == round(989e12 / 3.35e12)
    assert limit.max_context_tokens == pytest.approx((80e9 - 13.48e9) / 524_288, rel=0.01)


def test_weights_that_do_not_fit_leave_no_room_for_context():
    limit = roofline(config_of(LLAMA_2_7B), DATASHEETS["t4"], context=1, bytes_per_weight=4, kv_dtype_bytes=2)
    assert limit.max_context_tokens == 0


def test_unknown_hardware_is_refused_with_the_known_names():
    with pytest.raises(ConfigError, match=r"'tpu'.*h100"):
        find_hardware("tpu")


def test_parts_are_listed_in_the_order_a_token_meets_them():
    names = [part.name for part in count_parameters(config_of(QWEN3_30B_A3B))]
    assert names == ["embedding", "attention", "experts", "norms", "head"]


def test_the_arithmetic_needs_no_torch():
    code = "import sys, aios_model.inspect, aios_model.config_file; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
