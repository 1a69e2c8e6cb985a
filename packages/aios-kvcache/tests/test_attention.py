"""PagedAttention against loops that a reader can check by eye."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import pytest
import torch

from aios_kvcache.attention_plan import QUERY_BLOCK, CausalMask, SequenceSlice, group_by_length, write_slots
from aios_kvcache.block import BlockCopy
from aios_kvcache.block_manager import BlockManager
from aios_kvcache.native.native_cache import KV_DTYPES
from aios_kvcache.native.reference import round_as_stored
from aios_kvcache.paged_cache import PagedKVCache
from aios_model.cache import ContiguousCache
from aios_model.config import LayerSpec, ModelConfig

NUM_HEADS = 6
MAX_LENGTH = 32


def config(*layers: LayerSpec) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-6,
        max_position_embeddings=4096,
        layers=layers,
    )


def layer(*, kv_heads: int = 2, head_dim: int = 8, window: int | None = None, scale: float = 0.3) -> LayerSpec:
    return LayerSpec(num_key_value_heads=kv_heads, head_dim=head_dim, window=window, scale=scale)


LAYERS = (
    layer(),
    layer(window=5),
    layer(kv_heads=6, head_dim=4, window=16),
    layer(kv_heads=1, window=24, scale=1.0),
    layer(kv_heads=3, head_dim=10, window=1),
)


@dataclass
class History:
    """All that one sequence ever fed into each layer: [layer][position] -> (q, k, v)."""

    table: list[int]
    rows: list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows[0])


def naive_attention(spec: LayerSpec, rows: list, position: int) -> torch.Tensor:
    """One query and one head at a time, in float64."""
    q, _, _ = rows[position]
    out = torch.zeros_like(q)
    for head in range(q.shape[0]):
        kv_head = head * spec.num_key_value_heads // q.shape[0]
        visible = [j for j in range(position + 1) if spec.window is None or position - j < spec.window]
        keys = torch.stack([rows[j][1][kv_head] for j in visible])
        values = torch.stack([rows[j][2][kv_head] for j in visible])
        weights = torch.exp(spec.scale * (keys @ q[head]))
        out[head] = weights @ values / weights.sum()
    return out


class Sequences:
    """Random sequences in a cache, stepped together and compared after each step."""

    def __init__(
        self, specs: tuple[LayerSpec, ...], *, block_size: int, num_blocks: int, dtype=torch.float64, kv_dtype=None
    ) -> None:
        options = {"dtype": dtype, "kv_dtype": kv_dtype, "device": "cpu"}
        self.cache = PagedKVCache(config(*specs), num_blocks=num_blocks, block_size=block_size, **options)
        self.kv_dtype = kv_dtype
        self.specs, self.block_size, self.dtype = specs, block_size, dtype
        self.generator = torch.Generator().manual_seed(0)
        self.histories: dict[str, History] = {}

    def add(self, name: str, table: list[int]) -> None:
        self.histories[name] = History(table, [[] for _ in self.specs])

    def draw(self, spec: LayerSpec, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = (NUM_HEADS, spec.num_key_value_heads, spec.num_key_value_heads)
        q, k, v = (
            torch.randn(num_tokens, n, spec.head_dim, dtype=torch.float64, generator=self.generator) for n in heads
        )
        return q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)

    def step(self, lengths: dict[str, int]) -> list[torch.Tensor]:
        """Feeds new random tokens; returns each layer's output."""
        batch = [
            SequenceSlice(start=len(self.histories[name]), length=n, block_table=self.histories[name].table)
            for name, n in lengths.items()
        ]
        self.cache.bind(batch)
        outputs = []
        for index, spec in enumerate(self.specs):
            q, k, v = self.draw(spec, sum(lengths.values()))
            rows = iter(zip(q, self.as_stored(k), self.as_stored(v), strict=True))
            for name, n in lengths.items():
                self.histories[name].rows[index].extend(next(rows) for _ in range(n))
            outputs.append(self.cache.attend(index, q, k, v))
        return outputs

    def as_stored(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.kv_dtype is None else round_as_stored(x.float(), KV_DTYPES[self.kv_dtype]).to(x.dtype)

    def check_step(self, lengths: dict[str, int], *, tolerance: float = 1e-12) -> None:
        outputs = self.step(lengths)
        for index, spec in enumerate(self.specs):
            row = 0
            for name, n in lengths.items():
                history = self.histories[name].rows[index]
                for position in range(len(history) - n, len(history)):
                    expected = naive_attention(spec, history, position)
                    torch.testing.assert_close(outputs[index][row], expected, atol=tolerance, rtol=tolerance)
                    row += 1


def scattered(num_pages: int, *, first: int = 1, seed: int = 0) -> list[int]:
    return random.Random(seed).sample(range(first, first + num_pages), num_pages)


@pytest.mark.parametrize("kv_dtype", [None, *KV_DTYPES], ids=str)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_random_mixed_batches_equal_the_naive_oracle(block_size, kv_dtype):
    draw = random.Random(block_size)
    pages_each = -(-MAX_LENGTH // block_size)
    sequences = Sequences(LAYERS, block_size=block_size, num_blocks=6 * pages_each, kv_dtype=kv_dtype)
    pages = scattered(6 * pages_each, seed=block_size)
    for index in range(6):
        table = sorted(pages[index * pages_each : (index + 1) * pages_each]) if index % 2 else None
        sequences.add(f"s{index}", table or pages[index * pages_each : (index + 1) * pages_each])
    for _ in range(7):
        names = draw.sample(sorted(sequences.histories), draw.randint(1, 6))
        wanted = {name: draw.choice((1, 1, 1, 2, 7, 16)) for name in names}
        lengths = {name: min(n, MAX_LENGTH - len(sequences.histories[name])) for name, n in wanted.items()}
        lengths = {name: n for name, n in lengths.items() if n > 0}
        sequences.check_step(lengths)


@pytest.mark.parametrize("consecutive", [True, False])
def test_prompts_longer_than_a_query_block_equal_the_naive_oracle_at_its_borders(consecutive):
    specs = (layer(), layer(window=20), layer(window=QUERY_BLOCK + 9))
    num_tokens = 2 * QUERY_BLOCK + 1
    sequences = Sequences(specs, block_size=16, num_blocks=40)
    sequences.add("a", list(range(1, 41)) if consecutive else scattered(40))
    sequences.step({"a": 7})
    outputs = sequences.step({"a": num_tokens})
    for index, spec in enumerate(specs):
        history = sequences.histories["a"].rows[index]
        for row in (0, 1, QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 20, 2 * QUERY_BLOCK - 1, 2 * QUERY_BLOCK):
            torch.testing.assert_close(outputs[index][row], naive_attention(spec, history, 7 + row))


@pytest.mark.parametrize("kv_dtype", [None, *KV_DTYPES], ids=str)
def test_a_prompt_in_chunks_equals_the_prompt_in_one_piece(kv_dtype):
    spec = layer()
    whole, parts = (Sequences((spec,), block_size=4, num_blocks=20, kv_dtype=kv_dtype) for _ in range(2))
    q, k, v = whole.draw(spec, 50)
    whole.cache.bind([SequenceSlice(start=0, length=50, block_table=scattered(20))])
    expected = whole.cache.attend(0, q, k, v)
    out = []
    for begin, end in ((0, 1), (1, 18), (18, 19), (19, 48), (48, 50)):
        parts.cache.bind([SequenceSlice(start=begin, length=end - begin, block_table=scattered(20))])
        out.append(parts.cache.attend(0, q[begin:end], k[begin:end], v[begin:end]))
    torch.testing.assert_close(torch.cat(out), expected, atol=1e-13, rtol=1e-13)


def test_paged_equals_contiguous():
    spec = layer(window=9)
    paged = Sequences((spec,), block_size=4, num_blocks=20)
    plain = ContiguousCache(config(spec), max_length=60, dtype=torch.float64, device=torch.device("cpu"))
    start = 0
    for length in (13, 1, 1, 20, 1):
        q, k, v = paged.draw(spec, length)
        paged.cache.bind([SequenceSlice(start=start, length=length, block_table=scattered(20))])
        torch.testing.assert_close(paged.cache.attend(0, q, k, v), plain.attend(0, q, k, v), atol=1e-13, rtol=1e-13)
        plain.advance(length)
        start += length


@pytest.mark.parametrize("window", [None, 6])
def test_a_sequence_gets_the_same_result_alone_and_in_any_batch(window):
    spec = layer(window=window)
    alone, together = (Sequences((spec,), block_size=4, num_blocks=60) for _ in range(2))
    draw = random.Random(3)
    lengths = [1, 1, 9, 1, 30, 1, 2]
    starts = [draw.randint(0, 20) for _ in lengths]
    pages = scattered(60)
    tables = [pages[8 * i : 8 * i + 8] + pages[56:] for i in range(7)]
    for index, start in enumerate(starts):
        if start:
            _, k, v = alone.draw(spec, start)
            for sequences in (alone, together):
                sequences.cache.bind([SequenceSlice(start=0, length=start, block_table=tables[index])])
                sequences.cache.attend(0, torch.zeros(start, NUM_HEADS, 8, dtype=torch.float64), k, v)
    q, k, v = alone.draw(spec, sum(lengths))
    slices = [SequenceSlice(start=s, length=n, block_table=t) for s, n, t in zip(starts, lengths, tables, strict=True)]
    together.cache.bind(slices)
    batched = together.cache.attend(0, q, k, v)
    row = 0
    for piece in slices:
        rows = slice(row, row + piece.length)
        alone.cache.bind([piece])
        torch.testing.assert_close(alone.cache.attend(0, q[rows], k[rows], v[rows]), batched[rows], atol=1e-13, rtol=0)
        row += piece.length


def test_a_fork_reads_its_parents_pages_and_its_own_copy():
    manager = BlockManager(num_blocks=8, block_size=4)
    sequences = Sequences(LAYERS, block_size=4, num_blocks=8)
    manager.open("a", range(6))
    manager.reserve("a", start=0, end=6)
    sequences.add("a", manager.block_table("a"))
    sequences.check_step({"a": 6})
    manager.fork("a", "b")
    for name in "ab":
        copies = manager.reserve(name, start=6, end=9)
        assert copies is not None
        sequences.cache.copy_blocks(copies)
        if name == "b":
            sequences.add("b", [])
            sequences.histories["b"].rows = [list(rows) for rows in sequences.histories["a"].rows]
        sequences.histories[name].table = manager.block_table(name)
    sequences.check_step({"a": 1, "b": 1})
    sequences.check_step({"a": 1, "b": 2})


def test_copies_happen_one_after_the_other_even_where_they_chain():
    cache = Sequences((layer(), layer(kv_heads=1)), block_size=2, num_blocks=6).cache
    for pool in cache.pools:
        pool.copy_(torch.randn(pool.shape, dtype=pool.dtype))
    expected = [pool.clone() for pool in cache.pools]
    copies = [BlockCopy(1, 2), BlockCopy(3, 4), BlockCopy(2, 5), BlockCopy(6, 2), BlockCopy(5, 2)]
    for pool in expected:
        for copy in copies:
            pool[:, copy.destination] = pool[:, copy.source].clone()
    cache.copy_blocks(copies)
    assert all(torch.equal(pool, want) for pool, want in zip(cache.pools, expected, strict=True))


@pytest.mark.parametrize("window", [None, 3])
def test_leftovers_of_a_faulty_request_never_reach_another(window):
    sequences = Sequences((layer(window=window),), block_size=4, num_blocks=12)
    sequences.cache.pools[0][:, 1:] = float("nan")
    for index, name in enumerate("abc"):
        sequences.add(name, scattered(4, first=1 + 4 * index, seed=index))
    sequences.check_step({"a": 9, "b": 2, "c": 1})
    for _ in range(3):
        sequences.check_step({"a": 1, "b": 1, "c": 1})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_lower_precision_equals_the_oracle_within_its_rounding(dtype, tolerance):
    sequences = Sequences((layer(), layer(window=7)), block_size=4, num_blocks=40, dtype=dtype)
    pages = scattered(40)
    for index, name in enumerate("abcd"):
        sequences.add(name, pages[10 * index : 10 * index + 10])
    for lengths in ({"a": 11, "b": 1, "c": 30}, {"a": 1, "b": 1, "c": 1, "d": 5}):
        outputs = sequences.step(lengths)
        for index, spec in enumerate(sequences.specs):
            row = 0
            for name, n in lengths.items():
                rows = [tuple(x.double() for x in r) for r in sequences.histories[name].rows[index]]
                for position in range(len(rows) - n, len(rows)):
                    expected = naive_attention(spec, rows, position)
                    torch.testing.assert_close(outputs[index][row].double(), expected, atol=tolerance, rtol=tolerance)
                    row += 1


def test_it_works_inside_and_outside_of_inference_mode():
    sequences = Sequences((layer(), layer(window=3)), block_size=2, num_blocks=20)
    sequences.add("a", scattered(10))
    sequences.add("b", scattered(10, first=11))
    with torch.inference_mode():
        sequences.check_step({"a": 5, "b": 4})
        sequences.check_step({"a": 1, "b": 1})
    sequences.check_step({"a": 1, "b": 1})


def test_decodes_are_grouped_so_that_padding_stays_small():
    lengths = [2000, 10, 1500, 900, 12, 100, 40]
    groups = group_by_length(lengths, max_keys=1 << 20)
    assert sorted(index for group in groups for index in group) == list(range(7))
    for group in groups:
        longest = max(lengths[i] for i in group)
        assert all(2 * lengths[i] >= longest or longest - lengths[i] <= 128 for i in group)
    assert len(groups) == 3
    assert group_by_length([], max_keys=10) == []


def test_groups_stay_within_the_working_memory():
    groups = group_by_length([100] * 10 + [5000], max_keys=300)
    assert [len(group) for group in groups] == [1, 3, 3, 3, 1]


def test_the_mask_of_a_block_is_the_corner_of_a_larger_one():
    for window in (None, 3):
        mask = CausalMask(window=window, dtype=torch.float32, device=torch.device("cpu"))
        for queries, keys in ((2, 5), (4, 4), (3, 40), (1, 2)):
            corner = mask.corner(queries, keys)
            assert corner.shape == (queries, keys)
            for i in range(queries):
                for j in range(keys):
                    distance = (keys - queries + i) - j
                    visible = distance >= 0 and (window is None or distance < window)
                    assert corner[i, j] == (0.0 if visible else -math.inf)


def test_new_tokens_are_written_in_the_order_in_which_they_are_packed():
    batch = [
        SequenceSlice(start=3, length=6, block_table=[5, 2, 7]),
        SequenceSlice(start=8, length=1, block_table=[1, 3, 4]),
    ]
    slots = write_slots(batch, block_size=4, device=torch.device("cpu"))
    assert slots.tolist() == [23, 8, 9, 10, 11, 28, 16]
    one_run = write_slots(batch[1:], block_size=4, device=torch.device("cpu"))
    assert one_run == slice(16, 17)
