"""How large the pool becomes, and what is said when it cannot."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from aios_kvcache.errors import PoolTooSmallError
from aios_kvcache.sizing import available_memory, device_budget, native_kv_bytes_per_token, plan_pool
from aios_model.config import LayerSpec, ModelConfig, RopeScaling
from aios_model.errors import ConfigError

BYTES_PER_TOKEN = 2 * 2 * (3 * 64 + 1 * 32)  # keys and values, 2 bytes each, over two unlike layers
GIB = 1 << 30


def config(max_position_embeddings: int = 4096) -> ModelConfig:
    layers = tuple(LayerSpec(num_key_value_heads=k, head_dim=h, window=None, scale=1.0) for k, h in ((3, 64), (1, 32)))
    return ModelConfig(
        architecture="llama",
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        rms_norm_eps=1e-6,
        max_position_embeddings=max_position_embeddings,
        layers=layers,
    )


def plan(**options):
    defaults = {"dtype_bytes": 2, "block_size": 16, "max_num_seqs": 4, "available_bytes": 64 * GIB}
    return plan_pool(options.pop("config", config()), **(defaults | options))


def test_with_plenty_of_memory_the_pool_holds_every_sequence_at_full_length_and_no_more():
    result = plan()
    assert (result.max_model_len, result.block_size, result.num_blocks) == (4096, 16, 4 * 256)
    assert result.num_bytes == (4 * 256 + 1) * 16 * BYTES_PER_TOKEN


def test_otherwise_it_takes_a_quarter_of_the_available_memory():
    available = 4 * 300 * 16 * BYTES_PER_TOKEN
    result = plan(available_bytes=available)
    assert (result.max_model_len, result.num_blocks) == (4096, 299)  # the null page is the three-hundredth
    assert result.num_bytes == available // 4


def test_an_automatic_length_is_the_models_up_to_8192():
    assert plan().max_model_len == 4096
    assert plan(config=config(131_072)).max_model_len == 8192


def test_an_automatic_length_shrinks_to_a_small_pool():
    result = plan(available_bytes=4 * 11 * 16 * BYTES_PER_TOKEN)
    assert (result.num_blocks, result.max_model_len) == (10, 160)
    assert plan(num_blocks=3).max_model_len == 48


def test_an_explicit_length_is_refused_with_needed_available_and_the_largest_that_fits():
    memory = 11 * 16 * BYTES_PER_TOKEN
    with pytest.raises(PoolTooSmallError) as caught:
        plan(max_model_len=161, memory_bytes=memory)
    message = str(caught.value)
    assert "161 tokens needs 168.00 KiB" in message
    assert "154.00 KiB is there" in message
    assert f"{BYTES_PER_TOKEN} bytes a token" in message
    fitting = int(re.findall(r"(\d+) tokens", message)[-1])
    assert fitting == 160
    assert plan(max_model_len=fitting, memory_bytes=memory).num_blocks == 10
    with pytest.raises(PoolTooSmallError, match=r"3 pages of 16 tokens.* 48 tokens"):
        plan(max_model_len=64, num_blocks=3)


def test_not_even_one_page_is_an_error_and_not_a_pool_of_nothing():
    with pytest.raises(PoolTooSmallError, match="not even one page fits: give the cache more memory"):
        plan(available_bytes=16)
    with pytest.raises(PoolTooSmallError, match="not even one page fits: give the cache more memory"):
        plan(memory_bytes=16, policy="contiguous")


def test_explicit_memory_and_explicit_pages_are_honoured():
    assert plan(num_blocks=5000).num_blocks == 5000
    assert plan(memory_bytes=5001 * 16 * BYTES_PER_TOKEN).num_blocks == 5000
    assert plan(memory_bytes=GIB).num_bytes <= GIB
    with pytest.raises(ConfigError, match="twice"):
        plan(num_blocks=1, memory_bytes=1)


def test_more_than_there_is_is_refused_instead_of_being_killed_later():
    with pytest.raises(ConfigError, match=r"2.00 GiB.*1.00 GiB of memory is available"):
        plan(memory_bytes=2 * GIB, available_bytes=GIB)
    assert plan(memory_bytes=2 * GIB, available_bytes=None).num_bytes > GIB


def test_a_length_beyond_the_model_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"4097 .*4096"):
        plan(max_model_len=4097)


@pytest.mark.parametrize("name", ["max_model_len", "num_blocks", "memory_bytes", "block_size", "max_num_seqs"])
def test_sizes_below_one_are_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"{name} must be positive, got 0"):
        plan(**{name: 0})
    with pytest.raises(ConfigError, match="contiguous"):
        plan(policy="segmented")


def test_the_contiguous_policy_reserves_full_length_per_sequence():
    result = plan(policy="contiguous")
    assert (result.num_blocks, result.block_size, result.max_model_len) == (4, 4096, 4096)
    assert plan(policy="contiguous", memory_bytes=GIB).num_blocks == 4
    few = plan(policy="contiguous", available_bytes=4 * 3 * 4096 * BYTES_PER_TOKEN)
    assert (few.num_blocks, few.block_size) == (2, 4096)


def test_the_contiguous_policy_shrinks_an_automatic_length_and_refuses_an_explicit_one():
    memory = 2 * 100 * BYTES_PER_TOKEN
    result = plan(policy="contiguous", memory_bytes=memory)
    assert (result.num_blocks, result.block_size, result.max_model_len) == (1, 100, 100)
    with pytest.raises(PoolTooSmallError, match=r"101 tokens .* 100 tokens"):
        plan(policy="contiguous", memory_bytes=memory, max_model_len=101)
    assert plan(policy="contiguous", num_blocks=2, max_model_len=50).num_blocks == 2


def test_a_device_gives_a_share_of_what_is_free():
    assert device_budget(free_bytes=1000, total_bytes=4000, device_memory_utilization=0.9) == 900
    with pytest.raises(PoolTooSmallError, match=r"0 bytes of the device's 8.00 GiB"):
        device_budget(free_bytes=0, total_bytes=8 * GIB, device_memory_utilization=0.9)
    for share in (0.0, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="device_memory_utilization"):
            device_budget(free_bytes=1, total_bytes=1, device_memory_utilization=share)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"}


def test_available_memory_is_the_hosts_where_nothing_limits_it(tmp_path):
    unlimited = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/memory.current": "5\n",
    }
    assert available_memory(root=write(tmp_path, MEMINFO)) == 8_192_000
    assert available_memory(root=write(tmp_path, MEMINFO | unlimited)) == 8_192_000


def test_available_memory_honours_every_enclosing_group_of_version_2(tmp_path):
    files = {
        "proc/self/cgroup": "0::/pod/box\n",
        "sys/fs/cgroup/pod/memory.max": "3000000\n",
        "sys/fs/cgroup/pod/memory.current": "2000000\n",
        "sys/fs/cgroup/pod/memory.stat": "anon 10\ninactive_file 500000\n",
        "sys/fs/cgroup/pod/box/memory.max": "max\n",
        "sys/fs/cgroup/pod/box/memory.current": "100\n",
    }
    assert available_memory(root=write(tmp_path, MEMINFO | files)) == 1_500_000


def test_available_memory_honours_version_1_also_where_the_path_is_the_hosts(tmp_path):
    files = {
        "proc/self/cgroup": "5:cpu:/x\n4:hugetlb,memory:/docker/abc\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "3900000\n",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
    }
    assert available_memory(root=write(tmp_path, MEMINFO | files)) == 100_000
    files["sys/fs/cgroup/memory/memory.limit_in_bytes"] = "9223372036854771712\n"
    assert available_memory(root=write(tmp_path, MEMINFO | files)) == 8_192_000


def test_an_exhausted_group_leaves_nothing_rather_than_a_negative_amount(tmp_path):
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "10\n",
        "sys/fs/cgroup/memory.current": "20\n",
    }
    assert available_memory(root=write(tmp_path, MEMINFO | files)) == 0


def test_available_memory_of_this_machine_is_plausible():
    assert 1 << 20 < available_memory() < 1 << 50


def test_without_proc_the_operating_system_is_asked_in_another_way(tmp_path):
    assert available_memory(root=tmp_path) > 1 << 20


def test_an_automatic_context_is_the_declared_one_which_dynamic_rope_stretches_only_when_asked():
    dynamic = replace(config(64), rope_scaling=RopeScaling(rope_type="dynamic", factor=2.0))
    assert plan(config=dynamic).max_model_len == 64
    assert plan(config=dynamic, max_model_len=128).max_model_len == 128
    with pytest.raises(ConfigError, match=r"129.*128"):
        plan(config=dynamic, max_model_len=129)


def test_native_pages_count_padding_and_scales():
    assert native_kv_bytes_per_token(config(), "float32") == 2 * BYTES_PER_TOKEN
    assert native_kv_bytes_per_token(config(), "bfloat16") == BYTES_PER_TOKEN
    assert native_kv_bytes_per_token(config(), "int8") == BYTES_PER_TOKEN // 2 + 2 * 4 * (3 + 1)
    assert native_kv_bytes_per_token(config(), "fp8") == BYTES_PER_TOKEN // 2
    small = replace(config(), layers=(LayerSpec(num_key_value_heads=2, head_dim=10, window=None, scale=1.0),))
    assert native_kv_bytes_per_token(small, "bfloat16") == 2 * 2 * (10 + 16)


def test_a_plan_goes_by_the_bytes_of_a_token_where_they_are_given():
    bytes_per_token = native_kv_bytes_per_token(config(), "int8")
    planned = plan(dtype_bytes=1, bytes_per_token=bytes_per_token, memory_bytes=1 << 20)
    assert planned.num_blocks == (1 << 20) // (16 * bytes_per_token) - 1
    assert planned.num_bytes == (planned.num_blocks + 1) * 16 * bytes_per_token
    with pytest.raises(ConfigError, match="bytes_per_token must be positive"):
        plan(bytes_per_token=0)
