from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aios_model.errors import InvalidRequestError
from aios_model.sampling import processors, truncation
from aios_model.sampling.drafted_rows import DraftedTokens, rows_with_drafts
from aios_model.sampling.errors import NonFiniteLogitsError, NoTokenLeftError
from aios_model.sampling.history import TokenCounts
from aios_model.sampling.params import SamplingParams
from aios_model.sampling.sampler import SampledToken, Sampler, SamplingRow

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors gain nothing from a second thread, and on a busy machine they wait for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits_of(seed: int, rows: int, vocab: int, *, step: float = 0.0, scale: float = 3.0) -> torch.Tensor:
    """Normal float64 logits; rounded to multiples of `step` to make ties."""
    x = torch.randn(rows, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale
    return (x / step).round() * step if step else x


def row_for(params: SamplingParams, **changes) -> SamplingRow:
    given = {"request_id": "r", "seed": 1, "position": 3, "prompt_token_ids": [], "output_token_ids": []}
    return SamplingRow(params=params, **{**given, **changes})


def sample(logits: torch.Tensor, rows: list[SamplingRow], **options) -> list[int]:
    sampler = Sampler(vocab_size=logits.shape[1], device="cpu", **options)
    return [sampled.token_id for sampled in sampler.sample(logits, rows)]


def greedy_with(logits: list[float], output=(), prompt=(), stop=(), **options) -> int:
    row = row_for(
        SamplingParams(temperature=0, **options),
        output_token_ids=list(output),
        prompt_token_ids=list(prompt),
        stop_token_ids=tuple(stop),
    )
    return sample(torch.tensor([logits]), [row])[0]


# A plain reference: one row, numpy float64, the rules as the documentation words them ------------------------------


def reference_noise(seed: int, position: int, vocab: int) -> np.ndarray:
    """Exponential noise in unsigned numpy arithmetic."""

    def splitmix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    key = splitmix((splitmix((seed + golden) % 2**64) + position * golden) % 2**64)
    x = np.arange(vocab, dtype=np.uint32) + np.uint32(key % 2**32)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD) ^ np.uint32(key >> 32)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x735A2D97)
    x ^= x >> np.uint32(15)
    return -np.log1p(-((x % 2**31).astype(np.float64) + 0.5) / 2**31)


def reference_logits(logits: np.ndarray, row: SamplingRow, *, bans: bool = True) -> np.ndarray:
    params, out, x = row.params, list(row.output_token_ids), logits.copy()
    if params.allowed_token_ids is not None:
        for token in set(range(len(x))) - set(params.allowed_token_ids):
            x[token] = -np.inf
    if bans:
        for *prefix, last in params.bad_words_token_ids:
            if len(prefix) <= len(out) and out[len(out) - len(prefix) :] == prefix:
                x[last] = -np.inf
        if len(out) < params.min_tokens:
            x[list(row.stop_token_ids)] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in set(row.prompt_token_ids) | set(out):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(out):
        x[token] -= params.frequency_penalty * out.count(token) + params.presence_penalty
    return reference_logits(logits, row, bans=False) if bans and np.all(x == -np.inf) else x


def reference_token(logits: np.ndarray, row: SamplingRow) -> int:
    params, x = row.params, reference_logits(logits, row)
    if params.temperature == 0:
        return int(np.argmax(x))
    weights = np.exp((x - x.max()) / params.temperature)
    weights[weights < params.min_p * weights.max()] = 0.0
    order = sorted(range(len(x)), key=lambda token: (-weights[token], token))
    kept = [token for token in order if weights[token] > 0][: params.top_k or None]
    if params.top_p < 1:
        mass = np.cumsum(weights[kept])
        kept = [token for i, token in enumerate(kept) if i == 0 or mass[i - 1] < params.top_p * mass[-1]]
    noise = reference_noise(row.seed, row.position, len(x))
    return max(kept, key=lambda token: weights[token] / noise[token])


VOCAB = 300


