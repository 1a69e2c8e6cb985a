"""Memory-efficient attention: the softmax over many keys, a chunk of them at a time.

The weights of a softmax need the largest score and the sum over all of them, so it seems that a row of scores must be
complete before a single value can be weighted: S x S numbers for a prompt of S tokens, 4 GiB per head at 32k. But both
can be mended afterwards (Milakov and Gimelshein 2018, arXiv 1805.02867; Rabe and Staats 2021, arXiv 2112.05682). Keep,
for each query, the largest score m so far, the sum l of exp(score - m), and the values summed with those weights. When
a chunk brings a larger score m', what was summed is multiplied by exp(m - m'), and goes on as if m' had been known from
the beginning.

Two partial results over different keys merge by the same rule, in any order; so a long context can be split among
threads, thread blocks (flash decoding) or devices. Both native kernels and GPU kernels do this; here it can be read.

Letters of shapes: T queries, the newest of S tokens; N query heads, K kv heads, G = N / K, H head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1024
"""Keys at a time; with QUERY_BLOCK queries, a head's scores take 1 MiB in float32."""

QUERY_BLOCK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialAttention:
    """Attention over some of the keys, ready to be merged with the others.

    Attributes:
        max_KGT: The largest score; -inf where a query saw no key.
        sum_KGT: Of exp(score - max).
        out_KGTH: Values, summed with these weights; not divided by their sum.
    """

    max_KGT: Tensor
    sum_KGT: Tensor
    out_KGTH: Tensor

    def merge(self, other: PartialAttention) -> PartialAttention:
        """Attention over the keys of both, which must be different ones."""
        largest = torch.maximum(self.max_KGT, other.max_KGT)
        mine, theirs = _rescaling(self.max_KGT, largest), _rescaling(other.max_KGT, largest)
        return PartialAttention(
            max_KGT=largest,
            sum_KGT=self.sum_KGT * mine + other.sum_KGT * theirs,
            out_KGTH=self.out_KGTH * mine[..., None] + other.out_KGTH * theirs[..., None],
        )

    def finish(self) -> Tensor:
        """[K, G, T, H]: divides by the sums. NaN for a query that saw no key at all."""
        return self.out_KGTH / self.sum_KGT[..., None]


def online_attention(
    q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, *, scale: float, window: int | None = None, chunk: int = CHUNK
) -> Tensor:
    """Causal attention of the newest T tokens over all S, without ever holding T x S scores.

    Args:
        q_TNH: Queries of the newest T of the S tokens.
        k_SKH: Keys; each kv head serves G = N / K query heads.
        v_SKH: Values.
        scale: Multiplies the products before the softmax.
        window: Query i sees key j when i - j < window; None sees all before it.
        chunk: Keys at a time.

    Returns:
        [T, N, H] in the dtype of the queries.
    """
    num_queries, num_keys = len(q_TNH), len(k_SKH)
    out_TNH = torch.empty_like(q_TNH)
    for start in range(0, num_queries, QUERY_BLOCK):
        rows = slice(start, min(start + QUERY_BLOCK, num_queries))
        first, last = num_keys - num_queries + rows.start, num_keys - num_queries + rows.stop - 1  # their positions
        q_KGTH = q_TNH[rows].unflatten(1, (k_SKH.shape[1], -1)).permute(1, 2, 0, 3)
        state: PartialAttention | None = None
        oldest = 0 if window is None else max(0, first - window + 1)
        for begin in range(oldest, last + 1, chunk):
            keys = slice(begin, min(begin + chunk, last + 1))
            part = attend_some(q_KGTH, k_SKH[keys], v_SKH[keys], first - begin, scale=scale, window=window)
            state = part if state is None else state.merge(part)
        assert state is not None, "a query sees itself"
        out_TNH[rows] = state.finish().permute(2, 0, 1, 3).flatten(1, 2)
    return out_TNH


def attend_some(
    q_KGTH: Tensor, k_SKH: Tensor, v_SKH: Tensor, offset: int, *, scale: float, window: int | None
) -> PartialAttention:
    """Attention over one chunk of the keys.

    Args:
        q_KGTH: Queries, the heads that share a kv head side by side.
        k_SKH: The chunk's keys.
        v_SKH: Its values.
        offset: Position of the first query, counted from the first key; negative if it stands before all of them.
        scale: Multiplies the products.
        window: See `online_attention`.
    """
    scores_KGTS = torch.matmul(q_KGTH, k_SKH.permute(1, 2, 0)[:, None]).mul_(scale)
    distance_TS = offset + torch.arange(q_KGTH.shape[2])[:, None] - torch.arange(len(k_SKH))
    hidden_TS = distance_TS < 0 if window is None else (distance_TS < 0) | (distance_TS >= window)
    scores_KGTS.masked_fill_(hidden_TS.to(scores_KGTS.device), -torch.inf)
    largest_KGT = scores_KGTS.amax(dim=-1)
    # A query that sees nothing here has no largest score: its weights are exp(-inf), whatever is subtracted.
    weights_KGTS = scores_KGTS.sub_(largest_KGT.nan_to_num(neginf=0.0)[..., None]).exp_()
    return PartialAttention(
        max_KGT=largest_KGT,
        sum_KGT=weights_KGTS.sum(dim=-1),
        out_KGTH=torch.matmul(weights_KGTS, v_SKH.transpose(0, 1)[:, None]),
    )


def _rescaling(before: Tensor, after: Tensor) -> Tensor:
    """exp(before - after), and 0 for what saw no key yet."""
    return torch.where(before == -torch.inf, 0.0, (before - after).exp())
