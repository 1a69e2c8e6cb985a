"""The pool: its memory, its layout, and what it refuses."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

from aios_kvcache import PagedKVCache, PoolTooSmallError, SequenceSlice
from aios_kvcache.block import BlockCopy
from aios_kvcache.layout import KEY, NULL_BLOCK, VALUE, pool_shape, slot_of
from aios_kvcache.native.native_cache import KV_DTYPES
from aios_kvcache.native.reference import round_as_stored
from aios_kvcache.sizing import torch_kv_bytes_per_token
from aios_model.cache import causal_attention
from aios_model.config import LayerSpec, ModelConfig
from aios_model.host_memory import return_freed_memory

MIB = 1 << 20


def config(*shapes: tuple[int, int]) -> ModelConfig:
    layers = tuple(LayerSpec(num_key_value_heads=k, head_dim=h, window=None, scale=1.0) for k, h in shapes)
    return ModelConfig(
        architecture="llama",
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=8,
        num_key_value_heads=shapes[0][0],
        head_dim=shapes[0][1],
        rms_norm_eps=1e-6,
        max_position_embeddings=4096,
        layers=layers,
    )


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_pool_costs_nothing_until_pages_are_written():
    gc.collect()
    return_freed_memory()  # of other tests, or it would be returned in between
    before = resident_bytes()
    cache = PagedKVCache(config((8, 128)), num_blocks=8191, block_size=16, dtype=torch.float32, device="cpu")
    assert cache.num_bytes == 1024 * MIB
    assert resident_bytes() - before < 32 * MIB
    assert not cache.pools[0][:, NULL_BLOCK].any()
    table = list(range(1, 257))
    cache.bind([SequenceSlice(start=0, length=4096, block_table=table)])
    k = torch.ones(4096, 8, 128)
    cache.attend(0, torch.zeros(4096, 8, 128), k, k)
    assert 32 * MIB <= resident_bytes() - before < 512 * MIB
    assert bool(cache.pools[0][:, 1:257].eq(1).all())


def test_layers_may_differ_and_share_one_block_table():
    cache = PagedKVCache(config((2, 4), (4, 8)), num_blocks=3, block_size=5, dtype=torch.float64, device="cpu")
    assert [tuple(pool.shape) for pool in cache.pools] == [(2, 4, 5, 2, 4), (2, 4, 5, 4, 8)]
    assert cache.num_bytes == 2 * 4 * 5 * (2 * 4 + 4 * 8) * 8
    assert all(pool.is_contiguous() for pool in cache.pools)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keys_and_values_lie_where_the_layout_says(dtype):
    cache = PagedKVCache(config((2, 4)), num_blocks=3, block_size=4, dtype=dtype, device="cpu")
    table = [3, 1]
    k, v = torch.randn(6, 2, 4).to(dtype), torch.randn(6, 2, 4).to(dtype)
    cache.bind([SequenceSlice(start=0, length=6, block_table=table)])
    cache.attend(0, torch.zeros(6, 8, 4, dtype=dtype), k, v)
    spec = LayerSpec(num_key_value_heads=2, head_dim=4, window=None, scale=1.0)
    flat = cache.pools[0].view(2, -1, 2, 4)
    assert cache.pools[0].shape == pool_shape(spec, num_blocks=3, block_size=4)
    for position in range(6):
        slot = slot_of(table, position, block_size=4)
        assert torch.equal(flat[KEY, slot], k[position])
        assert torch.equal(flat[VALUE, slot], v[position])
    assert not cache.pools[0][:, NULL_BLOCK].any()


def test_slices_that_do_not_fit_their_block_table_are_refused():
    cache = PagedKVCache(config((1, 4)), num_blocks=3, block_size=4, dtype=torch.float32, device="cpu")
    for start, length in ((0, 9), (8, 1), (0, 0), (-1, 1)):
        with pytest.raises(ValueError, match="2 pages of 4"):
            cache.bind([SequenceSlice(start=start, length=length, block_table=[1, 2])])


def test_another_number_of_tokens_than_bound_is_noticed():
    cache = PagedKVCache(config((1, 4)), num_blocks=3, block_size=4, dtype=torch.float32, device="cpu")
    cache.bind([SequenceSlice(start=0, length=2, block_table=[1])])
    with pytest.raises(AssertionError, match="2 tokens are bound, 1 came"):
        cache.attend(0, torch.zeros(1, 8, 4), torch.zeros(1, 1, 4), torch.zeros(1, 1, 4))


def test_a_pool_beyond_the_address_space_is_refused_with_its_size():
    with pytest.raises(PoolTooSmallError, match="GiB"):
        PagedKVCache(config((8, 128)), num_blocks=1 << 40, block_size=16, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("kv_dtype", list(KV_DTYPES), ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pages_keep_numbers_as_they_are_told_to(dtype, kv_dtype):
    cache = PagedKVCache(config((2, 6)), num_blocks=3, block_size=4, dtype=dtype, kv_dtype=kv_dtype, device="cpu")
    assert cache.num_bytes == 4 * 4 * torch_kv_bytes_per_token(config((2, 6)), KV_DTYPES[kv_dtype])
    q, k, v = (torch.randn(5, heads, 6).to(dtype) for heads in (8, 2, 2))
    v[2] *= 300
    rows = []
    for start, end in ((0, 1), (1, 4), (4, 5)):
        cache.bind([SequenceSlice(start=start, length=end - start, block_table=[3, 1])])
        rows.append(cache.attend(0, q[start:end], k[start:end], v[start:end]))
    assert torch.cat(rows).dtype == dtype
    stored = [round_as_stored(x.float(), KV_DTYPES[kv_dtype]).to(dtype).double().transpose(0, 1) for x in (k, v)]
    expected = causal_attention(q.double(), *stored, scale=1.0, window=None)
    tolerance = 8 * max(torch.finfo(dtype).eps, 1e-13) * float(expected.abs().max())
    torch.testing.assert_close(torch.cat(rows).double(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_copied_pages_take_their_scales_along(kv_dtype):
    cache = PagedKVCache(
        config((2, 6)), num_blocks=3, block_size=4, dtype=torch.float32, kv_dtype=kv_dtype, device="cpu"
    )
    q, k, v = (torch.randn(4, heads, 6) for heads in (8, 2, 2))
    cache.bind([SequenceSlice(start=0, length=4, block_table=[2])])
    expected = cache.attend(0, q, k, v)[3:]
    cache.copy_blocks([BlockCopy(source=2, destination=3)])
    cache.bind([SequenceSlice(start=3, length=1, block_table=[3])])
    assert torch.equal(cache.attend(0, q[3:], k[3:], v[3:]), expected)


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_key_that_is_no_number_spoils_what_sees_it(kv_dtype):
    cache = PagedKVCache(
        config((2, 6)), num_blocks=3, block_size=4, dtype=torch.float32, kv_dtype=kv_dtype, device="cpu"
    )
    q, k, v = (torch.randn(4, heads, 6) for heads in (8, 2, 2))
    k[2, 1, 3] = float("nan")
    cache.bind([SequenceSlice(start=0, length=4, block_table=[2])])
    rows = cache.attend(0, q, k, v)
    assert rows[2:, 4:].isnan().all()
    assert rows[:, :4].isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kv_dtype", list(KV_DTYPES), ids=str)
def test_a_gpu_gives_the_results_of_the_cpu(kv_dtype):
    batches = [[(0, 300), (0, 1), (0, 7)], [(300, 1), (1, 1), (7, 300)]]
    tables = [list(range(1, 41)), list(range(80, 40, -1)), list(range(120, 80, -1))]
    caches = [
        PagedKVCache(
            config((2, 64)), num_blocks=120, block_size=16, dtype=torch.float32, kv_dtype=kv_dtype, device=device
        )
        for device in ("cpu", "cuda")
    ]
    for batch in batches:
        slices = [
            SequenceSlice(start=start, length=length, block_table=table)
            for (start, length), table in zip(batch, tables, strict=True)
        ]
        num_tokens = sum(length for _, length in batch)
        inputs = [torch.randn(num_tokens, heads, 64) for heads in (8, 2, 2)]
        outputs = []
        for cache in caches:
            cache.bind(slices)
            outputs.append(cache.attend(0, *(x.to(cache.device) for x in inputs)).cpu())
        torch.testing.assert_close(*outputs, atol=1e-3, rtol=1e-3)