@st.composite
def sampling_rows(draw, vocab: int = VOCAB) -> SamplingRow:
    """A row with any mix of options. Thresholds are drawn where no sum of probabilities will hit them exactly."""
    token = st.integers(0, vocab - 1)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    maybe = lambda strategy, off: draw(st.one_of(st.just(off), strategy))  # noqa: E731
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.05, 0.7, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 7, 60, vocab - 1, vocab, vocab + 5])),
        top_p=draw(st.sampled_from([1.0, 1.0, rng.uniform(0.001, 0.3), rng.uniform(0.3, 0.999)])),
        min_p=draw(st.sampled_from([0.0, 0.0, rng.uniform(0.0, 0.2), 1.0])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, -1.5, 0.7, 2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, -0.3, 1.1])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 0.8, 1.3])),
        min_tokens=draw(st.sampled_from([0, 0, 3])),
        logit_bias=maybe(st.dictionaries(token, st.floats(-100, 100), max_size=5), None),
        allowed_token_ids=maybe(st.lists(token, min_size=1, max_size=20), None),
        bad_words_token_ids=draw(st.lists(st.lists(token, min_size=1, max_size=3), max_size=4)),
    )
    return SamplingRow(
        request_id=str(draw(st.integers(0, 10**9))),
        params=params,
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        position=draw(st.integers(0, 10**6)),
        prompt_token_ids=draw(st.lists(token, max_size=8)),
        output_token_ids=draw(st.lists(token, max_size=8)),
        stop_token_ids=frozenset(draw(st.lists(token, max_size=2))),
    )


@given(
    rows=st.lists(sampling_rows(), min_size=1, max_size=6, unique_by=lambda row: row.request_id),
    seed=st.integers(0, 2**32),
    step=st.sampled_from([0.0, 0.5]),
)
@settings(max_examples=150, deadline=None)
def test_any_mix_of_options_equals_the_plain_reference(rows, seed, step):
    logits = logits_of(seed, len(rows), VOCAB, step=step)
    before = logits.clone()
    got = sample(logits, rows)
    assert got == [reference_token(x, row) for x, row in zip(logits.numpy(), rows, strict=True)]
    assert torch.equal(logits, before), "the caller's logits were changed"


MIXED = [
    GREEDY,
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(top_k=50),
    SamplingParams(top_k=700, top_p=0.97),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.999, temperature=2),
    SamplingParams(min_p=0.02),
    SamplingParams(min_p=0.02, top_k=40, top_p=0.8, temperature=1.5),
    SamplingParams(temperature=0, repetition_penalty=1.2, presence_penalty=0.4),
    SamplingParams(frequency_penalty=0.5, top_p=0.5),
    SamplingParams(allowed_token_ids=range(0, 6000, 7)),
    SamplingParams(temperature=0, logit_bias={5: 10.0}, min_tokens=9),
    SamplingParams(bad_words_token_ids=[[3], [1, 2]], logprobs=3),
]


def mixed_rows(vocab: int) -> list[SamplingRow]:
    return [
        row_for(
            params,
            request_id=str(i),
            seed=i * 17,
            position=100 + i,
            prompt_token_ids=[(i * 31 + j * 7) % vocab for j in range(40)],
            output_token_ids=[(i * 11 + j * 5) % vocab for j in range(8)],
            stop_token_ids=(2, 9),
        )
        for i, params in enumerate(MIXED)
    ]


@pytest.mark.parametrize("step", [0.0, 0.125])
def test_a_mixed_batch_gives_each_row_exactly_what_it_gets_alone(step):
    vocab = 20_000
    rows, logits = mixed_rows(vocab), logits_of(11, len(MIXED), vocab, step=step).float()
    sampler = Sampler(vocab_size=vocab, device="cpu")
    together = sampler.sample(logits, rows)
    for i, row in enumerate(rows):
        assert Sampler(vocab_size=vocab, device="cpu").sample(logits[i : i + 1], [row]) == [together[i]]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(5)).tolist()
    assert sampler.sample(logits[order], [rows[i] for i in order]) == [together[i] for i in order]
    many = sampler.sample(logits.repeat(8, 1), rows * 8)
    assert many == together * 8


def test_the_number_of_threads_changes_nothing():
    rows, logits = mixed_rows(20_000), logits_of(12, len(MIXED), 20_000).float()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(Sampler(vocab_size=20_000, device="cpu").sample(logits, rows))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1]


