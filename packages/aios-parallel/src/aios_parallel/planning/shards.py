"""What each rank of a tensor-parallel group holds of a layer, by the rules that cut real layers.

The shares are those of `aios_parallel.shares`, which `shard_model` applies to a decoder: a plan cannot say anything
else than what is then loaded. What is added here is the refusal of cuts that packed weights do not allow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from aios_model.config import LayerSpec, ModelConfig
from aios_model.errors import ConfigError
from aios_model.weights.selection import Selection
from aios_parallel.planning.errors import PlanError
from aios_parallel.planning.weights import WeightScheme
from aios_parallel.shares import HeadShare, scaled, share_experts, share_features, share_heads

SMALLEST_GROUP = 16
"""Columns of the smallest group that kernels take: a group that two ranks share becomes two of one scale."""

_NOTHING = Selection(())


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShard:
    """What a rank holds of every layer of one kind; all indices are the whole model's.

    Attributes:
        heads: Attention heads.
        features: Of the dense MLP; none in a mixture.
        experts: Experts that the rank holds, whole or in part; empty in a dense layer.
        expert_features: Features of each of them.
    """

    heads: HeadShare
    features: Selection = _NOTHING
    experts: range = range(0)
    expert_features: Selection = _NOTHING

    @property
    def query_heads(self) -> range:
        """The model's query heads among them, without the padding."""
        return span_of(self.heads.queries)

    @property
    def kv_heads(self) -> range:
        """The kv heads that these use."""
        return span_of(self.heads.keys)


def span_of(selection: Selection) -> range:
    """The indices of a selection whose runs are neighbours; places that hold nothing are left out."""
    runs = [(run.start, run.start + run.length) for run in selection.runs if run.start is not None]
    return range(runs[0][0], runs[-1][1]) if runs else range(0)


def shard_layer(
    config: ModelConfig, spec: LayerSpec, scheme: WeightScheme, *, ranks: int, expert_parallel: bool
) -> tuple[RankShard, ...]:
    """What each of `ranks` ranks holds of a layer.

    Raises:
        PlanError: The layer cannot be cut so; says why.
    """
    if ranks > 1 and len({(each.num_key_value_heads, each.head_dim) for each in config.layers}) > 1:
        raise PlanError(f"TP={ranks} needs the same heads in every layer of a model; use PP and DP")
    try:
        shards = tuple(_shards(config, spec, ranks, expert_parallel=expert_parallel))
    except ConfigError as error:
        raise PlanError(f"TP={ranks}: {error}") from error
    if ranks > 1:
        for shard in shards:
            for columns in (scaled(shard.heads.queries, spec.head_dim), shard.features, shard.expert_features):
                _check_groups(scheme, columns, ranks)
    return shards


def column_group(scheme: WeightScheme, columns: Selection) -> int | None:
    """Columns that share a scale in a matrix of which a rank holds `columns`, as `WeightScheme.group_size`."""
    if not scheme.group_size or not columns.runs:
        return scheme.group_size
    borders = [run.length for run in columns.runs] + [run.start for run in columns.runs if run.start is not None]
    return math.gcd(scheme.group_size, *borders)


def _check_groups(scheme: WeightScheme, columns: Selection, ranks: int) -> None:
    size = column_group(scheme, columns)
    if scheme.group_size and size and size < min(SMALLEST_GROUP, scheme.group_size):
        raise PlanError(
            f"TP={ranks} with {scheme.name} would cut groups of {scheme.group_size} columns at a multiple of {size}, "
            f"and kernels take {SMALLEST_GROUP} at least; choose another number of ranks, or int8"
        )


def _shards(config: ModelConfig, spec: LayerSpec, ranks: int, *, expert_parallel: bool) -> Iterator[RankShard]:
    heads = share_heads(config.num_attention_heads, spec.num_key_value_heads, ranks)
    if not spec.moe:
        for head_share, features in zip(heads, share_features(config.intermediate_size, ranks), strict=True):
            yield RankShard(heads=head_share, features=features)
        return
    width = config.moe_intermediate_size
    if expert_parallel:
        experts, features = share_experts(config.num_experts, ranks), [Selection.span(0, width)] * ranks
    else:
        experts, features = [range(config.num_experts)] * ranks, share_features(width, ranks)
    for rank in range(ranks):
        yield RankShard(heads=heads[rank], experts=experts[rank], expert_features=features[rank])
