"""Drafts from the request's own text: what a plain search finds, without searching the text again in each step."""

from __future__ import annotations

import random
import time

import pytest

from aios_model.sampling.params import SamplingParams
from aios_model.sampling.rows import SamplingRow
from aios_sched.speculative.base import DraftContext
from aios_sched.speculative.ngram import NgramProposer


def context(token_ids, *, request_id="r", max_drafts=4):
    sampling = SamplingRow(
        request_id=request_id,
        params=SamplingParams(),
        seed=0,
        position=len(token_ids),
        prompt_token_ids=token_ids,
        output_token_ids=[],
    )
    return DraftContext(
        request_id=request_id, token_ids=token_ids, num_prompt_tokens=1, max_drafts=max_drafts, sampling=sampling
    )


def searched(token_ids, *, low, high, num_drafts):
    """The plain way: the longest suffix that occurred before, its latest occurrence, what followed, over and over."""
    for size in range(min(high, len(token_ids) - 1), low - 1, -1):
        suffix = token_ids[-size:]
        for end in range(len(token_ids) - 1, size - 1, -1):
            if token_ids[end - size : end] == suffix:
                text = list(token_ids)
                while len(text) < len(token_ids) + num_drafts:
                    text.append(text[end + len(text) - len(token_ids)])
                return text[len(token_ids) :]
    return []


def test_drafts_are_those_of_a_plain_search():
    rng = random.Random()
    for _ in range(60):
        low = rng.randint(1, 3)
        high = low + rng.randint(0, 3)
        proposer = NgramProposer(min_ngram=low, max_ngram=high)
        tokens = {name: [rng.randrange(4) for _ in range(rng.randint(1, 20))] for name in "abc"}
        for _ in range(40):
            asked = rng.sample("abc", rng.randint(1, 3))
            num_drafts = rng.randint(1, 6)
            drafts = proposer.propose([context(tokens[n], request_id=n, max_drafts=num_drafts) for n in asked])
            for name, found in zip(asked, drafts, strict=True):
                assert found == searched(tokens[name], low=low, high=high, num_drafts=num_drafts), tokens[name]
            for name in "abc":
                tokens[name] += [rng.randrange(4) for _ in range(rng.randint(0, 3))]


def test_the_longest_match_wins_and_then_the_latest():
    proposer = NgramProposer(min_ngram=1, max_ngram=3)
    assert proposer.propose([context([1, 2, 3, 40, 3, 50, 2, 3, 60, 1, 2, 3])]) == [[40, 3, 50, 2]]
    proposer.forget("r")
    assert proposer.propose([context([3, 40, 9, 3, 50, 9, 3], max_drafts=2)]) == [[50, 9]]


def test_a_text_that_repeats_itself_goes_on_so():
    proposer = NgramProposer(min_ngram=2, max_ngram=4)
    assert proposer.propose([context([5, 7, 8, 9, 7, 8, 9, 7, 8], max_drafts=7)]) == [[9, 7, 8, 9, 7, 8, 9]]
    assert proposer.propose([context([6] * 9, request_id="other", max_drafts=3)]) == [[6, 6, 6]]


@pytest.mark.parametrize("tokens", [[1], [1, 2], [1, 2, 3, 4, 5], [1, 9, 2, 9]])
def test_nothing_is_drafted_where_nothing_repeats(tokens):
    assert NgramProposer(min_ngram=2, max_ngram=4).propose([context(tokens)]) == [[]]


def test_what_is_forgotten_is_gone():
    proposer = NgramProposer(min_ngram=2, max_ngram=2)
    proposer.propose([context([1, 2, 3, 1, 2], request_id="a"), context([4, 5], request_id="b")])
    assert proposer.num_indexed_requests == 2
    proposer.forget("a")
    proposer.forget("nobody")
    assert proposer.num_indexed_requests == 1
    assert proposer.propose([context([9, 1, 2], request_id="a")]) == [[]]
    proposer.close()
    assert proposer.num_indexed_requests == 0


def test_a_step_costs_the_same_whatever_the_length_of_the_text():
    proposer, tokens = NgramProposer(min_ngram=2, max_ngram=4), [random.randrange(1000) for _ in range(50_000)]
    proposer.propose([context(tokens)])
    started = time.perf_counter()
    for _ in range(200):
        tokens.append(random.randrange(1000))
        proposer.propose([context(tokens)])
    # 2 µs here; one look at the whole text would take a hundred times as long.
    assert (time.perf_counter() - started) / 200 < 2e-4
