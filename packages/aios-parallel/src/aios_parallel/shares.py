"""Who holds what of a layer that several ranks compute together (Megatron-LM, arXiv 1909.08053, section 3).

Attention is cut by heads, the MLP by features. Neither need divide evenly: SmolLM2-135M has nine query heads on three
kv heads, and two ranks, or four, can share them all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from aios_model.errors import ConfigError
from aios_model.weights.selection import Run, Selection

ACTIVATION_GROUP = 64
"""Columns whose inputs share a scale in 8-bit products: borders on multiples of it leave those scales as they are."""

_BORDERS = (256, 128, ACTIVATION_GROUP, 32, 16, 8, 4, 2, 1)
"""What shards of features should be multiples of, best first: 256 are the blocks of GGUF's K encodings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShare:
    """The heads of one rank.

    Attributes:
        queries: Its query heads, ordered by the kv head that they attend to, as many for each of them; places that
            are filled up with nothing hold zeros.
        kv_heads: The kv heads that these need; another rank may hold the same.
    """

    queries: Selection
    kv_heads: tuple[int, ...]

    @property
    def keys(self) -> Selection:
        """The kv heads as a selection."""
        return Selection(tuple(Run(head, 1) for head in self.kv_heads))


def share_heads(num_query_heads: int, num_kv_heads: int, num_ranks: int) -> list[HeadShare]:
    """Gives every rank neighbouring query heads, and the kv heads that these attend to.

    Query heads are dealt out one by one, or together with their kv head where the largest share becomes smaller by it
    (or as small, with fewer keys and values kept twice). Kernels want as many query heads for each kv head of a rank,
    so shares are filled up with heads of zeros.

    Raises:
        ConfigError: There are more ranks than query heads.
    """
    if num_ranks > num_query_heads:
        raise ConfigError(
            f"{num_ranks} ranks cannot share {num_query_heads} attention heads; use tensor parallelism of "
            f"{num_query_heads} at most, and more pipeline stages"
        )
    group = num_query_heads // num_kv_heads
    candidates = [_shares(_even(num_query_heads, num_ranks), group)]
    if num_kv_heads >= num_ranks:
        candidates.append(_shares([kv * group for kv in _even(num_kv_heads, num_ranks)], group))
    return min(candidates, key=_cost)


def share_features(width: int, num_ranks: int) -> list[Selection]:
    """Cuts the features of an MLP into near-equal spans, on borders that kernels and formats like.

    Raises:
        ConfigError: There are more ranks than features.
    """
    if num_ranks > width:
        raise ConfigError(f"{num_ranks} ranks cannot share {width} features")
    even = (unit for unit in _BORDERS if width % (unit * num_ranks) == 0)
    near = (unit for unit in _BORDERS if unit <= ACTIVATION_GROUP and width % unit == 0 and width // unit >= num_ranks)
    unit = next(even, None) or next(near)
    return [Selection.span(start * unit, end * unit) for start, end in _spans(_even(width // unit, num_ranks))]


def share_vocabulary(vocab_size: int, num_ranks: int) -> list[Selection]:
    """Cuts the vocabulary into spans of one size, the last ones filled up with zeros: gathered, they stack."""
    each = -(-vocab_size // num_ranks)
    each += -each % 16
    shares = []
    for rank in range(num_ranks):
        start, stop = min(rank * each, vocab_size), min((rank + 1) * each, vocab_size)
        runs = [Run(start, stop - start)] if stop > start else []
        runs += [Run(None, each - (stop - start))] if stop - start < each else []
        shares.append(Selection(tuple(runs)))
    return shares


def share_experts(num_experts: int, num_ranks: int) -> list[range]:
    """Neighbouring experts for every rank.

    Raises:
        ConfigError: There are more ranks than experts.
    """
    if num_ranks > num_experts:
        raise ConfigError(f"{num_ranks} ranks cannot share {num_experts} experts; leave expert parallelism off")
    return [range(start, end) for start, end in _spans(_even(num_experts, num_ranks))]


def scaled(selection: Selection, factor: int) -> Selection:
    """The same selection where each index stands for `factor` neighbours: of heads, their rows."""
    return Selection(
        tuple(Run(None if run.start is None else run.start * factor, run.length * factor) for run in selection.runs)
    )


def _even(count: int, num_ranks: int) -> list[int]:
    """Borders 0..count of near-equal spans."""
    return [count * rank // num_ranks for rank in range(num_ranks + 1)]


def _spans(borders: list[int]) -> list[tuple[int, int]]:
    return list(pairwise(borders))


def _shares(borders: list[int], group: int) -> list[HeadShare]:
    return [_share(start, end, group) for start, end in _spans(borders)]


def _share(start: int, end: int, group: int) -> HeadShare:
    """The share of query heads [start, end), `group` of which attend to each kv head."""
    pieces = []
    for kv_head in range(start // group, (end - 1) // group + 1):
        first, last = max(start, kv_head * group), min(end, (kv_head + 1) * group)
        pieces.append((kv_head, first, last - first))
    widest = max(count for _, _, count in pieces)
    runs: list[Run] = []
    for _, first, count in pieces:
        if runs and runs[-1].start is not None:  # heads that follow each other are one run: groups stay whole there
            runs[-1] = Run(runs[-1].start, runs[-1].length + count)
        else:
            runs.append(Run(first, count))
        if count < widest:
            runs.append(Run(None, widest - count))
    return HeadShare(queries=Selection(tuple(runs)), kv_heads=tuple(kv_head for kv_head, _, _ in pieces))


def _cost(shares: list[HeadShare]) -> tuple[int, int]:
    return max(share.queries.size for share in shares), sum(len(share.kv_heads) for share in shares)