def test_a_draw_depends_on_seed_and_position_and_on_nothing_else():
    logits = logits_of(1, 1, VOCAB, scale=0.5)
    row = row_for(SamplingParams())
    first = sample(logits, [row])
    assert sample(logits, [row]) == first
    assert sample(logits, [replace(row, request_id="other", prompt_token_ids=[1], output_token_ids=[2])]) == first
    by_position = {sample(logits, [replace(row, position=p)])[0] for p in range(40)}
    by_seed = {sample(logits, [replace(row, seed=s)])[0] for s in range(40)}
    assert len(by_position) > 20
    assert len(by_seed) > 20


def test_filters_that_remove_nothing_change_nothing():
    logits = logits_of(2, 1, VOCAB)
    for seed in range(30):
        plain = sample(logits, [row_for(SamplingParams(), seed=seed)])
        for off in ({"top_k": VOCAB}, {"top_k": VOCAB - 1, "top_p": 1.0 - 1e-9}, {"min_p": 1e-30}):
            assert sample(logits, [row_for(SamplingParams(**off), seed=seed)]) == plain


# Distribution --------------------------------------------------------------------------------------------------------


def draw_surprise(
    probabilities: list[float], params: SamplingParams, logits: list[float], draws: int = 30_000
) -> float:
    """Standard deviations by which draws differ from the probabilities (chi-square, Wilson and Hilferty)."""
    rows = [row_for(params, seed=seed, position=seed % 7) for seed in range(draws)]
    counts = np.bincount(sample(torch.tensor(logits).repeat(draws, 1), rows), minlength=len(logits))
    expected = np.array(probabilities) * draws
    assert counts[expected == 0].sum() == 0, "drew a token of probability zero"
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    spread = 2 / (9 * freedom)
    statistic = ((counts - expected) ** 2 / expected).sum()
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def softmax(values: list[float]) -> list[float]:
    weights = np.exp(np.array(values) - max(values))
    return (weights / weights.sum()).tolist()


SMALL = [2.0, 1.5, 1.0, 0.5, 0.0, -1.0, -2.0, -3.0]


def test_draws_follow_the_softmax():
    assert abs(draw_surprise(softmax(SMALL), SamplingParams(), SMALL)) < 4


def test_draws_follow_temperature_and_filters():
    cold = softmax([x / 0.5 for x in SMALL])
    assert abs(draw_surprise(cold, SamplingParams(temperature=0.5), SMALL)) < 4
    top_3 = [*softmax(SMALL[:3]), 0, 0, 0, 0, 0]
    assert abs(draw_surprise(top_3, SamplingParams(top_k=3), SMALL)) < 4
    # Cumulative probabilities are 0.43, 0.69, 0.84, 0.94, ...: 0.85 is reached by the fourth token.
    top_4 = [*softmax(SMALL[:4]), 0, 0, 0, 0]
    assert abs(draw_surprise(top_4, SamplingParams(top_p=0.85), SMALL)) < 4
    # exp(-2) = 0.135 of the likeliest is kept, exp(-3) is not.
    top_5 = [*softmax(SMALL[:5]), 0, 0, 0]
    assert abs(draw_surprise(top_5, SamplingParams(min_p=0.13), SMALL)) < 4


def test_the_distribution_test_notices_a_planted_bias(monkeypatch):
    exact = truncation.exponential_noise
    monkeypatch.setattr(truncation, "exponential_noise", lambda keys, ids: exact(keys, ids) ** 0.95)
    assert draw_surprise(softmax(SMALL), SamplingParams(), SMALL) > 4
    monkeypatch.setattr(truncation, "exponential_noise", lambda keys, ids: exact(keys, ids) + 0.01)
    assert draw_surprise(softmax(SMALL), SamplingParams(), SMALL) > 4


def test_consecutive_positions_of_one_seed_are_drawn_independently():
    flat = torch.zeros(1, 8).repeat(30_000, 1)
    tokens = np.array(sample(flat, [row_for(SamplingParams(), seed=5, position=p) for p in range(30_000)]))
    counts = np.bincount(tokens[1:] * 8 + tokens[:-1], minlength=64)
    statistic = ((counts - 29_999 / 64) ** 2 / (29_999 / 64)).sum()
    assert abs(statistic - 63) < 4 * math.sqrt(2 * 63)


# Greedy, top-k, top-p, min-p -----------------------------------------------------------------------------------------


def test_greedy_takes_the_lowest_of_equal_logits():
    assert greedy_with([1.0, 5.0, 5.0, 0.0]) == 1


