"""Draws in C++ against draws with torch: the same tokens, whatever the options, the batch and the threads."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from aios_model.errors import ConfigError
from aios_model.native import native_status
from aios_model.native.isa import available_isas
from aios_model.native.threads import get_pool
from aios_model.sampling.errors import NonFiniteLogitsError, NoTokenLeftError
from aios_model.sampling.noise import row_keys, uniform_noise
from aios_model.sampling.params import SamplingParams
from aios_model.sampling.rows import SamplingRow
from aios_model.sampling.sampler import Sampler

pytestmark = pytest.mark.skipif(not native_status().available, reason=native_status().reason)

# One token, less than a vector, its edges, those of a block (256), of a piece (16,384), and more than one piece.
SIZES = [1, 2, 3, 15, 16, 17, 31, 100, 255, 256, 257, 1000, 4097, 16_383, 16_384, 16_385, 40_001]


def row_for(params: SamplingParams, **changes) -> SamplingRow:
    given = {"request_id": "r", "seed": 1, "position": 3, "prompt_token_ids": [], "output_token_ids": []}
    return SamplingRow(params=params, **{**given, **changes})


def sample(logits: torch.Tensor, rows: list[SamplingRow], *, threads: int | None = 1) -> list[int]:
    """With native kernels; with torch for None."""
    pool = None if threads is None else get_pool(threads)
    sampler = Sampler(vocab_size=logits.shape[1], device="cpu", pool=pool)
    return [sampled.token_id for sampled in sampler.sample(logits, rows)]


def random_logits(rows: int, vocab: int) -> torch.Tensor:
    """Rows of many kinds: flat and steep, with ties, bans, outliers and an order."""
    x = torch.randn(rows, vocab) * random.choice([0.1, 1.0, 3.0, 10.0])
    if random.random() < 0.4:
        step = random.choice([0.125, 1.0, 4.0])
        x = (x / step).round() * step
    if random.random() < 0.3:
        x[torch.rand(rows, vocab) < random.choice([0.1, 0.9, 0.999])] = -math.inf
        x[:, random.randrange(vocab)] = 0.0
    if random.random() < 0.2:
        x[:, random.randrange(vocab)] = -3e38
    if random.random() < 0.2:
        x[:, random.randrange(vocab)] += random.choice([5.0, 20.0, 1e4])
    if random.random() < 0.2:
        x = x.sort(dim=-1, descending=random.random() < 0.5).values
    return x.contiguous()


def random_params(vocab: int) -> SamplingParams:
    most = min(vocab, 1500)
    return SamplingParams(
        temperature=random.choice([0.0, 1e-5, 0.05, 0.7, 1.0, 1.0, 2.0]),
        top_k=random.choice([0, 0, 0, 1, 2, 7, 60, random.randint(1, most), max(1, vocab - 1), vocab, vocab + 5]),
        top_p=random.choice([1.0, 1.0, random.uniform(0.001, 0.3), random.uniform(0.3, 0.999), 1 - 1e-9]),
        min_p=random.choice([0.0, 0.0, 0.0, random.uniform(0.0, 0.2), 1e-6, 1.0]),
    )


def random_rows(count: int, vocab: int) -> list[SamplingRow]:
    return [
        row_for(
            random_params(vocab),
            request_id=str(i),
            seed=random.randrange(-(2**63), 2**63),
            position=random.randrange(10**6),
        )
        for i in range(count)
    ]


def is_drawn_up_to_rounding(token: int, logits: torch.Tensor, row: SamplingRow) -> bool:
    """Whether `token` wins in float64 once filters and scores are off by a few units of float32's last place."""
    params = row.params
    depth = (logits.double().max() - logits.double()) / params.temperature
    weights = (-depth).exp()
    order = torch.argsort(depth.float(), stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    kept_by = []
    for slack in (-1e-5, 1e-5):
        least = params.min_p * (1 - slack) if params.min_p else 0.0
        kept = (weights >= least) & (place < (params.top_k or len(order)))
        mass = (weights * kept)[order].cumsum(0)
        before = (mass - (weights * kept)[order])[place]
        kept_by.append(kept & (before < params.top_p * mass[-1] * (1 + slack)))
    uniform = uniform_noise(
        row_keys(torch.tensor([row.seed]), torch.tensor([row.position])),
        torch.arange(len(logits), dtype=torch.int32),
    )[0]
    scores = weights / -torch.log1p(-uniform.double())
    surely = scores[kept_by[0]]
    return bool(kept_by[1][token]) and (len(surely) == 0 or scores[token] >= surely.max() * (1 - 1e-5))


@pytest.mark.parametrize("vocab", SIZES)
def test_tokens_are_those_that_torch_draws(vocab):
    for _ in range(12 if vocab <= 5000 else 5):
        count = random.randint(1, 8)
        logits, rows = random_logits(count, vocab), random_rows(count, vocab)
        before = logits.clone()
        expected, got = sample(logits, rows, threads=None), sample(logits, rows)
        for token, other, x, row in zip(got, expected, logits, rows, strict=True):
            assert token == other or is_drawn_up_to_rounding(token, x, row), (token, other, row)
        assert torch.equal(logits, before), "the caller's logits were changed"


def test_hardly_any_token_differs_from_torchs():
    """Rounding may decide one draw in a hundred thousand; more would be another distribution."""
    logits, differing = torch.randn(64, 3000), 0
    for params in (SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=50), SamplingParams(min_p=0.05)):
        rows = [row_for(params, seed=random.getrandbits(60)) for _ in range(64)]
        pairs = zip(sample(logits, rows), sample(logits, rows, threads=None), strict=True)
        differing += sum(ours != theirs for ours, theirs in pairs)
    assert differing <= 1


