"""`NativePagedKVCache` as a drop-in: what it shares with `PagedKVCache`, what it refuses, and how batches are bound."""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from pathlib import Path

import pytest
import torch

from aios_kvcache.attention_plan import SequenceSlice
from aios_kvcache.block import BlockCopy
from aios_kvcache.layout import why_not_native
from aios_kvcache.native.kernels import SEQUENCE_FORMAT
from aios_kvcache.native.native_cache import KV_DTYPES, NativePagedKVCache
from aios_kvcache.paged_cache import PagedKVCache
from aios_kvcache.sizing import native_kv_bytes_per_token
from aios_model.config import LayerSpec, ModelConfig
from aios_model.errors import ConfigError
from aios_model.native.compiler import find_compiler
from aios_model.native.threads import get_pool

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler here")

MIB = 1 << 20


def layer(kv_heads: int = 2, head_dim: int = 8, *, window: int | None = None, scale: float = 0.3) -> LayerSpec:
    return LayerSpec(num_key_value_heads=kv_heads, head_dim=head_dim, window=window, scale=scale)


def config(*layers: LayerSpec) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=6,
        num_key_value_heads=layers[0].num_key_value_heads,
        head_dim=layers[0].head_dim,
        rms_norm_eps=1e-6,
        max_position_embeddings=4096,
        layers=layers,
    )


LAYERS = (layer(), layer(window=20), layer(6, 64, window=16), layer(1, scale=1.0), layer(3, 10, window=1))


def native(*layers: LayerSpec, num_blocks: int = 20, block_size: int = 16, **options) -> NativePagedKVCache:
    options = {"kv_dtype": torch.float32, "pool": get_pool(1), **options}
    return NativePagedKVCache(config(*layers), num_blocks=num_blocks, block_size=block_size, **options)