def test_top_k_prefers_lower_ids_among_equal_logits():
    logits = torch.zeros(1, 5000)
    logits[0, 4000] = 1.0
    tokens = {sample(logits, [row_for(SamplingParams(top_k=4), seed=s)])[0] for s in range(60)}
    assert tokens == {4000, 0, 1, 2}


def test_top_k_one_is_greedy():
    logits = logits_of(3, 1, VOCAB)
    for seed in range(20):
        assert sample(logits, [row_for(SamplingParams(top_k=1), seed=seed)]) == [int(logits.argmax())]


def test_the_likeliest_token_survives_every_filter():
    logits = logits_of(4, 1, VOCAB)
    for strict in ({"top_p": 1e-12}, {"min_p": 1.0}, {"top_p": 1e-12, "min_p": 1.0, "top_k": 1}):
        params = SamplingParams(**strict, temperature=2)
        assert {sample(logits, [row_for(params, seed=s)])[0] for s in range(20)} == {int(logits.argmax())}


def test_top_p_is_measured_against_what_top_k_leaves():
    # Probabilities 0.25 each. Of two tokens the first holds half: 0.4 is reached by it alone, of four it is not.
    logits = torch.zeros(1, 4)
    both = SamplingParams(top_k=2, top_p=0.4)
    alone = SamplingParams(top_p=0.4)
    assert {sample(logits, [row_for(both, seed=s)])[0] for s in range(40)} == {0}
    assert {sample(logits, [row_for(alone, seed=s)])[0] for s in range(40)} == {0, 1}


def test_top_p_stops_at_the_token_that_reaches_it():
    logits = torch.zeros(1, 4)
    for top_p, kept in ((0.25, {0}), (0.26, {0, 1}), (0.5, {0, 1}), (0.75, {0, 1, 2}), (0.76, {0, 1, 2, 3})):
        assert {sample(logits, [row_for(SamplingParams(top_p=top_p), seed=s)])[0] for s in range(60)} == kept


def test_the_lowest_temperature_that_is_not_greedy_neither_overflows_nor_strays():
    logits = torch.tensor([[50.0, 49.9, -50.0, -3e38]])
    for seed in range(20):
        assert sample(logits, [row_for(SamplingParams(temperature=1e-5), seed=seed)]) == [0]


@pytest.mark.parametrize("step", [0.0, 0.25])
@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_p": 0.9, "temperature": 2},
        {"top_p": 0.999, "min_p": 1e-3},
        {"top_k": 3000},
    ],
)
def test_a_bounded_ranking_draws_what_a_full_sort_draws(options, step, monkeypatch):
    vocab, rows = 30_000, [row_for(SamplingParams(**options), seed=seed) for seed in range(6)]
    logits = torch.cat([logits_of(s, 1, vocab, step=step, scale=1 + s) for s in range(6)]).float()
    widths: list[int] = []
    rank = truncation.rank
    monkeypatch.setattr(truncation, "rank", lambda x, width: widths.append(width) or rank(x, width))
    bounded = sample(logits, rows)
    assert min(widths) < vocab
    monkeypatch.setattr(truncation, "_widths", lambda vocab_size, truncation: [vocab_size])
    widths.clear()
    assert sample(logits, rows) == bounded
    assert set(widths) == {vocab}


def test_one_flat_row_alone_pays_for_a_full_sort(monkeypatch):
    vocab = 30_000
    logits = torch.zeros(3, vocab)
    logits[1:, :5] = 30.0
    sorted_rows: list[tuple[int, int]] = []
    rank = truncation.rank
    monkeypatch.setattr(truncation, "rank", lambda x, width: sorted_rows.append((len(x), width)) or rank(x, width))
    sample(logits, [row_for(SamplingParams(top_p=0.9), request_id=str(i)) for i in range(3)])
    assert sorted_rows == [(3, 1024), (1, 8192), (1, vocab)]


# Bans, biases, penalties ---------------------------------------------------------------------------------------------


def test_only_allowed_tokens_are_drawn():
    assert greedy_with([9.0, 1.0, 2.0, 3.0], allowed_token_ids=[1, 2]) == 2


