"""Rejection sampling: drafts that were drawn from another distribution, corrected to the target's.

Leviathan et al. 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318). A draft x, drawn from q, is kept with
probability min(1, p(x) / q(x)); the first that is not is replaced by a draw from max(0, p - q), normalised. What comes
out has distribution p, whatever q is. It is not the token that plain decoding draws under the same seed: that is what
the engine's own check is for (`aios_sched.verification`), which keeps a draft only where the two are equal.

Shapes: K drafts, R rows, V vocabulary. Probabilities are float64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from aios_model.sampling.noise import row_keys, uniform_noise
from aios_model.sampling.processors import LogitsAdjuster
from aios_model.sampling.ranking import rank, top_token

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from aios_model.sampling.params import SamplingParams
    from aios_model.sampling.processors import LogitsProcessor
    from aios_model.sampling.rows import SamplingRow

_ACCEPT, _REPLACE = -1, -2
"""In the place of a token id, so that these uniforms are none of those that draw tokens at the same position."""


def accept_or_replace(
    target_KV: Tensor, draft_KV: Tensor | None, draft_token_ids: Sequence[int], uniforms_K: Sequence[float]
) -> list[int]:
    """The drafts that are kept, and one token more: what replaces the first that is not, or follows the last.

    Args:
        target_KV: [K + 1, V], the target's probabilities at each draft's place and behind the last.
        draft_KV: [K, V], those that the drafts were drawn from; None for drafts that were not drawn but chosen, as by a
            lookup, which is a q of 1 at the draft.
        draft_token_ids: K drafts.
        uniforms_K: K + 1 independent uniforms in (0, 1): one decides on each draft, the last draws the token.

    Returns:
        1 to K + 1 token ids.

    Raises:
        ValueError: Shapes or lengths do not belong together.
    """
    num_drafts = len(draft_token_ids)
    if len(target_KV) != num_drafts + 1 or len(uniforms_K) != num_drafts + 1:
        raise ValueError(
            f"{num_drafts} drafts need {num_drafts + 1} rows of the target and as many uniforms, "
            f"not {len(target_KV)} and {len(uniforms_K)}"
        )
    if draft_KV is not None and draft_KV.shape != target_KV[:num_drafts].shape:
        raise ValueError(f"the drafts' probabilities are {list(draft_KV.shape)}, the target's {list(target_KV.shape)}")
    for place, token_id in enumerate(draft_token_ids):
        target_V = target_KV[place]
        proposed = 1.0 if draft_KV is None else float(draft_KV[place, token_id])
        if uniforms_K[place] * proposed < float(target_V[token_id]):
            continue
        rest_V = _residual(target_V, None if draft_KV is None else draft_KV[place], token_id)
        return [*draft_token_ids[:place], _draw(rest_V, uniforms_K[-1])]
    return [*draft_token_ids, _draw(target_KV[num_drafts], uniforms_K[-1])]


def uniforms(row: SamplingRow, num_drafts: int) -> list[float]:
    """The K + 1 uniforms for `accept_or_replace`, keyed by the row's seed and the positions of its drafts.

    They repeat where the same drafts come at the same positions; other drafts may lead to other tokens.

    Args:
        row: How the target draws the first of the tokens.
        num_drafts: K.
    """
    seeds = torch.full((num_drafts + 1,), row.seed, dtype=torch.int64)
    positions = torch.arange(row.position, row.position + num_drafts + 1)
    noise_K2 = uniform_noise(row_keys(seeds, positions), torch.tensor([_ACCEPT, _REPLACE], dtype=torch.int32))
    return [*noise_K2[:num_drafts, 0].tolist(), float(noise_K2[-1, 1])]


class TargetDistribution:
    """What the `Sampler` draws from, as probabilities: after bans, biases, penalties, temperature and truncation.

    Args:
        vocab_size: Width of the logits.
        logits_processors: The sampler's.
    """

    def __init__(self, *, vocab_size: int, logits_processors: Sequence[LogitsProcessor] = ()) -> None:
        self._adjuster = LogitsAdjuster(vocab_size=vocab_size, processors=logits_processors)

    @torch.inference_mode()
    def probabilities(self, logits_RV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """Probabilities of the next token, [R, V] float64; 1 at one token for a greedy row.

        Args:
            logits_RV: The model's, [R, V]; not modified.
            rows: What to draw for each of the R rows.
        """
        adjusted_RV = logits_RV.to(torch.float64, copy=True)
        self._adjuster.adjust(adjusted_RV, rows)
        blocked = (adjusted_RV.amax(dim=-1) == -torch.inf).nonzero()[:, 0].tolist()
        if blocked:  # as the sampler does: bans give way where they leave nothing
            again_RV = logits_RV[blocked].to(torch.float64, copy=True)
            self._adjuster.adjust(again_RV, [rows[place] for place in blocked], with_bans=False)
            adjusted_RV[blocked] = again_RV
        return torch.stack([_probabilities(row_V, row.params) for row_V, row in zip(adjusted_RV, rows, strict=True)])

    def forget(self, request_id: str) -> None:
        """Drops what is remembered of a request; unknown ids are ignored."""
        self._adjuster.forget(request_id)


def _probabilities(logits_V: Tensor, params: SamplingParams) -> Tensor:
    if params.is_greedy:
        chosen_V = torch.zeros_like(logits_V)
        chosen_V[top_token(logits_V[None])[0]] = 1.0
        return chosen_V
    log_weights_V = (logits_V - logits_V.max()) / params.temperature
    if params.min_p > 0.0:
        log_weights_V = log_weights_V.masked_fill(log_weights_V < math.log(params.min_p), -torch.inf)
    ranking = rank(log_weights_V[None], len(log_weights_V))
    weights_V = ranking.values[0].exp()
    if 0 < params.top_k < len(weights_V):
        weights_V[params.top_k :] = 0.0
    if params.top_p < 1.0:
        before_V = weights_V.cumsum(dim=0) - weights_V
        weights_V[before_V >= params.top_p * weights_V.sum()] = 0.0
    return torch.zeros_like(weights_V).index_copy_(0, ranking.token_ids[0], weights_V / weights_V.sum())


def _residual(target_V: Tensor, draft_V: Tensor | None, token_id: int) -> Tensor:
    """max(0, p - q), not normalised; p where rounding has left nothing."""
    rest_V = target_V.clone()
    if draft_V is None:
        rest_V[token_id] = 0.0
    else:
        rest_V = (rest_V - draft_V).clamp_(min=0.0)
    return rest_V if float(rest_V.sum()) > 0.0 else target_V


def _draw(weights_V: Tensor, uniform: float) -> int:
    """The token at which the running sum passes `uniform` of the whole: one with a weight above 0."""
    cumulative_V = weights_V.cumsum(dim=0)
    place = int(torch.searchsorted(cumulative_V, uniform * cumulative_V[-1], right=True))
    return min(place, int(weights_V.nonzero()[-1]))
