"""Drafts against what is drawn, and what happens where nothing can be drawn behind a wrong one."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from aios_model.sampling.errors import NoTokenLeftError
from aios_model.sampling.params import SamplingParams
from aios_model.sampling.rows import SampledToken, SamplingRow
from aios_model.sampling.sampler import Sampler
from aios_sched.batch import pack
from aios_sched.output import ScheduledRequest, SchedulerOutput
from aios_sched.verification import accept, draw

VOCAB = 30


def row(request_id, *, known, drafts=(), samples=True, **params):
    """A request of which `known` are computed now; everything before them is its output."""
    sampling = SamplingRow(
        request_id=request_id,
        params=SamplingParams(**{"temperature": 0, **params}),
        seed=7,
        position=10 + len(known),
        prompt_token_ids=[1],
        output_token_ids=list(known),
    )
    return ScheduledRequest(
        request_id=request_id,
        token_ids=[*known, *drafts],
        start=10,
        block_table=[1, 2],
        sampling=sampling if samples else None,
        num_drafts=len(drafts),
    )


def step(*rows):
    return SchedulerOutput(
        step_id=0,
        requests=rows,
        block_copies=(),
        num_scheduled_tokens=sum(len(each.token_ids) for each in rows),
        finished_request_ids=(),
    )


def run(output, logits_SV, **options):
    sampler = Sampler(vocab_size=VOCAB, device="cpu", **options)
    return draw(sampler, logits_SV, pack(output, device=torch.device("cpu")), output)


def ids(result):
    return {
        name: [first.token_id, *(token.token_id for token in result.further.get(name, ()))]
        for name, first in result.sampled.items()
    }


def choosing(*token_ids):
    """Logits under which these tokens are the likeliest, one per row."""
    return torch.nn.functional.one_hot(torch.tensor(token_ids), VOCAB).double() * 9


def test_a_row_with_drafts_is_drawn_from_at_every_one_of_them():
    output = step(
        row("a", known=[3], drafts=[4, 5]), row("b", known=[6, 7], samples=False), row("c", known=[1, 2], drafts=[9])
    )
    batch = pack(output, device=torch.device("cpu"))
    assert batch.tokens_T.tolist() == [3, 4, 5, 6, 7, 1, 2, 9]
    assert batch.positions_T.tolist() == [10, 11, 12, 10, 11, 10, 11, 12]
    assert batch.sample_rows_S.tolist() == [0, 1, 2, 6, 7]
    assert [(each.request_id, each.position) for each in batch.sampling] == [
        ("a", 11),
        ("a", 12),
        ("a", 13),
        ("c", 12),
        ("c", 13),
    ]
    assert [list(each.output_token_ids) for each in batch.sampling] == [[3], [3, 4], [3, 4, 5], [1, 2], [1, 2, 9]]


@pytest.mark.parametrize(
    ("drawn", "gained"),
    [([4, 5, 6], [4, 5, 6]), ([4, 8, 6], [4, 8]), ([8, 5, 6], [8]), ([8, 8, 8], [8]), ([4, 5, 5], [4, 5, 5])],
)
def test_drafts_hold_up_to_the_first_that_is_not_what_was_drawn(drawn, gained):
    output = step(row("a", known=[3], drafts=[4, 5]), row("b", known=[1]))
    assert ids(run(output, choosing(*drawn, 2))) == {"a": gained, "b": [2]}


def test_what_is_gained_is_what_single_steps_give():
    """With sampling and penalties, over random logits that depend on the position only."""
    rng = random.Random()
    for _ in range(30):
        logits_PV = torch.randn(
            9, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(rng.getrandbits(30))
        )
        params = {
            "temperature": rng.choice([0, 0.8]),
            "presence_penalty": rng.choice([0.0, 1.0]),
            "repetition_penalty": rng.choice([1.0, 1.5]),
            "bad_words_token_ids": [[rng.randrange(VOCAB)]],
            "min_tokens": rng.choice([0, 4]),
        }
        output, sampler = [3], Sampler(vocab_size=VOCAB, device="cpu")
        for place in range(8):
            single = row("a", known=output, **params)
            single.sampling.position = 10 + place
            output.append(sampler.sample(logits_PV[place : place + 1], [single.sampling])[0].token_id)
        drafts = [token if rng.random() < 0.7 else rng.randrange(VOCAB) for token in output[1:8]]
        together = row("a", known=[3], drafts=drafts, **params)
        together.sampling.position = 10
        gained = ids(run(step(together), logits_PV[:8]))["a"]
        num_right = next((place for place, draft in enumerate(drafts) if draft != output[1 + place]), len(drafts))
        assert gained == output[1 : num_right + 2]


class Grammar:
    """After 5 nothing may come; 6 breaks it."""

    def applies_to(self, row):
        return True

    def __call__(self, logits_RV, rows):
        for logits_V, each in zip(logits_RV, rows, strict=True):
            logits_V[6] = -torch.inf
            if 5 in each.output_token_ids:
                logits_V[:] = -torch.inf


def test_a_dead_end_behind_a_wrong_draft_is_nobodys_error():
    output = step(row("a", known=[3], drafts=[5, 8]), row("b", known=[2], drafts=[9]))
    assert ids(run(output, choosing(4, 4, 4, 9, 7), logits_processors=[Grammar()])) == {"a": [4], "b": [9, 7]}


def test_a_dead_end_behind_what_is_known_is_an_error_of_that_request():
    output = step(row("a", known=[5], drafts=[1]), row("b", known=[2], drafts=[5]))
    with pytest.raises(NoTokenLeftError) as caught:
        run(output, choosing(1, 1, 5, 5), logits_processors=[Grammar()])
    assert caught.value.request_ids == ("a",)


def test_numbers_that_are_not_finite_behind_a_draft_do_not_fail_the_request():
    logits = choosing(4, 4, 9, 7)
    logits[1, 3] = torch.nan
    output = step(row("a", known=[3], drafts=[8]), row("b", known=[2], drafts=[9]))
    assert ids(run(output, logits)) == {"a": [4], "b": [9, 7]}


def test_accept_needs_a_token_for_every_place():
    output = step(row("a", known=[3], drafts=[4]))
    with pytest.raises(AssertionError):
        accept(output, [SampledToken(token_id=4)] * 3)


def test_plain_steps_are_drawn_in_one_call_as_ever():
    calls = []
    sampler = SimpleNamespace(sample=lambda logits, rows: calls.append(len(rows)) or [SampledToken(token_id=1)] * 2)
    output = step(row("a", known=[3]), row("b", known=[1, 2]), row("c", known=[1], samples=False))
    result = draw(sampler, choosing(1, 1), pack(output, device=torch.device("cpu")), output)
    assert (calls, list(result.sampled), result.further) == ([2], ["a", "b"], {})