def test_logit_bias_moves_the_choice_but_does_not_undo_a_ban():
    assert greedy_with([9.0, 1.0, 2.0], logit_bias={1: 10.0}) == 1
    assert greedy_with([9.0, 1.0, 2.0], logit_bias={1: 100.0}, allowed_token_ids=[0, 2]) == 0
    assert greedy_with([9.0, 1.0, 2.0], logit_bias={1: 100.0}, bad_words_token_ids=[[1]]) == 0


def test_stop_tokens_are_not_drawn_before_min_tokens():
    options = {"stop": [0, 999], "min_tokens": 2}
    assert greedy_with([9.0, 1.0, 2.0], output=[2], **options) == 2
    assert greedy_with([9.0, 1.0, 2.0], output=[2, 2], **options) == 0
    assert greedy_with([9.0, 1.0, 2.0], output=[2, 2], logit_bias={1: 1.0}, **options) == 0


def test_the_last_token_of_a_bad_word_is_banned_after_the_others():
    words = [[1, 2, 0], [2]]
    assert greedy_with([9.0, 1.0, 8.0], output=[1, 2], bad_words_token_ids=words) == 1
    assert greedy_with([9.0, 1.0, 8.0], output=[2, 1], bad_words_token_ids=words) == 0
    # The prompt does not count, as in vLLM.
    assert greedy_with([9.0, 1.0, 8.0], prompt=[1, 2], bad_words_token_ids=words) == 0


def test_penalties_follow_their_formulas():
    captured: list[torch.Tensor] = []

    class Spy:
        def applies_to(self, row):
            return True

        def __call__(self, logits_RV, rows):
            captured.append(logits_RV)

    params = SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0)
    row = row_for(params, prompt_token_ids=[0, 1, 1], output_token_ids=[2, 2, 2, 3])
    logits = torch.tensor([[4.0, -4.0, 4.0, -4.0, 4.0]], dtype=torch.float64)
    assert sample(logits, [row], logits_processors=[Spy()]) == [4]
    # The spy kept the working copy, which now holds the penalised logits.
    assert captured[0].tolist() == [[2.0, -8.0, 2.0 - 0.5 - 0.75, -8.0 - 0.5 - 0.25, 4.0]]


def test_negative_penalties_and_small_repetition_penalties_favour_what_occurred():
    assert greedy_with([1.0, 1.4, 0.0], output=[0], presence_penalty=-1) == 0
    assert greedy_with([1.0, 1.4, 0.0], output=[0, 0], frequency_penalty=-0.3) == 0
    assert greedy_with([1.0, 1.4, 0.0], prompt=[0], repetition_penalty=0.5) == 0


def test_the_prompt_counts_for_repetition_only():
    assert greedy_with([2.0, 1.5], prompt=[0], presence_penalty=2, frequency_penalty=2) == 0
    assert greedy_with([2.0, 1.5], prompt=[0], repetition_penalty=2) == 1


def test_the_most_extreme_repetition_penalty_leaves_finite_logits():
    assert greedy_with([2.0, 1.5, -1.0], prompt=[0, 2], repetition_penalty=1e6) == 1
    assert greedy_with([2.0, 1.5, -1.0], prompt=[0, 2], repetition_penalty=1e-300) == 0


def test_penalties_keep_up_with_a_growing_output():
    sampler, output = Sampler(vocab_size=6, device="cpu"), []
    row = row_for(SamplingParams(temperature=0, frequency_penalty=1.0), output_token_ids=output)
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.0, 0.0, 0.0]])
    while len(output) < 7:
        output += [sampled.token_id for sampled in sampler.sample(logits, [row])]
    assert output == [0, 1, 0, 2, 1, 0, 2]


def test_two_rows_of_one_request_are_penalised_each_at_its_own_length():
    params = SamplingParams(temperature=0, presence_penalty=2.0)
    logits = torch.tensor([[2.0, 1.5, 1.0]] * 3)
    drafts = [[], [0], [0, 1]]
    rows = [row_for(params, output_token_ids=tokens, position=i) for i, tokens in enumerate(drafts)]
    assert sample(logits, rows) == [0, 1, 2]
    assert sample(logits, rows[::-1]) == [2, 1, 0]


# What is remembered between steps ------------------------------------------------------------------------------------


