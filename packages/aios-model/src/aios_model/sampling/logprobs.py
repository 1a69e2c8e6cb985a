"""Log probabilities of the model's own distribution, before bans, penalties and temperature change it.

Shapes: R rows, V vocabulary, K alternatives reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from aios_model.sampling.ranking import rank
from aios_model.sampling.rows import TokenLogprobs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def token_logprobs(logits_RV: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Log probability and rank of one token per row, and the likeliest tokens beside it.

    Args:
        logits_RV: float [R, V], the model's logits; not modified.
        token_ids: The R tokens that were drawn, or that a prompt holds.
        num_top: How many alternatives to report for each row; 0 for none.

    Returns:
        One `TokenLogprobs` per row. A row's result does not depend on the other rows.
    """
    chosen_R1 = torch.tensor(token_ids, device=logits_RV.device)[:, None]
    logprobs_RV = logits_RV.log_softmax(dim=-1)
    chosen = logprobs_RV.gather(1, chosen_R1)[:, 0].tolist()
    ranks = _ranks(logits_RV, chosen_R1).tolist()
    tops = _top_pairs(logits_RV, logprobs_RV, num_top)
    return [
        TokenLogprobs(token_id=token_id, logprob=logprob, rank=place, top=top)
        for token_id, logprob, place, top in zip(token_ids, chosen, ranks, tops, strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobTensors:
    """What `token_logprobs` needs to know of R rows, on the device.

    Attributes:
        chosen_R: Log probability of the row's token.
        ranks_R: Its place, int64.
        top_ids_RK: The K likeliest tokens, int64.
        top_logprobs_RK: Their log probabilities.
    """

    chosen_R: Tensor
    ranks_R: Tensor
    top_ids_RK: Tensor
    top_logprobs_RK: Tensor

    @classmethod
    def of(cls, logits_RV: Tensor, token_ids_R: Tensor, *, num_top: int) -> LogprobTensors:
        """Computes them without reading from the device: the same as `token_logprobs`, with a full sort.

        Args:
            logits_RV: The model's logits; not modified.
            token_ids_R: int64, the tokens that were drawn.
            num_top: K.
        """
        chosen_R1 = token_ids_R[:, None]
        logprobs_RV = logits_RV.log_softmax(dim=-1)
        top_ids_RK = torch.empty(len(logits_RV), 0, dtype=torch.int64, device=logits_RV.device)
        if num_top:
            top_ids_RK = rank(logits_RV, logits_RV.shape[1]).token_ids[:, :num_top]
        return cls(
            chosen_R=logprobs_RV.gather(1, chosen_R1)[:, 0],
            ranks_R=_ranks(logits_RV, chosen_R1),
            top_ids_RK=top_ids_RK,
            top_logprobs_RK=logprobs_RV.gather(1, top_ids_RK),
        )


def _ranks(logits_RV: Tensor, chosen_R1: Tensor) -> Tensor:
    """1-based place in the order of `ranking`: one more than the tokens above, and the equal ones with a lower id."""
    values_R1 = logits_RV.gather(1, chosen_R1)
    token_ids_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    above_RV = logits_RV > values_R1
    above_RV |= (logits_RV == values_R1) & (token_ids_V < chosen_R1)
    return above_RV.sum(dim=-1) + 1


def _top_pairs(logits_RV: Tensor, logprobs_RV: Tensor, num_top: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """The likeliest (token id, logprob) pairs. Ranked by logits: unequal ones may round to the same log probability."""
    most = min(max(num_top), logits_RV.shape[1])
    if most == 0:
        return [()] * len(num_top)
    ranking = rank(logits_RV, 2 * most)
    token_ids_RK = ranking.token_ids[:, :most]
    uncertain_R = ranking.num_certain < most
    if uncertain_R.any():
        whole = rank(logits_RV[uncertain_R], logits_RV.shape[1])
        token_ids_RK[uncertain_R] = whole.token_ids[:, :most]
    token_ids, values = token_ids_RK.tolist(), logprobs_RV.gather(1, token_ids_RK).tolist()
    return [tuple(zip(ids[:k], row[:k], strict=True)) for ids, row, k in zip(token_ids, values, num_top, strict=True)]
