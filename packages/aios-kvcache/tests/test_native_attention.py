"""The C++ kernels: near the plain reference, and bit for bit the same however the work is cut."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from aios_kvcache.attention_plan import SequenceSlice
from aios_kvcache.layout import LANES
from aios_kvcache.native.kernels import kvcache_library
from aios_kvcache.native.native_cache import KV_DTYPES, NativePagedKVCache
from aios_kvcache.native.reference import (
    SEGMENT,
    attend_codes,
    read_keys,
    read_values,
    round_as_stored,
    round_to_fp8,
)
from aios_model.cache import causal_attention
from aios_model.config import LayerSpec, ModelConfig
from aios_model.native.compiler import find_compiler
from aios_model.native.isa import ISAS, Isa, available_isas
from aios_model.native.threads import get_pool

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler here")

SCALE = 0.2
NAN_CODE = 0x7F  # of FP8
DTYPES = list(KV_DTYPES)
TOLERANCE = 1e-5
# A weight at a tie between two multiples of 1/65535 may go either way: a hundred units of rounding.
CODED_TOLERANCE = 1e-4
# Queries rounded to 8 bits move scores by some hundredths here.
ROUNDED_TOLERANCE = 0.15
# Query heads, kv heads, head size: groups of 1, 3, 4, 7, of one part and of several; heads of odd and even vectors.
SHAPES = [(4, 4, 8), (3, 1, 10), (9, 3, 64), (4, 1, 96), (7, 1, 128), (14, 2, 80), (20, 1, 16), (2, 2, 48)]


@pytest.fixture(autouse=True)
def _one_thread():
    get_pool(1)
    yield
    get_pool(1)


def config(shape: tuple[int, int, int], *, window: int | None = None) -> ModelConfig:
    num_heads, num_kv_heads, head_dim = shape
    spec = LayerSpec(num_key_value_heads=num_kv_heads, head_dim=head_dim, window=window, scale=SCALE)
    return ModelConfig(
        architecture="llama",
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        max_position_embeddings=4096,
        layers=(spec,),
    )


class Sequence:
    """Random queries, keys and values of one sequence, and its pages."""

    def __init__(self, shape: tuple[int, int, int], length: int, table: list[int]) -> None:
        num_heads, num_kv_heads, head_dim = shape
        self.q = torch.randn(length, num_heads, head_dim)
        self.k = torch.randn(length, num_kv_heads, head_dim)
        self.v = torch.randn(length, num_kv_heads, head_dim)
        self.table = table
        self.length = length

    def slice(self, start: int, end: int) -> SequenceSlice:
        return SequenceSlice(start=start, length=end - start, block_table=self.table)

    def coded(self, window: int | None) -> torch.Tensor:
        """All rows' outputs in float64, from int8 pages, with the kernels' roundings of queries and weights."""
        return attend_codes(self.q, self.k, self.v, scale=SCALE, window=window)

    def expected(self, dtype: torch.dtype, window: int | None) -> torch.Tensor:
        """All rows' outputs in float64, from keys and values as they are stored."""
        k, v = (round_as_stored(x, KV_DTYPES[dtype]).double().transpose(0, 1) for x in (self.k, self.v))
        return causal_attention(self.q.double(), k, v, scale=SCALE, window=window)