def counts_of(counts: TokenCounts) -> tuple[dict[int, int], set[int]]:
    ids, numbers = counts.token_ids.tolist(), counts.output_counts.tolist()
    found = {token: number for token, number in zip(ids, numbers, strict=True) if number}
    return found, {token for token, there in zip(ids, counts.in_prompt.tolist(), strict=True) if there}


token_lists = st.lists(st.integers(0, 5), max_size=150)


@given(
    steps=st.lists(st.tuples(st.sampled_from(["grow", "rewind", "replace", "prompt"]), token_lists), max_size=12),
    with_prompt=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_counts_equal_a_recount_after_growth_rewinds_and_replacements(steps, with_prompt):
    counts, prompt, output = TokenCounts(with_prompt=with_prompt), [1, 2, 2], []
    for action, tokens in steps:
        if action == "grow":
            output += tokens
        elif action == "rewind":
            del output[len(output) - min(len(tokens), len(output)) :]
        elif action == "replace":
            output = [5 - token for token in tokens]
        else:
            prompt, output = tokens, output[:1]
        counts.sync(prompt, output)
        found, in_prompt = counts_of(counts)
        assert found == {token: output.count(token) for token in set(output)}
        assert in_prompt == (set(prompt) if with_prompt else set())


def test_counts_have_room_for_any_number_of_distinct_tokens():
    counts, output = TokenCounts(with_prompt=True), []
    for token in range(1000):
        output.append(token * 3)
        counts.sync(range(100), output)
    assert counts_of(counts) == (dict.fromkeys(range(0, 3000, 3), 1), set(range(100)))


def test_an_output_rewound_and_regrown_between_steps_is_counted_anew():
    counts = TokenCounts(with_prompt=False)
    counts.sync([1], [3, 3, 3, 4])
    counts.sync([1], [3, 5, 5, 5, 6, 6])
    assert counts_of(counts)[0] == {3: 1, 5: 3, 6: 2}


def test_rejected_drafts_are_taken_back_without_counting_everything_anew(monkeypatch):
    rng, counts, prompt, output = random.Random(), TokenCounts(with_prompt=True), [1, 2], []
    counted = []
    count = counts._count
    monkeypatch.setattr(counts, "_count", lambda token: (counted.append(token), count(token)))
    for _ in range(100):
        drafts = [rng.randrange(50) for _ in range(rng.randint(0, 20))]
        for num_drafts in range(len(drafts) + 1):
            counts.sync(prompt, DraftedTokens(output, drafts[:num_drafts]))
            assert counts_of(counts)[0] == dict(Counter(output + drafts[:num_drafts]))
            # No trace of what was rejected before: entries are those of a fresh count, in the same order.
            fresh = TokenCounts(with_prompt=True)
            fresh.sync(prompt, output + drafts[:num_drafts])
            assert counts.token_ids.tolist() == fresh.token_ids.tolist()
        num_accepted = rng.randint(0, len(drafts))
        output += [*drafts[:num_accepted], rng.randrange(50)]
    assert len(counted) < 100 * 30, "each step costs what its drafts cost, not what the output does"


def test_an_output_that_differs_far_back_is_counted_anew():
    counts, rng = TokenCounts(with_prompt=False), random.Random()
    first, other = ([rng.randrange(5) for _ in range(400)] for _ in range(2))
    counts.sync([1], first)
    counts.sync([1], other)
    assert counts_of(counts)[0] == dict(Counter(other))


@given(output=token_lists, drafts=st.lists(st.integers(0, 5), max_size=8), data=st.data())
@settings(max_examples=200, deadline=None)
def test_drafted_tokens_read_like_the_list_they_stand_for(output, drafts, data):
    plain, drafted = output + drafts, DraftedTokens(output, drafts)
    bounds = st.none() | st.integers(-len(plain) - 2, len(plain) + 2)
    output.append(9)  # the live list grows; what was drafted for it does not
    for step in (None, 1, 2, -1):
        part = slice(data.draw(bounds), data.draw(bounds), step)
        assert drafted[part] == plain[part]
    assert list(drafted) == plain
    assert [drafted[i] for i in range(-len(plain), len(plain))] == plain * 2
    for outside in (len(plain), -len(plain) - 1):
        with pytest.raises(IndexError, match="outside"):
            drafted[outside]


@given(row=sampling_rows(), drafts=st.lists(st.integers(0, VOCAB - 1), max_size=5), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_rows_of_drafts_draw_what_rows_with_those_tokens_in_the_output_draw(row, drafts, seed):
    logits = logits_of(seed, len(drafts) + 1, VOCAB)
    plain = [
        replace(row, position=row.position + count, output_token_ids=[*row.output_token_ids, *drafts[:count]])
        for count in range(len(drafts) + 1)
    ]
    assert sample(logits, rows_with_drafts(row, drafts)) == sample(logits, plain)


def test_a_preempted_request_and_a_reused_id_draw_what_a_fresh_sampler_draws():
    logits = logits_of(8, 1, 50)
    params = SamplingParams(presence_penalty=1.0, repetition_penalty=1.5, logit_bias={3: 1.0})
    other = replace(params, logit_bias={4: 100.0}, repetition_penalty=1.0)
    sampler = Sampler(vocab_size=50, device="cpu")
    histories = [
        (params, [1, 2], [3, 4, 5]),
        (params, [1, 2], [3]),
        (params, [1, 2], [3, 9, 9, 9]),
        (params, [7], [3, 9, 9, 9]),
        (other, [7], [1]),
    ]
    for wanted, prompt, output in histories:
        row = row_for(wanted, prompt_token_ids=prompt, output_token_ids=output)
        assert [t.token_id for t in sampler.sample(logits, [row])] == sample(logits, [row])
    assert sample(logits, [row]) == [4]


def test_forgetting_drops_what_was_remembered():
    sampler = Sampler(vocab_size=50, device="cpu")
    row = row_for(SamplingParams(presence_penalty=1.0))
    sampler.sample(logits_of(1, 2, 50), [row, row_for(GREEDY, request_id="plain")])
    assert sampler.num_remembered_requests == 1
    sampler.forget("plain")
    sampler.forget("r")
    assert sampler.num_remembered_requests == 0


def test_memory_is_bounded_without_forgetting(monkeypatch):
    monkeypatch.setattr(processors, "MAX_REMEMBERED_REQUESTS", 8)
    sampler = Sampler(vocab_size=50, device="cpu")
    params = SamplingParams(temperature=0, presence_penalty=1.0)
    for i in range(30):
        sampler.sample(logits_of(1, 1, 50), [row_for(params, request_id=str(i))])
    assert sampler.num_remembered_requests == 8


# Logits processors, rows without a choice, broken logits -------------------------------------------------------------


@dataclass
class Mask:
    """Leaves some tokens to the requests it knows."""

    allowed: dict[str, list[int]]
    seen: list[list[str]] = field(default_factory=list)

    def applies_to(self, row: SamplingRow) -> bool:
        return row.request_id in self.allowed

    def __call__(self, logits_RV: torch.Tensor, rows) -> None:
        self.seen.append([row.request_id for row in rows])
        for i, row in enumerate(rows):
            if row.request_id in self.allowed:
                kept = logits_RV[i, self.allowed[row.request_id]].clone()
                logits_RV[i] = -torch.inf
                logits_RV[i, self.allowed[row.request_id]] = kept


def test_a_processor_masks_its_rows_and_sees_no_others():
    logits = torch.tensor([[9.0, 1.0, 2.0, 3.0]] * 3)
    mask = Mask({"b": [1, 2]})
    rows = [row_for(GREEDY, request_id=name) for name in "abc"]
    assert sample(logits, rows, logits_processors=[mask]) == [0, 2, 0]
    assert mask.seen == [["b"]]


def test_processors_run_in_order_after_biases_and_before_penalties():
    logits = torch.tensor([[9.0, 1.0, 2.0, 3.0]])
    seen: list[list[float]] = []

    class Probe(Mask):
        def __call__(self, logits_RV, rows):
            seen.append(logits_RV[0].tolist())

    params = SamplingParams(temperature=0, logit_bias={1: 10.0}, bad_words_token_ids=[[0]], presence_penalty=2.0)
    row = row_for(params, output_token_ids=[1])
    chain = [Mask({"r": [1, 3]}), Probe({"r": []})]
    assert sample(logits, [row], logits_processors=chain) == [1]
    assert seen == [[-math.inf, 11.0, -math.inf, 3.0]]


def test_bans_give_way_where_they_would_leave_nothing():
    assert greedy_with([9.0, 1.0, 2.0], allowed_token_ids=[1], bad_words_token_ids=[[1]]) == 1
    assert greedy_with([9.0, 1.0, 2.0], stop=[2], min_tokens=5, allowed_token_ids=[2]) == 2
    assert greedy_with([9.0, 1.0, 2.0], bad_words_token_ids=[[0], [1], [2]], logit_bias={1: 20.0}) == 1
    mask = Mask({"r": [2]})
    row = row_for(SamplingParams(temperature=0, bad_words_token_ids=[[2]]))
    assert sample(torch.tensor([[9.0, 1.0, 2.0]]), [row], logits_processors=[mask]) == [2]


def test_bans_give_way_for_that_row_of_a_batch_only():
    torn = SamplingParams(temperature=0, allowed_token_ids=[1, 2], bad_words_token_ids=[[1], [2]])
    held = SamplingParams(temperature=0, bad_words_token_ids=[[0]])
    logits = torch.tensor([[9.0, 1.0, 2.0], [9.0, 5.0, 2.0], [9.0, 1.0, 2.0], [9.0, 4.0, 2.0]])
    rows = [row_for(params, request_id=str(i)) for i, params in enumerate((GREEDY, held, torn, torn))]
    assert sample(logits, rows) == [0, 1, 2, 1]


def test_a_row_without_any_token_left_is_an_error_that_names_it():
    rows = [row_for(SamplingParams(allowed_token_ids=[1]), request_id="torn"), row_for(GREEDY, request_id="fine")]
    with pytest.raises(NoTokenLeftError, match="torn") as caught:
        sample(torch.zeros(2, 3), rows, logits_processors=[Mask({"torn": [0]})])
    assert caught.value.request_ids == ("torn",)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(min_tokens=1)])
