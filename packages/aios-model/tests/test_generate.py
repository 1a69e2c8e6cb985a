"""The loop answers as transformers does, token by token, and honours what was asked of it."""

from __future__ import annotations

import bundled_oracle
import pytest
import torch

from aios_model.errors import InvalidRequestError
from aios_model.generate import generate_text, generate_tokens
from aios_model.model import load_model
from aios_model.sampling.params import SamplingParams


@pytest.fixture(scope="module")
def bundled():
    # One thread: the prompts are short, and threads that spin beside other work on shared cores take ten times as long.
    torch.set_num_threads(1)
    return load_model(device="cpu")


def greedy(**options) -> SamplingParams:
    return SamplingParams(temperature=0.0, **options)


def tokens_of(model, prompt_token_ids, params, **options) -> list[int]:
    return [token.token_id for token in generate_tokens(model, prompt_token_ids, params, **options)]


@pytest.mark.slow
def test_the_stored_greedy_tokens_are_what_transformers_says():
    model = bundled_oracle.transformers_model()
    cases = bundled_oracle.greedy_cases()
    assert len(cases) == 20
    for case in cases:
        prompt, answer = case["prompt_token_ids"], case["token_ids"]
        assert len(answer) == bundled_oracle.NUM_TOKENS
        assert bundled_oracle.smallest_margin(model, prompt, answer) > bundled_oracle.MARGIN / 2, case["prompt"]


@pytest.mark.slow
@pytest.mark.parametrize("case", bundled_oracle.greedy_cases(), ids=lambda case: case["prompt"][:20])
def test_greedy_tokens_equal_those_of_transformers(case, bundled):
    assert bundled.tokenizer.encode(case["prompt"]) == case["prompt_token_ids"]
    params = greedy(max_tokens=bundled_oracle.NUM_TOKENS, ignore_eos=True)
    assert tokens_of(bundled, case["prompt_token_ids"], params) == case["token_ids"]


def test_a_chunked_prompt_gives_the_same_tokens(bundled):
    case = bundled_oracle.greedy_cases()[0]
    params = greedy(max_tokens=8, ignore_eos=True)
    assert tokens_of(bundled, case["prompt_token_ids"], params, prefill_chunk=3) == case["token_ids"][:8]


def test_text_is_the_decoded_tokens_and_ends_with_a_reason(bundled):
    pieces = list(generate_text(bundled, "The capital of France is", greedy(max_tokens=6)))
    token_ids = [piece.token.token_id for piece in pieces]
    assert "".join(piece.text for piece in pieces) == bundled.tokenizer.decode(token_ids)
    assert [piece.finish_reason for piece in pieces] == [None] * 5 + ["length"]
    assert "Paris" in "".join(piece.text for piece in pieces)


def test_a_stop_string_ends_the_text_before_it(bundled):
    whole = "".join(piece.text for piece in generate_text(bundled, "1, 2, 3, 4,", greedy(max_tokens=24)))
    stop = whole[9:12]
    pieces = list(generate_text(bundled, "1, 2, 3, 4,", greedy(max_tokens=24, stop=(stop,))))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish_reason == "stop"


def test_a_stop_token_ends_the_answer(bundled):
    case = bundled_oracle.greedy_cases()[0]
    stop_at = case["token_ids"][4]
    tokens = tokens_of(bundled, case["prompt_token_ids"], greedy(max_tokens=20, stop_token_ids=(stop_at,)))
    assert tokens == case["token_ids"][: case["token_ids"].index(stop_at) + 1]


def test_a_seed_repeats_and_another_differs(bundled):
    prompt = bundled.tokenizer.encode("Once upon a time")
    draws = [
        tokens_of(bundled, prompt, SamplingParams(temperature=1.0, seed=seed, max_tokens=12)) for seed in (5, 5, 6)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_logprobs_come_with_the_tokens(bundled):
    prompt = bundled.tokenizer.encode("Water boils at")
    [token] = generate_tokens(bundled, prompt, greedy(max_tokens=1, logprobs=3))
    assert token.logprobs is not None
    assert token.logprobs.rank == 1
    assert token.logprobs.top[0] == (token.token_id, token.logprobs.logprob)
    assert len(token.logprobs.top) == 3


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "empty"),
        ([1] * 8192, {}, "8192 tokens, the context holds 8192"),
        ([1] * 8000, {"max_tokens": 193}, "8000 prompt tokens"),
        ([49152], {}, "49152 is outside the vocabulary"),
        ([-1], {}, "-1 is outside"),
        ([1], {"n": 2}, "n = 2"),
        ([1], {"logit_bias": {49152: 1.0}}, "49152"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(prompt, options, message, bundled):
    with pytest.raises(InvalidRequestError, match=message):
        next(generate_tokens(bundled, prompt, greedy(**options)))
