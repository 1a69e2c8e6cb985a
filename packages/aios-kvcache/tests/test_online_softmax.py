"""Attention over a chunk of keys at a time: equal to the softmax over all of them, in a fraction of the memory."""

from __future__ import annotations

import itertools
import resource
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from aios_kvcache.attention_plan import SequenceSlice
from aios_kvcache.native.kernels import kvcache_library
from aios_kvcache.native.native_cache import NativePagedKVCache
from aios_kvcache.online_softmax import QUERY_BLOCK, PartialAttention, attend_some, online_attention
from aios_kvcache.paged_cache import PagedKVCache
from aios_model.config import LayerSpec, ModelConfig
from aios_model.native.compiler import find_compiler
from aios_model.native.threads import get_pool

LONG = 32_768
"""Tokens of a prompt whose S x S scores take 4 GiB, for each head."""


def whole(q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, *, scale: float, window: int | None) -> Tensor:
    """All scores at once, in float64."""
    distance = torch.arange(len(k_SKH) - len(q_TNH), len(k_SKH))[:, None] - torch.arange(len(k_SKH))
    visible = (distance >= 0) & (distance < (window or len(k_SKH)))
    group = q_TNH.shape[1] // k_SKH.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1).transpose(0, 1) for x in (k_SKH, v_SKH))
    q = q_TNH.double().transpose(0, 1)
    return scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale).transpose(0, 1)


def draw(num_queries: int, num_keys: int, num_heads: int, kv_heads: int, *, dtype=torch.float64, size: int = 8):
    shapes = ((num_queries, num_heads, size), (num_keys, kv_heads, size), (num_keys, kv_heads, size))
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("window", [None, 1, 5, 300])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 700), (9, 9), (40, 333), (QUERY_BLOCK + 3, 600)])
@pytest.mark.parametrize(("num_heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_chunks_of_keys_equal_all_keys_at_once(num_queries, num_keys, num_heads, kv_heads, window):
    q, k, v = draw(num_queries, num_keys, num_heads, kv_heads)
    expected = whole(q, k, v, scale=0.7, window=window)
    for chunk in (1, 7, 64, 1024):
        found = online_attention(q, k, v, scale=0.7, window=window, chunk=chunk)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_parts_merge_in_any_order():
    """Also those in which a query sees nothing."""
    q, k, v = draw(5, 60, 4, 2)
    q_KGTH = q.unflatten(1, (2, 2)).permute(1, 2, 0, 3)
    borders = [0, 7, 20, 21, 57, 60]
    parts = [
        attend_some(q_KGTH, k[begin:end], v[begin:end], 55 - begin, scale=1.0, window=30)
        for begin, end in itertools.pairwise(borders)
    ]
    assert any(part.max_KGT.isneginf().any() for part in parts)
    expected = whole(q, k, v, scale=1.0, window=30)
    for order in (torch.randperm(len(parts)).tolist() for _ in range(10)):
        state: PartialAttention = parts[order[0]]
        for index in order[1:]:
            state = state.merge(parts[index])
        found = state.finish().permute(2, 0, 1, 3).flatten(1, 2)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_large_scores_do_not_overflow():
    q, k, v = draw(3, 50, 2, 2, dtype=torch.float32)
    found = online_attention(q * 1e4, k, v, scale=1.0, chunk=8)
    torch.testing.assert_close(found.double(), whole(q * 1e4, k, v, scale=1.0, window=None), atol=1e-4, rtol=1e-4)


def long_config() -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        rms_norm_eps=1e-6,
        max_position_embeddings=LONG,
        layers=(LayerSpec(num_key_value_heads=1, head_dim=8, window=None, scale=1.0),),
    )


def torch_pages() -> PagedKVCache:
    return PagedKVCache(long_config(), num_blocks=LONG // 16, block_size=16, dtype=torch.float32, device="cpu")


def native_pages() -> NativePagedKVCache:
    options = {"num_blocks": LONG // 16, "block_size": 16, "kv_dtype": torch.float32}
    return NativePagedKVCache(long_config(), pool=get_pool(1), library=kvcache_library(None), **options)


def in_one_step(make_cache: Callable[[], PagedKVCache | NativePagedKVCache]) -> Callable[..., Tensor]:
    """Attention of a whole prompt, over pages in the worst of orders."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = make_cache()
        cache.bind([SequenceSlice(start=0, length=LONG, block_table=list(range(LONG // 16, 0, -1)))])
        return cache.attend(0, q, k, v)

    return attend


def online(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return online_attention(q, k, v, scale=1.0)


@pytest.mark.parametrize(
    "attend",
    [
        pytest.param(in_one_step(torch_pages), id="torch"),
        pytest.param(
            in_one_step(native_pages),
            id="native",
            marks=pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler here"),
        ),
        pytest.param(online, id="online"),
    ],
)
def test_a_prompt_of_32k_tokens_never_makes_a_square(attend: Callable[..., Tensor]):
    q, k, v = draw(LONG, LONG, 1, 1, dtype=torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = attend(q, k, v)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < LONG * LONG, f"{grown / 2**20:.0f} MiB: a quarter of the scores would take as much"
    expected = whole(q[-100:], k, v, scale=1.0, window=None)
    torch.testing.assert_close(out[-100:].double(), expected, atol=1e-4, rtol=1e-4)
