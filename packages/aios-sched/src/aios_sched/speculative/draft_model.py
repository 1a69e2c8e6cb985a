"""Drafts from a second, faster model: a smaller one of the same vocabulary, or a copy of the target with fewer bits.

The classical draft model (Leviathan et al. 2023, arXiv 2211.17192), on pages of its own. All requests draft together,
one call of the decoder per place. Drafts are drawn with the seed, position and parameters with which the target will
draw: with the same noise, two models that nearly agree on the probabilities nearly always draw the same token, where
independent draws of theirs often differ (a coupling by Gumbel noise, as in Daliri et al. 2024, arXiv 2408.07978).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from aios_kvcache.paged_cache import SequenceSlice
from aios_model.errors import ConfigError
from aios_model.sampling.drafted_rows import rows_with_drafts
from aios_model.sampling.errors import SamplingError
from aios_model.sampling.params import SamplingParams
from aios_sched.speculative.draft_pages import DraftPages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_kvcache.block_manager import BlockManager
    from aios_model.sampling.rows import SamplingRow
    from aios_model.sampling.sampler import Sampler
    from aios_sched.model_runner import Pages, StepModel
    from aios_sched.speculative.base import DraftContext


class DraftModelProposer:
    """Proposes what a draft model says; see `base.Proposer`.

    A request is caught up on before it gets drafts: what it has gained is computed in the call that drafts its first
    token, a long prompt in chunks over several calls, in which it gets none. Where pages run short, those of the
    request that drafted least recently go, and it catches up again when its turn comes.

    Args:
        model: The draft model.
        pages: Its pages, as many as `block_manager` hands out and of the same size.
        block_manager: Hands them out; nobody else may use it.
        sampler: Draws drafts; with the target's logits processors, if it has any.
        context_length: Longest text that the draft model reads; longer ones get no drafts.
        max_chunk_tokens: Most tokens to catch up on in one call, beyond those that a step leaves.
        is_greedy: Whether drafts are the likeliest tokens, whatever the request asks for. Cheaper to draw, and at a
            temperature less often right.

    Attributes:
        num_computed_tokens: Tokens that went through the draft model.

    Raises:
        ConfigError: A number is not positive.
    """

    def __init__(
        self,
        model: StepModel,
        pages: Pages,
        block_manager: BlockManager,
        sampler: Sampler,
        *,
        context_length: int,
        max_chunk_tokens: int = 256,
        is_greedy: bool = False,
    ) -> None:
        if context_length < 1 or max_chunk_tokens < 1:
            raise ConfigError(
                f"context_length and max_chunk_tokens must be positive, not {context_length} and {max_chunk_tokens}"
            )
        self._model = model
        self._cache = pages
        self._pages = DraftPages(block_manager)
        self._sampler = sampler
        self._context_length = context_length
        self._max_chunk_tokens = max_chunk_tokens
        self._is_greedy = is_greedy
        self._params: dict[str, tuple[SamplingParams, SamplingParams]] = {}
        self.num_computed_tokens = 0

    @torch.inference_mode()
    def propose(self, contexts: Sequence[DraftContext]) -> list[list[int]]:
        """See `base.Proposer`; one call of the model per place, for all requests that still draft."""
        drafts: dict[str, list[int]] = {context.request_id: [] for context in contexts}
        drafting = self._catch_up(contexts, drafts)
        while drafting:
            inputs = [([drafts[context.request_id][-1]], context) for context in drafting]
            starts = [len(context.token_ids) + len(drafts[context.request_id]) - 1 for context in drafting]
            drafting = self._compute(inputs, starts, drafting, drafts)
        return [drafts[context.request_id] for context in contexts]

    def forget(self, request_id: str) -> None:
        """See `base.Proposer`."""
        self._pages.forget(request_id)
        self._sampler.forget(request_id)
        self._params.pop(request_id, None)

    def close(self) -> None:
        """See `base.Proposer`."""
        self._params.clear()
        self._pages.clear()

    def _catch_up(self, contexts: Sequence[DraftContext], drafts: dict[str, list[int]]) -> list[DraftContext]:
        """Computes what the requests have gained, and drafts a first token for those that are then complete."""
        budget = self._max_chunk_tokens
        inputs: list[tuple[list[int], DraftContext]] = []
        starts: list[int] = []
        complete: list[DraftContext] = []
        kept: set[str] = set()  # who comes first takes pages of those who come later
        for context in contexts:
            num_tokens = len(context.token_ids)
            if num_tokens + context.max_drafts > self._context_length:
                continue
            start = self._pages.open(context)
            end = num_tokens
            if num_tokens - start > _STEP_TOKENS:
                end = min(num_tokens, start + budget)
                budget -= end - start
            room = num_tokens + context.max_drafts - 1
            if end == start or not self._pages.reserve(context.request_id, start=start, end=room, kept=kept):
                continue
            kept.add(context.request_id)
            inputs.append((list(context.token_ids[start:end]), context))
            starts.append(start)
            if end == num_tokens:
                complete.append(context)
        return self._compute(inputs, starts, complete, drafts) if inputs else []

    def _compute(
        self,
        inputs: list[tuple[list[int], DraftContext]],
        starts: list[int],
        drafting: list[DraftContext],
        drafts: dict[str, list[int]],
    ) -> list[DraftContext]:
        """One call of the model; draws a token for each of `drafting`, and returns those that want another one.

        Args:
            inputs: Tokens to compute, and whose.
            starts: Their positions.
            drafting: Requests for which a token is drawn behind theirs, in the order of `inputs`.
            drafts: What is drafted so far, extended.
        """
        device = self._model.device
        tokens = [token for token_ids, _ in inputs for token in token_ids]
        positions = [place for (ids, _), start in zip(inputs, starts, strict=True) for place in _range(start, ids)]
        self._cache.copy_blocks(self._pages.take_copies())
        self._cache.bind(
            [
                SequenceSlice(start=start, length=len(ids), block_table=self._pages.block_table(context.request_id))
                for (ids, context), start in zip(inputs, starts, strict=True)
            ]
        )
        hidden_TD = self._model(
            torch.tensor(tokens, dtype=torch.int64, device=device),
            torch.tensor(positions, dtype=torch.int64, device=device),
            self._cache,
        )
        self.num_computed_tokens += len(tokens)
        for (ids, context), start in zip(inputs, starts, strict=True):
            self._pages.computed(context, start + len(ids), drafts[context.request_id])
        rows, end, wanted = [], 0, {context.request_id for context in drafting}
        for ids, context in inputs:
            end += len(ids)
            if context.request_id in wanted:
                rows.append(end - 1)
        if not rows:
            return []
        return self._draw(self._model.logits(hidden_TD[torch.tensor(rows, device=device)]), drafting, drafts)

    def _draw(
        self, logits_SV: torch.Tensor, drafting: list[DraftContext], drafts: dict[str, list[int]]
    ) -> list[DraftContext]:
        """Draws as the target will; requests for which that fails get no further drafts."""
        rows = [self._row(context, drafts[context.request_id]) for context in drafting]
        places = list(range(len(drafting)))
        tokens = []
        while places:
            try:
                tokens = self._sampler.sample(logits_SV[places], [rows[place] for place in places])
                break
            except SamplingError as error:
                left = [place for place in places if rows[place].request_id not in error.request_ids]
                places = left if len(left) < len(places) else []
        for place, token in zip(places, tokens, strict=True):
            drafts[drafting[place].request_id].append(token.token_id)
        going_on = [drafting[place] for place in places]
        return [context for context in going_on if len(drafts[context.request_id]) < context.max_drafts]

    def _row(self, context: DraftContext, drafts: list[int]) -> SamplingRow:
        row = rows_with_drafts(context.sampling, drafts)[-1]
        if self._is_greedy:
            return replace(row, params=_LIKELIEST)
        if row.params.logprobs is None:
            return row
        known = self._params.get(context.request_id)
        if known is None or known[0] is not row.params:  # log probabilities of drafts are of no use to anyone
            known = self._params[context.request_id] = (row.params, replace(row.params, logprobs=None))
        return replace(row, params=known[1])


_LIKELIEST = SamplingParams(temperature=0.0)
_STEP_TOKENS = 64
"""Tokens that a request gains in a step at most: those are computed at once, whatever the budget."""


def _range(start: int, token_ids: list[int]) -> range:
    return range(start, start + len(token_ids))
