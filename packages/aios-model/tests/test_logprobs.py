from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aios_model.sampling.errors import NonFiniteLogitsError
from aios_model.sampling.logprobs import token_logprobs
from aios_model.sampling.params import SamplingParams
from aios_model.sampling.ranking import rank, top_token
from aios_model.sampling.sampler import Sampler, SamplingRow


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors gain nothing from a second thread, and on a busy machine they wait for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits_of(seed: int, rows: int, vocab: int, *, step: float = 0.0) -> torch.Tensor:
    """Normal logits; rounded to multiples of `step` to make ties."""
    x = torch.randn(rows, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    return (x / step).round() * step if step else x


def expected_order(row: list[float]) -> list[int]:
    return sorted(range(len(row)), key=lambda token: (-row[token], token))


def expected_logprobs(row: list[float]) -> list[float]:
    largest = max(row)
    log_sum = largest + math.log(math.fsum(math.exp(x - largest) for x in row))
    return [x - log_sum for x in row]


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 4),
    vocab=st.integers(1, 120),
    step=st.sampled_from([0.0, 0.5, 2.0, 100.0]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_logprobs_ranks_and_tops_equal_a_plain_sort(seed, rows, vocab, step, data):
    logits = logits_of(seed, rows, vocab, step=step)
    tokens = data.draw(st.lists(st.integers(0, vocab - 1), min_size=rows, max_size=rows))
    num_top = data.draw(st.lists(st.integers(0, 20), min_size=rows, max_size=rows))
    for row, token, k, got in zip(
        logits.tolist(), tokens, num_top, token_logprobs(logits, tokens, num_top), strict=True
    ):
        order, logprobs = expected_order(row), expected_logprobs(row)
        assert got.token_id == token
        assert got.logprob == pytest.approx(logprobs[token], abs=1e-12)
        assert got.rank == order.index(token) + 1
        assert [t for t, _ in got.top] == order[:k]
        assert [p for _, p in got.top] == pytest.approx([logprobs[t] for t in order[:k]], abs=1e-12)


def test_float32_logprobs_of_a_large_vocabulary_are_accurate():
    logits = logits_of(1, 2, 49152)
    for wanted, got in zip(logits.tolist(), token_logprobs(logits.float(), [5, 49151], [3, 0]), strict=True):
        assert got.logprob == pytest.approx(expected_logprobs(wanted)[got.token_id], abs=1e-5)


def test_equal_logits_rank_by_token_id():
    logits = torch.zeros(1, 5000)
    (got,) = token_logprobs(logits, [4321], [20])
    assert got.rank == 4322
    assert [token for token, _ in got.top] == list(range(20))
    assert got.logprob == pytest.approx(-math.log(5000), rel=1e-6)


def test_a_rows_logprobs_do_not_depend_on_the_other_rows():
    logits = logits_of(2, 9, 3000, step=0.25).float()
    tokens, num_top = list(range(0, 2700, 300)), [5, 0, 20, 1, 3, 0, 2, 19, 4]
    together = token_logprobs(logits, tokens, num_top)
    for i in range(9):
        assert token_logprobs(logits[i : i + 1], tokens[i : i + 1], num_top[i : i + 1]) == [together[i]]


def row_for(params: SamplingParams, **changes) -> SamplingRow:
    given = {"request_id": "r", "seed": 1, "position": 3, "prompt_token_ids": [1, 2], "output_token_ids": [4]}
    return SamplingRow(params=params, **{**given, **changes})


def test_reported_logprobs_are_the_models_own_before_bans_penalties_and_temperature():
    logits = logits_of(3, 1, 50)
    best = int(logits.argmax())
    params = SamplingParams(
        temperature=0.3, top_k=5, logprobs=3, logit_bias={7: 50}, presence_penalty=1.5, bad_words_token_ids=[[best]]
    )
    sampler = Sampler(vocab_size=50, device="cpu")
    (sampled,) = sampler.sample(logits, [row_for(params)])
    wanted = expected_logprobs(logits[0].tolist())
    assert sampled.token_id == 7
    assert sampled.logprobs is not None
    assert sampled.logprobs.token_id == 7
    assert sampled.logprobs.logprob == pytest.approx(wanted[7])
    assert sampled.logprobs.top[0] == (best, pytest.approx(wanted[best]))


def test_only_rows_that_ask_get_logprobs():
    logits = logits_of(4, 3, 50)
    asks = [SamplingParams(temperature=0, logprobs=k) for k in (None, 0, 2)]
    sampler = Sampler(vocab_size=50, device="cpu")
    none, zero, two = sampler.sample(logits, [row_for(p, request_id=str(i)) for i, p in enumerate(asks)])
    assert none.logprobs is None
    assert zero.logprobs is not None
    assert zero.logprobs.top == ()
    assert two.logprobs is not None
    assert len(two.logprobs.top) == 2
    assert two.logprobs.rank == 1


def test_a_nan_that_a_ban_hides_from_the_draw_still_fails_logprobs():
    logits = logits_of(5, 1, 50)
    logits[0, 9] = math.nan
    sampler = Sampler(vocab_size=50, device="cpu")
    banned = {"temperature": 0, "bad_words_token_ids": [[9]]}
    assert sampler.sample(logits, [row_for(SamplingParams(**banned))])[0].token_id != 9
    with pytest.raises(NonFiniteLogitsError):
        sampler.sample(logits, [row_for(SamplingParams(**banned, logprobs=1), request_id="asks")])


@given(
    seed=st.integers(0, 2**32), vocab=st.integers(2, 400), width=st.integers(1, 420), step=st.sampled_from([0, 0.5, 3])
)
@settings(max_examples=80, deadline=None)
def test_a_ranking_is_the_stable_sort_as_far_as_it_is_certain(seed, vocab, width, step):
    logits = logits_of(seed, 3, vocab, step=step)
    ranking = rank(logits, width)
    for row, values, token_ids, certain in zip(
        logits.tolist(), ranking.values.tolist(), ranking.token_ids.tolist(), ranking.num_certain.tolist(), strict=True
    ):
        order = expected_order(row)
        assert values == [row[token] for token in order[:width]]
        assert token_ids[:certain] == order[:certain]
        assert certain == vocab if width >= vocab else values[certain:] == [values[-1]] * (width - certain)
        assert certain > 0 or values[0] == values[-1]


def test_the_top_token_is_the_lowest_of_equals_and_a_nan_shows():
    logits = torch.tensor([[1.0, 3.0, 3.0], [math.nan, 1.0, 2.0], [-math.inf] * 3, [1.0, math.nan, math.inf]])
    token_ids, values = top_token(logits)
    assert token_ids.tolist()[0] == 1
    assert values.isnan().tolist() == [False, True, False, True]
    assert values[2] == -math.inf
