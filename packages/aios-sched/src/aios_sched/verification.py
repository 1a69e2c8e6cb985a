"""Drafts against what the model draws: they hold up to the first that differs.

Every row is drawn from with the noise of its own position, and a draft is right if it is the very token that was drawn
in its place. So what a request gets is what it would have got one step at a time, for any way of sampling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aios_model.sampling.errors import SamplingError
from aios_sched.output import StepResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from aios_model.sampling.device_sampler import DeviceSampler
    from aios_model.sampling.rows import SampledToken
    from aios_model.sampling.sampler import Sampler
    from aios_sched.batch import PackedBatch
    from aios_sched.output import SchedulerOutput


def draw(
    sampler: Sampler | DeviceSampler, logits_SV: torch.Tensor, batch: PackedBatch, output: SchedulerOutput
) -> StepResult:
    """Draws the step's tokens.

    Args:
        sampler: Draws.
        logits_SV: [S, V], of the rows of `batch`.
        batch: The step, packed.
        output: The same step.

    Raises:
        SamplingError: some rows behind known tokens have no token to draw; names their requests.
    """
    if not batch.has_drafts:
        tokens = sampler.sample(logits_SV, batch.sampling)
        return StepResult(sampled={row.request_id: token for row, token in zip(batch.sampling, tokens, strict=True)})
    return accept(output, _draw_or_drop_drafts(sampler, logits_SV, batch, output))


def accept(output: SchedulerOutput, tokens: Sequence[SampledToken | None]) -> StepResult:
    """What each request gains: the token behind its known ones, and one more for each draft that was right.

    Args:
        output: The step.
        tokens: What was drawn, in the order of `PackedBatch.sampling`; None for a row that is not to be believed.
    """
    result = StepResult(sampled={})
    place = 0
    for row in output.requests:
        if row.sampling is None:
            continue
        first = tokens[place]
        assert first is not None, "the row behind known tokens is always drawn"
        result.sampled[row.request_id] = first
        if row.num_drafts:
            drafts = row.token_ids[row.num_known_tokens :]
            further = _behind_right_drafts(drafts, tokens[place : place + 1 + row.num_drafts])
            if further:
                result.further[row.request_id] = further
        place += 1 + row.num_drafts
    assert place == len(tokens)
    return result


def _behind_right_drafts(drafts: Sequence[int], tokens: Sequence[SampledToken | None]) -> list[SampledToken]:
    """The tokens drawn behind drafts, up to the first draft that is not what was drawn in its place."""
    found: list[SampledToken] = []
    for draft, before, behind in zip(drafts, tokens[:-1], tokens[1:], strict=True):
        if before is None or behind is None or before.token_id != draft:
            break
        found.append(behind)
    return found


def _draw_or_drop_drafts(
    sampler: Sampler | DeviceSampler, logits_SV: torch.Tensor, batch: PackedBatch, output: SchedulerOutput
) -> list[SampledToken | None]:
    """One token per row; None behind the drafts of requests for which some row could not be drawn from.

    Behind a wrong draft anything may be: a grammar that it breaks leaves no token. That must not fail a request which
    would never have come there, so it is drawn for again without drafts. If that fails, too, the error is its own.
    """
    dropped: set[str] = set()
    known = _rows_behind_known_tokens(output)
    while True:
        kept = [place for place, row in enumerate(batch.sampling) if place in known or row.request_id not in dropped]
        is_whole = len(kept) == len(batch.sampling)
        try:
            drawn = sampler.sample(
                logits_SV if is_whole else logits_SV[kept], [batch.sampling[place] for place in kept]
            )
        except SamplingError as error:
            blamed = {row.request_id for row in output.requests if row.num_drafts}.intersection(error.request_ids)
            if blamed <= dropped:
                raise
            dropped |= blamed
            continue
        tokens: list[SampledToken | None] = [None] * len(batch.sampling)
        for place, token in zip(kept, drawn, strict=True):
            tokens[place] = token
        return tokens


def _rows_behind_known_tokens(output: SchedulerOutput) -> set[int]:
    """Places, among the rows that sample, of those that no draft stands before."""
    places, place = set(), 0
    for row in output.requests:
        if row.sampling is not None:
            places.add(place)
            place += 1 + row.num_drafts
    return places