def test_min_p_keeps_what_is_just_likely_enough():
    least = torch.tensor(2.0)
    logits = torch.stack((torch.tensor(0.0), -least, -least.nextafter(torch.tensor(3.0))))[None]
    for options in ({}, {"top_k": 2}, {"top_p": 0.999}):
        rows = [row_for(SamplingParams(min_p=math.exp(-2.0), **options), seed=seed) for seed in range(300)]
        assert set(sample(logits.repeat(300, 1), rows)) == {0, 1}


@pytest.mark.parametrize("vocab", [5, 300, 5000, 20_000])
def test_equally_likely_tokens_are_cut_at_the_lower_ids(vocab):
    """More ties than are ever sorted; sums of ones are exact, so top-p ends where arithmetic says."""
    logits = torch.zeros(1, vocab)
    for _ in range(8):
        k = random.randint(1, vocab)
        top_p = random.choice([0.25, 0.5, 0.75, 1.0])
        kept = math.ceil(k * top_p)
        rows = [row_for(SamplingParams(top_k=k, top_p=top_p), seed=seed) for seed in range(40)]
        tokens = sample(logits.repeat(40, 1), rows)
        assert max(tokens) < kept
        assert tokens == sample(logits.repeat(40, 1), rows, threads=None)
    tokens = sample(logits.repeat(500, 1), [row_for(SamplingParams(top_p=0.5), seed=s) for s in range(500)])
    assert max(tokens) < math.ceil(vocab / 2)
    assert max(tokens) > 0.45 * vocab - 1


@pytest.mark.parametrize("vocab", [50, 40_001])
def test_a_token_is_the_same_alone_in_any_batch_and_with_any_number_of_threads(vocab):
    count = 9
    logits, rows = random_logits(count, vocab), random_rows(count, vocab)
    alone = [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(count)]
    for threads in (1, 2, 3):
        assert sample(logits, rows, threads=threads) == alone
        assert [sample(logits[i : i + 1], rows[i : i + 1], threads=threads)[0] for i in range(count)] == alone
        for size in (2, 3, 5):
            order = random.sample(range(count), size)
            assert sample(logits[order], [rows[i] for i in order], threads=threads) == [alone[i] for i in order]


def test_a_pool_that_grows_between_draws_changes_nothing():
    vocab = 20_000
    logits, rows = random_logits(6, vocab), random_rows(6, vocab)
    sampler = Sampler(vocab_size=vocab, device="cpu", pool=get_pool(1))
    first = sampler.sample(logits, rows)
    for threads in (3, 1, 2):
        get_pool(threads)
        assert sampler.sample(logits, rows) == first
    assert [token.token_id for token in sampler.sample(logits.repeat(7, 1), rows * 7)] == [
        token.token_id for token in first
    ] * 7


def draw_surprise(expected: np.ndarray, params: SamplingParams, logits: list[float], draws: int = 30_000) -> float:
    """Standard deviations by which draws differ from the probabilities (chi-square, Wilson and Hilferty)."""
    start = random.getrandbits(40)
    rows = [row_for(params, seed=start + i, position=i % 7) for i in range(draws)]
    counts = np.bincount(sample(torch.tensor(logits).repeat(draws, 1), rows), minlength=len(logits))
    assert counts[expected == 0].sum() == 0, "drew a token of probability zero"
    counts, expected = counts[expected > 0], expected[expected > 0] * draws
    freedom = len(counts) - 1
    spread = 2 / (9 * freedom)
    statistic = ((counts - expected) ** 2 / expected).sum()
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def softmax(values: list[float], keep: int | None = None) -> np.ndarray:
    weights = np.exp(np.array(values))
    weights[keep:] = 0 if keep else weights[keep:]
    return weights / weights.sum()


