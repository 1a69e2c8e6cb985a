"""Drawing one token per row: from the whole vocabulary, or from what top-k and top-p leave of it.

Both draw with the same noise, keyed by token id, so a filter that removes nothing changes nothing. Every filter keeps
the head of the row's ranking, which makes their combination simple: the shortest head wins, and it is never empty.

Shapes: R rows, V vocabulary, W width of a ranking. "Log weights" are logits divided by the temperature, shifted so that
the largest of each row is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from aios_model.sampling.noise import exponential_noise
from aios_model.sampling.ranking import Ranking, rank, top_token

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_FIRST_WIDTH = 1024
_SECOND_WIDTH = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """Filters of R rows.

    Attributes:
        top_k: int64 [R]; V where top-k is off.
        top_p: float64 [R] in (0, 1]; 1 where top-p is off.
    """

    top_k: Tensor
    top_p: Tensor

    def __getitem__(self, index: Tensor) -> Truncation:
        return Truncation(top_k=self.top_k[index], top_p=self.top_p[index])


def mask_min_p(log_weights_RV: Tensor, log_min_p_R: Tensor) -> None:
    """Excludes, in place, tokens less likely than min_p times the likeliest one; -inf excludes none."""
    log_weights_RV.masked_fill_(log_weights_RV < log_min_p_R[:, None], -torch.inf)


def draw(log_weights_RV: Tensor, keys_R2: Tensor) -> Tensor:
    """Draws from the whole vocabulary in proportion to exp(log weight).

    Args:
        log_weights_RV: Overwritten.
        keys_R2: From `noise.row_keys`.

    Returns:
        Token ids, int64 [R].
    """
    token_ids_V = torch.arange(log_weights_RV.shape[1], dtype=torch.int32, device=log_weights_RV.device)
    scores_RV = log_weights_RV.exp_().div_(exponential_noise(keys_R2, token_ids_V))
    return top_token(scores_RV)[0]


def draw_truncated(log_weights_RV: Tensor, keys_R2: Tensor, truncation: Truncation) -> Tensor:
    """Draws in proportion to exp(log weight) among the tokens that top-k, then top-p, leave.

    Top-k keeps the first k tokens of the ranking. Top-p keeps a token if the tokens before it hold less than top_p of
    the probability that top-k has left: the token that reaches top_p is kept, and the likeliest always is.

    A ranking of bounded width is tried first; only rows whose cut it does not settle are ranked further.

    Returns:
        Token ids, int64 [R]; exactly what a full sort would give.
    """
    totals_R = _totals(log_weights_RV, truncation)
    token_ids_R = torch.empty(len(keys_R2), dtype=torch.int64, device=keys_R2.device)
    pending = torch.arange(len(keys_R2), device=keys_R2.device)
    for width in _widths(log_weights_RV.shape[1], truncation):
        ranking = rank(_rows(log_weights_RV, pending), width)
        num_kept_R, settled_R = _cut(ranking, truncation[pending], totals_R[pending])
        drawn_R = _draw_ranked(ranking, num_kept_R, keys_R2[pending])
        token_ids_R[pending[settled_R]] = drawn_R[settled_R]
        pending = pending[~settled_R]
        if len(pending) == 0:
            break
    return token_ids_R


def draw_sorted(log_weights_RV: Tensor, keys_R2: Tensor, truncation: Truncation) -> Tensor:
    """The same tokens as `draw_truncated`, from a full sort: more work, but nothing is read from the device meanwhile.

    Returns:
        Token ids, int64 [R].
    """
    unbounded_R = truncation.top_k >= log_weights_RV.shape[1]
    totals_R = torch.where(unbounded_R, _sums(log_weights_RV), 0.0)
    ranking = rank(log_weights_RV, log_weights_RV.shape[1])
    num_kept_R, _ = _cut(ranking, truncation, totals_R)
    return _draw_ranked(ranking, num_kept_R, keys_R2)


def _rows(x_RV: Tensor, index: Tensor) -> Tensor:
    return x_RV if len(index) == len(x_RV) else x_RV[index]


def _widths(vocab_size: int, truncation: Truncation) -> Iterator[int]:
    """Widths to try: with room for top-k and the tokens tied at its edge, or for a usual nucleus; at last all."""
    bounded_R = truncation.top_k[truncation.top_k < vocab_size]
    largest_k = int(bounded_R.max()) if len(bounded_R) else 0
    first = 2 * largest_k + 64
    if len(bounded_R) < len(truncation.top_k):
        first = max(first, _FIRST_WIDTH)
    for width in sorted({first, max(first, _SECOND_WIDTH)}):
        # Close to the whole, partial selection costs as much as sorting.
        if width <= vocab_size // 2:
            yield width
    yield vocab_size


def _totals(log_weights_RV: Tensor, truncation: Truncation) -> Tensor:
    """Sum of exp(log weight) over each row whose top-k is off, against which its top-p is measured; 0 for the others.

    Float64 [R].
    """
    unbounded_R = truncation.top_k >= log_weights_RV.shape[1]
    totals_R = torch.zeros_like(truncation.top_p)
    if unbounded_R.any():
        totals_R[unbounded_R] = _sums(_rows(log_weights_RV, unbounded_R.nonzero()[:, 0]))
    return totals_R


def _sums(log_weights_RV: Tensor) -> Tensor:
    """Sum of exp(log weight) over each row, float64 [R].

    By way of softmax, which sums every row in one order; torch.sum splits a row over threads when it is alone, and then
    differs in the last bit.
    """
    return log_weights_RV.softmax(dim=-1).amax(dim=-1).to(torch.float64).reciprocal()


def _cut(ranking: Ranking, truncation: Truncation, totals_R: Tensor) -> tuple[Tensor, Tensor]:
    """How many leading tokens each row keeps (int64 [R]), and whether this ranking settles that (bool [R])."""
    values_RW, top_k_R = ranking.values, truncation.top_k
    places_W = torch.arange(values_RW.shape[1], device=values_RW.device)
    cumulative_RW = values_RW.exp().cumsum(dim=-1, dtype=torch.float64)
    before_RW = cumulative_RW.roll(1, dims=-1)
    before_RW[:, 0] = 0.0
    # Where top-k is on, the ranking is wider than k, so that what top-k leaves can be summed here.
    last_R1 = (top_k_R - 1).clamp(max=len(places_W) - 1)[:, None]
    mass_R = torch.where(totals_R > 0, totals_R, cumulative_RW.gather(1, last_R1)[:, 0])
    limit_R = torch.where(truncation.top_p < 1.0, truncation.top_p * mass_R, torch.inf)
    kept_RW = (places_W < top_k_R[:, None]) & (before_RW < limit_R[:, None]) & (values_RW > -torch.inf)
    num_kept_R = kept_RW.sum(dim=-1)
    return num_kept_R, num_kept_R <= ranking.num_certain


def _draw_ranked(ranking: Ranking, num_kept_R: Tensor, keys_R2: Tensor) -> Tensor:
    """Draws among the first `num_kept_R` tokens of each row; int64 [R]."""
    places_W = torch.arange(ranking.values.shape[1], device=keys_R2.device)
    scores_RW = ranking.values.exp().div_(exponential_noise(keys_R2, ranking.token_ids.to(torch.int32)))
    scores_RW.masked_fill_(places_W >= num_kept_R[:, None], 0.0)
    return ranking.token_ids.gather(1, top_token(scores_RW)[0][:, None])[:, 0]