def test_nan_and_infinite_logits_are_an_error_that_names_the_request(bad, params):
    logits = logits_of(1, 3, 50)
    logits[1, 20] = bad
    rows = [row_for(params, request_id=name) for name in ("good", "bad", "also good")]
    with pytest.raises(NonFiniteLogitsError, match="bad") as caught:
        sample(logits, rows)
    assert caught.value.request_ids == ("bad",)
    assert len(sample(logits[[0, 2]], [rows[0], rows[2]])) == 2


def test_minus_infinity_in_the_models_logits_is_just_never_drawn():
    logits = torch.full((1, 3000), -math.inf)
    logits[0, [7, 2000]] = 0.0
    for options in ({}, {"top_k": 50}, {"top_p": 0.99}, {"min_p": 0.5}):
        tokens = {sample(logits, [row_for(SamplingParams(**options), seed=s)])[0] for s in range(30)}
        assert tokens == {7, 2000}


def test_a_token_id_beyond_the_vocabulary_never_reaches_another_row():
    rows = [row_for(SamplingParams(temperature=0, logit_bias={12: 50.0})), row_for(GREEDY, request_id="next")]
    with pytest.raises(InvalidRequestError, match="12"):
        sample(torch.zeros(2, 10), rows)


def test_other_float_types_and_views_are_accepted():
    wide = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(1))
    view = wide[:, 1]
    params = SamplingParams(top_k=5, presence_penalty=0.5)
    rows = [row_for(params, request_id=str(i), output_token_ids=[1]) for i in range(3)]
    assert sample(view, rows) == sample(view.contiguous(), rows)
    half = view.to(torch.bfloat16)
    assert sample(half, rows) == sample(half.float(), rows)


def test_an_empty_batch_draws_nothing():
    assert sample(torch.empty(0, 40), []) == []


def test_sampled_tokens_are_plain_integers():
    (sampled,) = Sampler(vocab_size=40, device="cpu").sample(logits_of(1, 1, 40), [row_for(SamplingParams())])
    assert type(sampled.token_id) is int
    assert sampled == SampledToken(token_id=sampled.token_id, logprobs=None)


@pytest.mark.gpu
def test_a_gpu_draws_the_tokens_that_a_cpu_draws():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rows, logits = mixed_rows(20_000), logits_of(12, len(MIXED), 20_000)
    here = Sampler(vocab_size=20_000, device="cpu").sample(logits, rows)
    there = Sampler(vocab_size=20_000, device="cuda").sample(logits.cuda(), rows)
    assert [t.token_id for t in there] == [t.token_id for t in here]
