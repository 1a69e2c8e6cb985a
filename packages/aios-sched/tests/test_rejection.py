"""Rejection sampling has the target's distribution: chi-square tests over many seeds, which find planted biases."""

from __future__ import annotations

import pytest
import torch

from aios_model.sampling.params import SamplingParams
from aios_model.sampling.rows import SamplingRow
from aios_model.sampling.sampler import Sampler
from aios_sched.speculative import rejection
from aios_sched.speculative.rejection import TargetDistribution, accept_or_replace, uniforms

VOCAB_SIZE, NUM_SEEDS = 7, 1500
OUTPUT = [1, 1, 4, 2]
OPTIONS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "top_k and top_p": {"temperature": 1.4, "top_k": 5, "top_p": 0.8},
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
    "bias": {"logit_bias": {3: 1.5, 0: -2.0}, "allowed_token_ids": [0, 1, 3, 5, 6]},
}


def logits(seed, num_rows=1):
    return 1.5 * torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def row(params, seed=0, drafts=()):
    return SamplingRow(
        request_id="r",
        params=params,
        seed=seed,
        position=10 + len(drafts),
        prompt_token_ids=[5, 6, 2, 0, 1, 3],
        output_token_ids=[*OUTPUT, *drafts],
    )


def chi_square_p_value(counts, probabilities):
    """How likely counts are to be that far from what is expected; tokens that cannot come must not have come."""
    expected = probabilities * counts.sum()
    possible = expected > 0
    assert counts[~possible].sum() == 0, "a token that has no probability"
    rare = possible & (expected < 5)
    observed, expected = [
        torch.cat([each[possible & ~rare], each[rare].sum()[None]]) if rare.any() else each[possible]
        for each in (counts, expected)
    ]
    if len(expected) == 1:
        return 1.0
    statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    degrees = torch.tensor(len(expected) - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))


def draw_drafts(draft_KV, seed):
    generator = torch.Generator().manual_seed(10_000 + seed)
    return [int(torch.multinomial(draft_V, 1, generator=generator)) for draft_V in draft_KV]


def counted_pairs(params, *, method):
    """How often each pair of first tokens came, and how likely each is, with one or two drafts per seed.

    The target's second distribution depends on the first token, as a model's does.
    """
    distribution = TargetDistribution(vocab_size=VOCAB_SIZE)
    first_V = distribution.probabilities(logits(1), [row(params)])[0]
    second_VV = torch.stack(
        [
            distribution.probabilities(logits(100 + token), [row(params, drafts=[token])])[0]
            for token in range(VOCAB_SIZE)
        ]
    )
    third_V = torch.full((VOCAB_SIZE,), 1.0 / VOCAB_SIZE, dtype=torch.float64)
    draft_KV = logits(7, num_rows=2).softmax(dim=-1)
    counts = torch.zeros(VOCAB_SIZE, VOCAB_SIZE, dtype=torch.float64)
    for seed in range(NUM_SEEDS):
        if method == "drawn":
            drafts, proposed = draw_drafts(draft_KV, seed), draft_KV
        else:
            drafts, proposed = [seed % 3, 3 * seed // 7 % VOCAB_SIZE], None
        target_KV = torch.stack([first_V, second_VV[drafts[0]], third_V])
        kept = accept_or_replace(target_KV, proposed, drafts, uniforms(row(params, seed), 2))
        if len(kept) == 1:  # the next step, which draws without a draft
            kept += accept_or_replace(second_VV[kept[0]][None], None, [], uniforms(row(params, seed, kept), 0))
        counts[kept[0], kept[1]] += 1
    return counts, first_V[:, None] * second_VV


@pytest.mark.parametrize("method", ["drawn", "chosen"])
@pytest.mark.parametrize("option", OPTIONS)
def test_tokens_have_the_distribution_of_the_target(option, method):
    counts, probabilities = counted_pairs(SamplingParams(**OPTIONS[option]), method=method)
    assert chi_square_p_value(counts.sum(dim=1), probabilities.sum(dim=1)) > 1e-3
    assert chi_square_p_value(counts.flatten(), probabilities.flatten()) > 1e-3


@pytest.mark.parametrize("option", OPTIONS)
def test_probabilities_are_those_that_the_sampler_draws_with(option):
    params = SamplingParams(**OPTIONS[option])
    sampler = Sampler(vocab_size=VOCAB_SIZE, device="cpu")
    rows = [row(params, seed) for seed in range(NUM_SEEDS)]
    tokens = sampler.sample(logits(1).expand(NUM_SEEDS, -1).contiguous(), rows)
    counts = torch.bincount(torch.tensor([token.token_id for token in tokens]), minlength=VOCAB_SIZE).double()
    probabilities = TargetDistribution(vocab_size=VOCAB_SIZE).probabilities(logits(1), rows[:1])[0]
    assert chi_square_p_value(counts, probabilities) > 1e-3


def keep_all(target_V, draft_V, token_id):
    return torch.nn.functional.one_hot(torch.tensor(token_id), VOCAB_SIZE).double()


def draw_from_the_target(target_V, draft_V, token_id):
    return target_V


@pytest.mark.parametrize("bias", [keep_all, draw_from_the_target])
@pytest.mark.parametrize("method", ["drawn", "chosen"])
def test_planted_bias_is_detected(monkeypatch, bias, method):
    monkeypatch.setattr(rejection, "_residual", bias)
    counts, probabilities = counted_pairs(SamplingParams(), method=method)
    assert chi_square_p_value(counts.sum(dim=1), probabilities.sum(dim=1)) < 1e-6


def test_equal_distributions_keep_every_draft():
    target_KV = logits(3, num_rows=4).softmax(dim=-1)
    for seed in range(50):
        drafts = draw_drafts(target_KV[:3], seed)
        kept = accept_or_replace(target_KV, target_KV[:3], drafts, uniforms(row(SamplingParams(), seed), 3))
        assert kept[:3] == drafts
        assert len(kept) == 4


def test_bans_give_way_where_nothing_is_left_as_in_the_sampler():
    params = SamplingParams(allowed_token_ids=[2], bad_words_token_ids=[[2]])
    assert TargetDistribution(vocab_size=VOCAB_SIZE).probabilities(logits(1), [row(params)])[0].argmax() == 2


def test_shapes_that_do_not_belong_together_are_refused():
    target_KV = logits(3, num_rows=2).softmax(dim=-1)
    with pytest.raises(ValueError, match="2 drafts need 3 rows"):
        accept_or_replace(target_KV, None, [1, 2], [0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="probabilities"):
        accept_or_replace(target_KV, target_KV, [1], [0.5, 0.5])
