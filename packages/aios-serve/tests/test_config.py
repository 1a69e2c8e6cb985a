"""EngineConfig: what is refused, and that the message helps."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import msgspec
import pytest

from aios_model.errors import ConfigError
from aios_sched.speculative.config import SpeculativeConfig
from aios_serve.config import EngineConfig, parse_count


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_num_seqs": 0}, ["max_num_seqs=0", "at least 1"]),
        ({"max_num_seqs": "8"}, ["max_num_seqs='8'", "int"]),
        ({"max_num_seqs": True}, ["max_num_seqs=True", "int"]),
        ({"max_num_seqs": 2**63}, ["max_num_seqs", "at least 1"]),
        ({"max_model_len": -1}, ["max_model_len=-1"]),
        ({"block_size": 0}, ["block_size=0"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"dtype": "int8"}, ["dtype='int8'", "bfloat16"]),
        ({"device": "tpu"}, ["device='tpu'", "cuda"]),
        ({"load_format": "pickle"}, ["load_format='pickle'", "safetensors"]),
        ({"kv_cache_dtype": "fp8_e5m2"}, ["kv_cache_dtype='fp8_e5m2'", "int8, fp8"]),
        ({"kv_offloading_size": -1}, ["kv_offloading_size=-1", "at least 0"]),
        ({"kv_offloading_disk_size": 5}, ["kv_offloading_disk_size=5", "through kv_offloading_size"]),
        ({"kv_offloading_size": 5, "kv_offloading_path": "/x"}, ["kv_offloading_path='/x'", "disk_size"]),
        ({"kv_offloading_size": 5, "kv_cache_policy": "contiguous"}, ["kv_offloading_size=5", "no pages"]),
        ({"preemption_mode": "swap"}, ["preemption_mode='swap'", "kv_offloading_size"]),
        ({"preemption_mode": "never"}, ["preemption_mode='never'", "recompute"]),
        ({"speculative": {"method": "guess"}}, ["speculative={'method': 'guess'}", "method='guess'", "ngram"]),
        ({"speculative": {"method": "ngram", "k": 2}}, ["unknown option 'k'", "num_speculative_tokens"]),
        ({"speculative": '{"method": "ngram", "prompt_lookup_min": 0}'}, ["prompt_lookup_min=0", "at least 1"]),
        ({"speculative": {"method": "self"}, "tensor_parallel": 2}, ["speculative='self'", "one device", "suffix"]),
        ({"speculative": {"method": "draft_model"}}, ["model=None", "'draft_model' needs it"]),
        ({"speculative": {"method": "early_exit"}}, ["num_layers=None", "'early_exit' needs it"]),
        ({"speculative": "ngram"}, ["speculative='ngram'", "no JSON"]),
        ({"speculative": 4}, ["speculative=4", "None or SpeculativeConfig"]),
        ({"kv_cache_policy": "swap"}, ["kv_cache_policy='swap'", "contiguous"]),
        ({"device_memory_utilization": 1.5}, ["device_memory_utilization=1.5", "0.9"]),
        ({"device_memory_utilization": float("nan")}, ["device_memory_utilization=nan"]),
        ({"heartbeat_timeout": float("inf")}, ["heartbeat_timeout=inf"]),
        ({"served_model_name": ("a", "")}, ["served_model_name"]),
        ({"max_num_batched_tokens": 4, "max_num_seqs": 8}, ["max_num_batched_tokens=4", "max_num_seqs=8"]),
        ({"kv_cache_memory_bytes": 1, "num_gpu_blocks_override": 1}, ["kv_cache_memory_bytes", "one of them"]),
        (
            {"max_model_len": 4081, "num_gpu_blocks_override": 255},
            ["num_gpu_blocks_override=255", "max_model_len=4081", "256 pages of 16", "hold 4080 tokens", "to 4080"],
        ),
        ({"pipeline_parallel": 0}, ["pipeline_parallel=0", "at least 1"]),
        ({"expert_parallel": True}, ["expert_parallel=True", "2 or more"]),
        ({"max_engine_restarts": -1}, ["max_engine_restarts=-1"]),
        ({"cpu_offload_gb": -1.0}, ["cpu_offload_gb=-1.0", "from 0"]),
        ({"cpu_offload_gb": float("nan")}, ["cpu_offload_gb=nan"]),
        ({"cpu_offload_gb": 1.5, "device": "cpu"}, ["cpu_offload_gb=1.5", "in host memory already"]),
        ({"data_parallel": 0}, ["data_parallel=0"]),
        ({"data_parallel": 2, "engine_process": False}, ["data_parallel=2", "engine_process"]),
        ({"data_parallel_routing": "random"}, ["data_parallel_routing='random'", "prefix-affinity"]),
        ({"quantization": "int3"}, ["quantization='int3'", "int8", "as-stored"]),
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused_by_name(options, words):
    with pytest.raises(ConfigError) as refusal:
        EngineConfig(**options)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize("options", [{}, {"kv_cache_policy": "contiguous", "num_gpu_blocks_override": 1}])
def test_the_smallest_pool_for_a_length_is_accepted(options):
    config = EngineConfig(**{"max_model_len": 4080, "num_gpu_blocks_override": 255} | options)
    assert config.max_model_len == 4080


def test_an_unknown_option_names_the_closest_known_one():
    with pytest.raises(ConfigError, match=r"'max_num_seq'.*did you mean 'max_num_seqs'"):
        EngineConfig.from_options(max_num_seq=3)


def test_aliases_and_paths_are_brought_to_one_form():
    config = EngineConfig(
        model=Path("a/b"),
        served_model_name="one",
        quantization=None,
        generation_config="vllm",
        kv_cache_dtype="fp8_e4m3",
        device_memory_utilization=1,
    )
    assert config.model == str(Path("a/b"))
    assert config.served_model_name == ("one",)
    assert config.quantization == "none"
    assert config.generation_config == "none"
    assert config == EngineConfig(
        model=str(Path("a/b")),
        served_model_name=("one",),
        quantization="none",
        generation_config="none",
        kv_cache_dtype="fp8",
        device_memory_utilization=1.0,
    )


def test_a_config_survives_the_wire():
    config = EngineConfig(model="m", served_model_name=("a", "b"), max_model_len=128, device_memory_utilization=0.5)
    weights = EngineConfig(scheduling_policy="fair", tenant_weights={"a": 2, "b": 0.5}, request_timeout=3)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(weights), type=EngineConfig) == weights
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=EngineConfig) == config


def test_speculation_is_read_from_a_dict_from_json_and_from_what_asdict_makes_of_it():
    wanted = SpeculativeConfig(method="ngram", num_speculative_tokens=3)
    config = EngineConfig(speculative={"method": "ngram", "num_speculative_tokens": 3})
    assert config.speculative == wanted
    assert EngineConfig(speculative='{"method": "ngram", "num_speculative_tokens": 3}') == config
    assert EngineConfig(speculative=wanted) == config
    assert EngineConfig(**asdict(config)) == config
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=EngineConfig) == config


@pytest.mark.parametrize(
    ("text", "count"),
    [("8192", 8192), ("8k", 8192), ("8K", 8192), ("1.5k", 1536), ("4GiB", 4 * 2**30), ("4 gb", 4 * 2**30), ("10b", 10)],
)
def test_counts_are_read_as_people_write_them(text, count):
    assert parse_count(text, option="x") == count


@pytest.mark.parametrize("text", ["", "k", "-1", "8kk", "1e3", "8 q", "٣"])
def test_what_is_no_count_is_refused_with_the_option(text):
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes"):
        parse_count(text, option="kv_cache_memory_bytes")
