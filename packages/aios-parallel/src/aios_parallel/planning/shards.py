"""How a model is cut: heads, columns, experts and vocabulary among the ranks of a layer, layers among stages.

A rank of a tensor-parallel group holds contiguous query heads and the kv heads they use, so a kv head may be held by
several ranks. Attention runs with as many query heads per kv head everywhere: where a rank's kv heads serve unequal
numbers of them, the groups are padded to the widest, with heads of zeros. The MLP's columns and the head's vocabulary
are cut evenly; with expert parallelism a rank holds whole experts. Every rank of the first stage holds the whole
embedding table, and every rank the norms and routers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from aios_model.config import LayerSpec, ModelConfig
from aios_parallel.planning.errors import PlanError
from aios_parallel.planning.weights import WeightScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShard:
    """Attention heads of one rank.

    Attributes:
        query_heads: The model's query heads that the rank computes.
        kv_heads: The kv heads they use.
        num_padded: Query heads with the padding: kv heads times the widest group.
    """

    query_heads: range
    kv_heads: range
    num_padded: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShard:
    """What a rank holds of every layer of one kind; all ranges are of the whole model's indices.

    Attributes:
        heads: Attention heads.
        columns: Of the dense MLP; empty in a mixture.
        experts: Experts that the rank holds, whole or in part; empty in a dense layer.
        expert_columns: Columns of each of them.
        vocabulary: Rows of the head, in the last stage.
    """

    heads: HeadShard
    columns: range
    experts: range
    expert_columns: range
    vocabulary: range


def split_evenly(total: int, parts: int, *, unit: int = 1) -> list[range]:
    """`parts` contiguous ranges that cover 0 … total - 1, in whole units (but for the last), at most one unit apart."""
    units = -(-total // unit)
    borders = [min(total, units * part // parts * unit) for part in range(parts + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(borders)]


def split_heads(num_query_heads: int, num_kv_heads: int, ranks: int) -> list[HeadShard]:
    """The heads of each rank: query heads one by one, or by kv head where that is as quick and holds fewer of these."""
    group = num_query_heads // num_kv_heads
    choices = [_head_shards(split_evenly(num_query_heads, ranks), group)]
    if num_kv_heads >= ranks:
        choices.append(_head_shards(split_evenly(num_query_heads, ranks, unit=group), group))
    return min(choices, key=_head_cost)


def _head_cost(shards: Sequence[HeadShard]) -> tuple[int, int]:
    return max(shard.num_padded for shard in shards), sum(len(shard.kv_heads) for shard in shards)


def _head_shards(query_heads: Sequence[range], group: int) -> list[HeadShard]:
    shards = []
    for heads in query_heads:
        kv_heads = range(heads.start // group, (heads.stop - 1) // group + 1)
        widest = max(min(heads.stop, (kv_head + 1) * group) - max(heads.start, kv_head * group) for kv_head in kv_heads)
        shards.append(HeadShard(query_heads=heads, kv_heads=kv_heads, num_padded=widest * len(kv_heads)))
    return shards


def shard_layer(
    config: ModelConfig, spec: LayerSpec, scheme: WeightScheme, *, ranks: int, expert_parallel: bool
) -> tuple[RankShard, ...]:
    """What each of `ranks` ranks holds of a layer.

    Raises:
        PlanError: The layer cannot be cut so; says why.
    """
    check_tensor_parallel(config, spec, scheme, ranks=ranks, expert_parallel=expert_parallel)
    heads = split_heads(config.num_attention_heads, spec.num_key_value_heads, ranks)
    columns = split_evenly(0 if spec.moe else config.intermediate_size, ranks, unit=scheme.column_unit)
    num_experts = config.num_experts if spec.moe else 0
    width = config.moe_intermediate_size if spec.moe else 0
    if expert_parallel:
        experts, expert_columns = split_evenly(num_experts, ranks), [range(width)] * ranks
    else:
        experts, expert_columns = [range(num_experts)] * ranks, split_evenly(width, ranks, unit=scheme.column_unit)
    vocabulary = split_evenly(config.vocab_size, ranks)
    return tuple(
        RankShard(
            heads=heads[rank],
            columns=columns[rank],
            experts=experts[rank],
            expert_columns=expert_columns[rank],
            vocabulary=vocabulary[rank],
        )
        for rank in range(ranks)
    )


def check_tensor_parallel(
    config: ModelConfig, spec: LayerSpec, scheme: WeightScheme, *, ranks: int, expert_parallel: bool
) -> None:
    """Raises PlanError if a layer cannot be cut among `ranks` ranks."""
    if ranks == 1:
        return
    if ranks > config.num_attention_heads:
        raise PlanError(f"TP={ranks} exceeds the {config.num_attention_heads} query heads; every rank needs one")
    unit = scheme.column_unit
    heads = split_heads(config.num_attention_heads, spec.num_key_value_heads, ranks)
    if any(shard.query_heads.start * spec.head_dim % unit for shard in heads):
        raise PlanError(
            f"TP={ranks} with {scheme.name} would cut groups of {unit} columns: heads have {spec.head_dim}; "
            "choose a scheme with smaller groups"
        )
    if spec.moe and expert_parallel and ranks > config.num_experts:
        raise PlanError(
            f"expert parallelism over TP={ranks} ranks needs as many experts, there are {config.num_experts}"
        )
    width = config.moe_intermediate_size if spec.moe else config.intermediate_size
    if not (spec.moe and expert_parallel) and ranks * unit > width:
        raise PlanError(f"TP={ranks} exceeds the {width // unit} groups of {unit} columns of the MLP ({width} wide)")


def balance_stages(
    layer_costs: Sequence[float], num_stages: int, *, first_cost: float = 0.0, last_cost: float = 0.0
) -> list[range]:
    """Contiguous layers for each stage, so that the costliest stage costs as little as possible.

    Args:
        layer_costs: Cost of each layer, in any unit.
        num_stages: How many; each gets at least one layer.
        first_cost: What the first stage has besides layers (the embedding).
        last_cost: What the last one has (the head).

    Raises:
        PlanError: There are fewer layers than stages.
    """
    num_layers = len(layer_costs)
    if num_stages > num_layers:
        raise PlanError(f"PP={num_stages} exceeds the {num_layers} layers; every stage needs one")
    costs = list(layer_costs)
    costs[0] += first_cost
    costs[-1] += last_cost
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    borders = _even_borders(prefix, num_stages)
    while _improve(borders, prefix):
        pass
    return [range(start, stop) for start, stop in itertools.pairwise(borders)]


def _even_borders(prefix: Sequence[float], num_stages: int) -> list[int]:
    """Borders nearest to equal shares, with a layer left for every stage."""
    num_layers, borders = len(prefix) - 1, [0]
    for stage in range(1, num_stages):
        share = prefix[-1] * stage / num_stages
        lowest, highest = borders[-1] + 1, num_layers - (num_stages - stage)
        borders.append(min(range(lowest, highest + 1), key=lambda border: abs(prefix[border] - share)))
    return [*borders, num_layers]


def _improve(borders: list[int], prefix: Sequence[float]) -> bool:
    """Moves one border by one layer if that lowers the larger of its two stages; whether it did."""
    for i in range(1, len(borders) - 1):
        before, after = borders[i - 1], borders[i + 1]

        def larger(border: int, before: int = before, after: int = after) -> float:
            return max(prefix[border] - prefix[before], prefix[after] - prefix[border])

        best = min((border for border in range(borders[i] - 1, borders[i] + 2) if before < border < after), key=larger)
        if larger(best) < larger(borders[i]) * (1 - 1e-9):
            borders[i] = best
            return True
    return False