def inputs(spec: LayerSpec, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads = (6, spec.num_key_value_heads, spec.num_key_value_heads)
    q, k, v = (torch.randn(num_tokens, count, spec.head_dim) for count in heads)
    return q, k, v


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def bound(cache: NativePagedKVCache) -> list[tuple[int, int, int, list[int]]]:
    """What a kernel would read: start, length, first row and block table of each sequence."""
    batch, size = cache.batch, struct.calcsize(SEQUENCE_FORMAT)
    sequences = []
    for index in range(batch.num_sequences):
        fields = struct.unpack(SEQUENCE_FORMAT, ctypes.string_at(batch.sequences + index * size, size))
        start, length, first_row, num_blocks, address = fields
        table = list((ctypes.c_int32 * num_blocks).from_address(address))
        sequences.append((start, length, first_row, table))
    return sequences


@pytest.mark.parametrize("block_size", [16, 48])
def test_every_layer_of_a_mixed_model_gives_what_the_torch_cache_gives(block_size):
    specs, tables = LAYERS, [[7, 3, 9, 1], [2, 4, 5], [8, 6, 10]]
    torch_cache = PagedKVCache(
        config(*specs), num_blocks=10, block_size=block_size, dtype=torch.float32, device=torch.device("cpu")
    )
    native_cache = native(*specs, num_blocks=10, block_size=block_size)
    for batch in ([(0, 0, 45), (1, 0, 1), (2, 0, 17)], [(0, 45, 1), (2, 17, 20)], [(1, 1, 30), (0, 46, 1), (2, 37, 1)]):
        slices = [SequenceSlice(start=start, length=n, block_table=tables[index]) for index, start, n in batch]
        for cache in (torch_cache, native_cache):
            cache.bind(slices)
        for index, spec in enumerate(specs):
            q, k, v = inputs(spec, sum(n for _, _, n in batch))
            expected = torch_cache.attend(index, q, k, v)
            torch.testing.assert_close(native_cache.attend(index, q, k, v), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32_and_returned_as_they_came(dtype):
    cache, [q, k, v] = native(layer(kv_heads=2)), inputs(layer(), 9)
    cache.bind([SequenceSlice(start=0, length=9, block_table=[1])])
    expected = cache.attend(0, *(x.to(dtype).float() for x in (q, k, v)))
    out = cache.attend(0, *(x.to(dtype) for x in (q, k, v)))
    assert torch.equal(out, expected.to(dtype))


def test_inputs_need_not_be_contiguous():
    cache, fused = native(layer(kv_heads=2)), torch.randn(9, 10, 8)
    cache.bind([SequenceSlice(start=0, length=9, block_table=[1])])
    q, k, v = fused.split([6, 2, 2], dim=1)
    assert torch.equal(cache.attend(0, q, k, v), cache.attend(0, q.clone(), k.clone(), v.clone()))


@pytest.mark.parametrize("kv_dtype", list(KV_DTYPES), ids=str)
def test_copied_pages_are_whole_copies_in_the_order_of_the_list(kv_dtype):
    cache = native(layer(), layer(3, 10), kv_dtype=kv_dtype)
    for held in cache.layers:
        for tensor in held.tensors:
            tensor[1:] = (torch.randn(tensor[1:].shape) * 50).to(tensor.dtype)
    before = [[tensor.clone() for tensor in held.tensors] for held in cache.layers]
    copies = [BlockCopy(1, 2), BlockCopy(2, 3), BlockCopy(4, 2), BlockCopy(3, 5)]
    cache.copy_blocks(copies)
    for held, earlier in zip(cache.layers, before, strict=True):
        for tensor, expected in zip(held.tensors, earlier, strict=True):
            for copy in copies:
                expected[copy.destination] = expected[copy.source]
            assert torch.equal(tensor, expected)


def test_a_fork_reads_its_copy():
    cache, spec = native(layer()), layer()
    q, k, v = inputs(spec, 21)
    cache.bind([SequenceSlice(start=0, length=20, block_table=[1, 2])])
    cache.attend(0, q[:20], k[:20], v[:20])
    cache.copy_blocks([BlockCopy(2, 3)])
    outputs = []
    for table in ([1, 2], [1, 3]):
        cache.bind([SequenceSlice(start=20, length=1, block_table=table)])
        outputs.append(cache.attend(0, q[20:], k[20:], v[20:]))
    assert torch.equal(*outputs)


def test_a_bound_batch_is_what_kernels_read():
    cache, tables = native(layer(), num_blocks=900), {}
    names = [f"s{index}" for index in range(12)]
    draw = random.Random(1)
    for step in range(200):
        for name in names:
            table = tables.setdefault(name, [draw.randint(1, 900)])
            if draw.random() < 0.3:
                table.append(draw.randint(1, 900))  # in place, as a caller may
            if draw.random() < 0.05:
                table[draw.randrange(len(table))] = draw.randint(1, 900)
            if draw.random() < 0.02:
                tables[name] = [draw.randint(1, 900)]
        chosen = draw.sample(names, draw.randint(0, len(names))) if step % 3 else names
        pieces = []
        for name in chosen:
            end = draw.randint(1, 16 * len(tables[name]))
            start = draw.choice([end - 1, draw.randrange(end)])
            kind = draw.choice([list, tuple])
            pieces.append(
                SequenceSlice(
                    start=start,
                    length=end - start,
                    block_table=tables[name] if step % 2 else kind(tables[name]),
                )
            )
        cache.bind(pieces)
        first_rows = [sum(piece.length for piece in pieces[:index]) for index in range(len(pieces))]
        assert bound(cache) == [
            (piece.start, piece.length, row, list(piece.block_table))
            for piece, row in zip(pieces, first_rows, strict=True)
        ]
        assert cache.batch.num_rows == sum(piece.length for piece in pieces)


def test_slices_that_do_not_fit_their_block_table_are_refused():
    cache = native(layer())
    for start, length in ((0, 33), (32, 1), (0, 0), (-1, 1)):
        with pytest.raises(ValueError, match="2 pages of 16"):
            cache.bind([SequenceSlice(start=start, length=length, block_table=[1, 2])])


def test_pages_outside_of_the_pool_are_refused_each_time():
    cache = native(layer(), num_blocks=5)
    for table in ([6], [6], [-1], [1, 6]):
        with pytest.raises(ValueError, match="there are pages 0 to 5"):
            cache.bind([SequenceSlice(start=0, length=1, block_table=table)])


def test_another_number_of_tokens_than_bound_is_noticed():
    cache = native(layer(kv_heads=1))
    cache.bind([SequenceSlice(start=0, length=2, block_table=[1])])
    with pytest.raises(AssertionError, match="2 tokens are bound, 1 came"):
        cache.attend(0, *inputs(layer(kv_heads=1), 1))


@pytest.mark.parametrize("kv_dtype", list(KV_DTYPES), ids=str)
def test_a_token_takes_as_many_bytes_as_the_plan_of_the_pool_counts(kv_dtype):
    cache = native(*LAYERS, num_blocks=9, block_size=32, kv_dtype=kv_dtype)
    assert cache.num_bytes == 10 * 32 * native_kv_bytes_per_token(config(*LAYERS), KV_DTYPES[kv_dtype])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_pool_costs_nothing_until_pages_are_written():
    before = resident_bytes()
    cache = native(layer(6, 128), num_blocks=8191, kv_dtype=torch.bfloat16)
    assert cache.num_bytes == 384 * MIB
    assert resident_bytes() - before < 16 * MIB
    cache.bind([SequenceSlice(start=0, length=2048, block_table=list(range(1, 129)))])
    cache.attend(0, *inputs(layer(6, 128), 2048))
    assert not cache.layers[0].keys[0].any()
    assert 6 * MIB <= resident_bytes() - before < 128 * MIB


def test_what_the_layout_cannot_hold_is_refused_with_the_reason():
    cases = [
        ({"block_size": 20}, [layer()], "multiple of 16"),
        ({"kv_dtype": torch.float16}, [layer()], "float32, bfloat16, int8, fp8"),
        ({"device": "meta"}, [layer()], "PagedKVCache"),
        ({}, [layer(head_dim=1026)], "1026"),
        ({}, [layer(), layer(kv_heads=4)], "layer 1 has 4 kv heads"),
    ]
    for options, layers, message in cases:
        with pytest.raises(ConfigError, match=message):
            native(*layers, **options)
    assert why_not_native(config(layer()), block_size=32) is None