class Stage:
    """A cache and some sequences in it."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        lengths: list[int],
        *,
        dtype: torch.dtype = torch.bfloat16,
        window: int | None = None,
        block_size: int = 16,
        isa: Isa | None = None,
        leftovers: float = 0.0,
    ) -> None:
        self.window, self.dtype = window, dtype
        num_pages = [-(-length // block_size) for length in lengths]
        self.options = {"num_blocks": sum(num_pages) + 1, "block_size": block_size, "kv_dtype": dtype}
        self.config, self.library, self.leftovers = config(shape, window=window), kvcache_library(isa), leftovers
        pages = iter(torch.randperm(sum(num_pages)).add(1).tolist())
        self.sequences = [
            Sequence(shape, length, list(itertools.islice(pages, count)))
            for length, count in zip(lengths, num_pages, strict=True)
        ]
        self.cache = self.fresh_cache()

    def fresh_cache(self) -> NativePagedKVCache:
        cache = NativePagedKVCache(self.config, pool=get_pool(), library=self.library, **self.options)
        if self.leftovers != self.leftovers:
            for tensor in cache.layers[0].tensors:
                tensor.fill_(self.leftovers if tensor.is_floating_point() else NAN_CODE if self.is_fp8 else 86)
        return cache

    @property
    def is_fp8(self) -> bool:
        return self.dtype == torch.float8_e4m3fn

    def step(self, pieces: list[tuple[int, int, int]], cache: NativePagedKVCache | None = None) -> list[torch.Tensor]:
        """Feeds tokens [start, end) of the sequences with these indices in one batch; returns each one's rows."""
        cache = cache or self.cache
        cache.bind([self.sequences[index].slice(start, end) for index, start, end in pieces])
        inputs = (
            torch.cat([getattr(self.sequences[index], name)[start:end] for index, start, end in pieces])
            for name in ("q", "k", "v")
        )
        return list(cache.attend(0, *inputs).split([end - start for _, start, end in pieces]))

    def whole(self, index: int = 0) -> torch.Tensor:
        """All rows of one sequence in one piece, in a cache of its own."""
        return self.step([(index, 0, self.sequences[index].length)], self.fresh_cache())[0]

    def in_chunks(self, lengths: list[int], index: int = 0) -> torch.Tensor:
        """The same, in chunks of these lengths, in turns."""
        cache, rows, start = self.fresh_cache(), [], 0
        for length in itertools.cycle(lengths):
            end = min(start + length, self.sequences[index].length)
            rows += self.step([(index, start, end)], cache)
            start = end
            if start == self.sequences[index].length:
                return torch.cat(rows)
        raise AssertionError

    def check(self, index: int, start: int, rows: torch.Tensor, *, tolerance: float = TOLERANCE) -> None:
        sequence, here = self.sequences[index], slice(start, start + len(rows))
        if self.dtype == torch.int8:
            coded = sequence.coded(self.window)[here]
            torch.testing.assert_close(rows.double(), coded, atol=CODED_TOLERANCE, rtol=CODED_TOLERANCE)
            tolerance = ROUNDED_TOLERANCE
        expected = sequence.expected(self.dtype, self.window)[here]
        torch.testing.assert_close(rows.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_batches_equal_the_reference_for_each_instruction_set(isa, dtype):
    if isa not in available_isas():
        pytest.skip(f"this CPU has no {isa.name}")
    for shape in SHAPES:
        window = random.choice([None, None, 5, 40, SEGMENT + 3])
        lengths = [1, random.randint(2, 40), random.randint(SEGMENT - 2, SEGMENT + 2), random.randint(300, 700)]
        block_size = random.choice([16, 32, 48])
        stage = Stage(shape, lengths, dtype=dtype, window=window, block_size=block_size, isa=isa)
        starts = [random.randint(0, length - 1) for length in lengths]
        starts[random.randrange(1, 4)] = -1  # one decodes
        pieces = [(i, start % length, length) for i, (start, length) in enumerate(zip(starts, lengths, strict=True))]
        context = [(index, 0, start) for index, start, _ in pieces if start]
        for (index, _, _), rows in zip(context, stage.step(context), strict=True):
            stage.check(index, start=0, rows=rows)
        for (index, start, _), rows in zip(pieces, stage.step(pieces), strict=True):
            stage.check(index, start, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 70])