SMALL = [2.0, 1.5, 1.0, 0.5, 0.0, -1.0, -2.0, -3.0]


def test_draws_follow_the_probabilities():
    # Five standard deviations: the seeds are new in each run.
    assert abs(draw_surprise(softmax(SMALL), SamplingParams(), SMALL)) < 5
    assert abs(draw_surprise(softmax([2 * x for x in SMALL]), SamplingParams(temperature=0.5), SMALL)) < 5
    assert abs(draw_surprise(softmax(SMALL, keep=3), SamplingParams(top_k=3), SMALL)) < 5
    # Cumulative probabilities are 0.43, 0.69, 0.84, 0.94, ...: 0.85 is reached by the fourth token.
    assert abs(draw_surprise(softmax(SMALL, keep=4), SamplingParams(top_p=0.85), SMALL)) < 5
    # exp(-2) = 0.135 of the likeliest is kept, exp(-3) is not.
    assert abs(draw_surprise(softmax(SMALL, keep=5), SamplingParams(min_p=0.13), SMALL)) < 5


def test_a_planted_bias_is_seen():
    biased = [SMALL[0] + 0.2, *SMALL[1:]]
    assert draw_surprise(softmax(SMALL), SamplingParams(), biased) > 5
    assert draw_surprise(softmax(SMALL), SamplingParams(temperature=0.9), SMALL) > 5


@pytest.mark.parametrize("vocab", [7, 300, 40_001])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_p": 0.5}, {"top_k": 4}, {"min_tokens": 1}], ids=str)
def test_logits_that_are_not_finite_are_an_error_that_names_the_request(vocab, bad, options):
    logits = torch.randn(3, vocab)
    logits[1, random.randrange(vocab)] = bad
    rows = [row_for(SamplingParams(**options), request_id=name) for name in ("good", "bad", "also good")]
    for threads in (1, 4):
        with pytest.raises(NonFiniteLogitsError, match="bad") as caught:
            sample(logits, rows, threads=threads)
        assert caught.value.request_ids == ("bad",)
        assert len(sample(logits[[0, 2]], [rows[0], rows[2]], threads=threads)) == 2


def test_a_row_without_any_token_is_an_error_that_names_it():
    logits = torch.zeros(2, 50)
    logits[0] = -math.inf
    for options in ({"temperature": 0}, {}, {"top_p": 0.5}):
        rows = [row_for(SamplingParams(**options), request_id=name) for name in ("torn", "fine")]
        with pytest.raises(NoTokenLeftError, match="torn") as caught:
            sample(logits, rows)
        assert caught.value.request_ids == ("torn",)


def test_altered_rows_and_untouched_ones_are_drawn_side_by_side():
    vocab = 500
    logits = torch.randn(40, vocab) * 3
    rows = [
        row_for(params, request_id=str(i), seed=i, output_token_ids=[3, 4], stop_token_ids=(9,))
        for i, params in enumerate(
            [
                SamplingParams(temperature=0),
                SamplingParams(presence_penalty=1.5, top_p=0.8),
                SamplingParams(top_k=5, logprobs=2),
                SamplingParams(allowed_token_ids=[7, 8, 400]),
                SamplingParams(temperature=0.5, min_tokens=4),
            ]
            * 8
        )
    ]
    ours = Sampler(vocab_size=vocab, device="cpu", pool=get_pool(1)).sample(logits, rows)
    assert ours == Sampler(vocab_size=vocab, device="cpu").sample(logits, rows)


def test_views_and_other_float_types_are_accepted():
    wide = torch.randn(3, 2, 40)
    rows = [row_for(SamplingParams(top_p=0.7), request_id=str(i), seed=i) for i in range(3)]
    for view in (wide[:, 1], wide[:, 0], wide.transpose(0, 2)[:, 0].T, wide[:, 1].bfloat16(), wide[:, 1].double()):
        assert sample(view, rows) == sample(view.float().contiguous(), rows)
    assert sample(torch.empty(0, 40), []) == []


def test_a_pool_cannot_draw_on_another_device():
    with pytest.raises(ConfigError, match="cuda"):
        Sampler(vocab_size=8, device="cuda", pool=get_pool(1))


@pytest.mark.parametrize("isa", [isa.name for isa in available_isas()[1:]])
def test_every_instruction_set_draws_the_same(isa, run_with_isa):
    run_with_isa(isa, __file__, "-k", "not instruction_set and not follow and not planted")