def test_a_prompt_gives_the_same_bits_whole_and_in_any_chunks(dtype, window):
    for shape in random.sample(SHAPES, 3):
        stage = Stage(shape, [SEGMENT + random.randint(1, 100)], dtype=dtype, window=window)
        whole = stage.whole()
        stage.check(0, start=0, rows=whole)
        for lengths in ([1], [2, 1, 5], [100, 3], [SEGMENT, 1], [random.randint(1, 60) for _ in range(5)]):
            assert torch.equal(stage.in_chunks(lengths), whole), (shape, lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_gives_the_same_bits_alone_and_in_any_batch(dtype):
    lengths = [700, 33, 1, 300, 257, 16]
    stage = Stage((9, 3, 64), lengths, dtype=dtype)
    alone = [stage.whole(index) for index in range(len(lengths))]
    positions = [0] * len(lengths)
    while any(position < length for position, length in zip(positions, lengths, strict=True)):
        unfinished = [index for index, length in enumerate(lengths) if positions[index] < length]
        pieces = []
        for index in random.sample(unfinished, random.randint(1, len(unfinished))):
            end = min(positions[index] + random.choice([1, 1, 2, 20, 400]), lengths[index])
            pieces.append((index, positions[index], end))
        for (index, start, end), rows in zip(pieces, stage.step(pieces), strict=True):
            assert torch.equal(rows, alone[index][start:end])
            positions[index] = end


@pytest.mark.parametrize("window", [None, 300])
def test_any_number_of_threads_gives_the_same_bits(window):
    """Two threads and one long sequence: its segments are divided, for decodes and for a few tokens at once."""
    lengths = [900, 40, 300]
    stage = Stage((9, 3, 64), lengths, window=window)
    batches = [
        [(0, 0, 895), (1, 0, 39), (2, 0, 299)],
        [(0, 895, 896)],
        [(0, 896, 899), (1, 39, 40)],
        [(2, 299, 300), (0, 899, 900)],
    ]
    results = []
    for num_threads in (1, 2, 3):
        get_pool(num_threads)
        cache = stage.fresh_cache()
        results.append([rows for batch in batches for rows in stage.step(batch, cache)])
    for rows in results[1:]:
        assert all(map(torch.equal, rows, results[0]))
    stage.check(0, 895, results[0][3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 3, 64), (4, 4, 8)])
def test_leftovers_in_unused_slots_have_no_effect(dtype, shape):
    clean = Stage(shape, [300], dtype=dtype)
    dirty = Stage(shape, [300], dtype=dtype, leftovers=float("nan"))
    dirty.sequences = clean.sequences
    for lengths in ([300], [1], [17, 1]):
        assert torch.equal(dirty.in_chunks(lengths), clean.in_chunks(lengths))


def test_a_row_of_nan_stays_alone():
    stage = Stage((9, 3, 64), [40, 300])
    expected = stage.step([(0, 0, 40), (1, 0, 300)], stage.fresh_cache())
    stage.sequences[1].q[100, 4, 7] = float("nan")
    stage.sequences[0].q[3] = float("nan")
    rows = stage.step([(0, 0, 40), (1, 0, 300)])
    assert rows[0][3].isnan().all()
    assert rows[1][100, 4].isnan().all()
    rows[0][3], rows[1][100, 4] = expected[0][3], expected[1][100, 4]
    assert all(map(torch.equal, rows, expected))


@pytest.mark.parametrize(
    ("dtype", "bad"), [*((dtype, float("nan")) for dtype in DTYPES), (torch.int8, float("inf"))], ids=str
)
def test_a_key_that_is_no_number_spoils_what_sees_it_and_nothing_else(dtype, bad):
    stage = Stage((9, 3, 64), [60], dtype=dtype)
    stage.sequences[0].k[20, 1, 5] = bad
    rows = stage.in_chunks([30, 1])
    assert rows[:20].isfinite().all()
    assert rows[20:, [0, 1, 2, 6, 7, 8]].isfinite().all()
    assert rows[20:, 3:6].isnan().all()


def test_large_scores_do_not_overflow():
    stage = Stage((3, 1, 64), [300], dtype=torch.float32)
    stage.sequences[0].q *= 200
    stage.check(0, start=0, rows=stage.whole(), tolerance=5e-3)  # scores of hundreds are themselves rounded to 3e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_pages_hold_what_the_layout_says(dtype, shape):
    stage = Stage(shape, [75], dtype=dtype, block_size=32)
    stage.whole()
    [sequence], head_dim = stage.sequences, shape[2]
    stage.step([(0, 0, 50)])
    stage.step([(0, 50, 51)])
    stage.step([(0, 51, 75)])
    keys, values = (read(stage.cache.layers[0], sequence.table, 75) for read in (read_keys, read_values))
    assert torch.equal(keys, round_as_stored(sequence.k, KV_DTYPES[dtype]))
    assert torch.equal(values[..., :head_dim], round_as_stored(sequence.v, KV_DTYPES[dtype]))
    assert not values[..., head_dim:].any()
    unused = [page for page in range(stage.cache.num_blocks + 1) if page not in sequence.table]
    assert not any(tensor[unused].any() for tensor in stage.cache.layers[0].tensors)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_fp8_rounds_every_number_to_the_nearest(isa):
    if isa not in available_isas():
        pytest.skip(f"this CPU has no {isa.name}")
    stage = Stage((2, 2, 128), [400], dtype=torch.float8_e4m3fn, isa=isa)
    [sequence] = stage.sequences
    shape = sequence.k.shape
    sequence.k = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32).view(torch.float32)  # NaN and infinity, too
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num()
    halfway = (every + every.roll(1)) / 2
    nudged = torch.nextafter(halfway, torch.randn(256))
    cases = torch.cat([every, halfway, nudged, torch.tensor([448.1, 463.9, 464.0, 464.1, 1e38, torch.inf, torch.nan])])
    sequence.v = torch.cat([cases, -cases, torch.randn(shape.numel() - 2 * len(cases)) * 0.01]).view(shape)
    stage.whole()
    stage.step([(0, 0, 400)])
    layer = stage.cache.layers[0]
    for read, x in ((read_keys, sequence.k), (read_values, sequence.v)):
        stored = read(layer, sequence.table, 400)
        expected = round_to_fp8(x).float()
        assert stored[x.isfinite()].abs().max() <= 448
        assert torch.equal(stored.isnan(), x.isnan())
        assert torch.equal(stored.nan_to_num().view(torch.int32), expected.nan_to_num().view(torch.int32))


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("num_new", [1, 3], ids=["decode", "chunk"])
def test_fp8_reads_every_code_exactly(isa, num_new):
    """A token that sees itself alone gets its own value."""
    if isa not in available_isas():
        pytest.skip(f"this CPU has no {isa.name}")
    stage = Stage((2, 2, 128), [num_new], dtype=torch.float8_e4m3fn, isa=isa, window=1)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    if num_new > 1:
        codes = codes.nan_to_num()  # a tile multiplies what a row does not see with zero
    stage.sequences[0].v = codes[torch.randperm(256)].view(1, 2, 128).repeat(num_new, 1, 1)
    rows = stage.whole()
    assert torch.equal(rows.isnan(), stage.sequences[0].v.isnan())
    assert torch.equal(rows.nan_to_num(), stage.sequences[0].v.nan_to_num() + 0.0)


def test_fp8_takes_what_is_too_large_as_the_largest():
    stage = Stage((2, 2, 16), [1], dtype=torch.float8_e4m3fn)
    stage.sequences[0].v = torch.tensor([1e6, -1e6, torch.inf, -torch.inf]).repeat(8).view(1, 2, 16)
    assert torch.equal(stage.whole(), stage.sequences[0].v.clamp(-448, 448))


def test_int8_counts_vanishing_heads_as_zero():
    stage = Stage((3, 1, 8), [5], dtype=torch.int8)
    stage.sequences[0].v[2] = 1e-38
    stage.sequences[0].v[3] = 0.0
    stage.check(0, start=0, rows=stage.whole())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_wrong_number_in_a_page_would_be_noticed(dtype):
    stage = Stage((9, 3, 64), [100], dtype=dtype)
    stage.step([(0, 0, 99)])
    page, lane = stage.sequences[0].table[2], random.randrange(LANES)
    tensor = random.choice(stage.cache.layers[0].tensors[:2])
    head = tensor[page, 1].flatten()
    head[lane] = head[lane] + (60 if dtype.itemsize == 1 else 3.0)
    rows = stage.step([(0, 99, 100)])[0]
    with pytest.raises(AssertionError, match="not close"):
        stage.check(0, 99, rows)


def test_the_bitwise_tests_would_notice_another_order_of_summation():
    """One unit in the last place is a difference."""
    stage = Stage((9, 3, 64), [300])
    whole, chunks = stage.whole(), stage.in_chunks([1])
    chunks[299, 0, 0] = torch.nextafter(chunks[299, 0, 0], torch.tensor(10.0))
    assert not torch.equal(chunks, whole)
