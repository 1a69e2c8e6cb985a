"""What a rank holds, reads and computes: its part of the model in bytes and in parameters.

Counted as in `aios_model.inspect`, and equal to it for a model on one rank: a token takes two operations per active
weight and four per cached pair, head and numbers of it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from aios_model.config import LayerSpec, ModelConfig
from aios_model.errors import ConfigError
from aios_model.weights.selection import Selection
from aios_parallel.planning.errors import PlanError
from aios_parallel.planning.hardware import Workload
from aios_parallel.planning.shards import RankShard, column_group, shard_layer
from aios_parallel.planning.weights import WeightScheme
from aios_parallel.shares import scaled, share_vocabulary
from aios_parallel.stage_plan import plan_stages


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How many ways a model is spread.

    Attributes:
        tensor: Ranks that share each layer (TP).
        pipeline: Stages (PP).
        data: Replicas (DP).
        expert_parallel: Whether a rank of a tensor-parallel group holds whole experts (EP).
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert_parallel: bool = False

    @property
    def num_devices(self) -> int:
        """Devices in use."""
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        sizes = (("TP", self.tensor), ("PP", self.pipeline), ("DP", self.data))
        names = [f"{name}={size}" for name, size in sizes if size > 1] + ["EP"] * self.expert_parallel
        return " ".join(names) or "one device"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLoad:
    """One rank's part of one layer.

    Attributes:
        weight_bytes: What it holds.
        fixed_bytes: Of these, read by every pass: all but the experts.
        params: Parameters that every token meets there.
        expert_params: Those of experts that a token meets on average.
        score_width: Query heads with padding times their size: what attention multiplies per cached token.
        kv_bytes: Bytes of keys and values per token.
        window: The layer's sliding window, or None.
        widest: Numbers per token of the largest intermediate result.
    """

    weight_bytes: float
    fixed_bytes: float
    params: float
    expert_params: float
    score_width: int
    kv_bytes: int
    window: int | None
    widest: float

    @property
    def expert_bytes(self) -> float:
        """Bytes of the experts, which are read if a token visits them."""
        return self.weight_bytes - self.fixed_bytes

    def visible(self, context: float) -> float:
        """Cached tokens that a query sees."""
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLoad:
    """One rank's part of one pipeline stage.

    Attributes:
        layers: Its kinds of layers, and how many of each.
        embedding_bytes: Of the embedding table, in the first stage; looked up, not read.
        head_bytes: Of the head and the last norm, in the last stage; read for rows that sample. A head that is tied to
            the embedding is held a second time, in the layout that products want.
        head_params: Parameters of both.
        vocabulary: Rows of the head.
    """

    layers: tuple[tuple[LayerLoad, int], ...]
    embedding_bytes: float = 0
    head_bytes: float = 0
    head_params: int = 0
    vocabulary: int = 0

    @property
    def num_layers(self) -> int:
        """Layers in the stage."""
        return sum(count for _, count in self.layers)

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights that the rank holds."""
        return sum(load.weight_bytes * n for load, n in self.layers) + self.embedding_bytes + self.head_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values per token."""
        return sum(load.kv_bytes * count for load, count in self.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoads:
    """A model in one scheme, for one workload, spread in one way.

    Attributes:
        stages: Layers of each stage.
        ranks: Loads by stage, and by rank of the tensor-parallel group.
        shards: What the ranks hold of each kind of layer.
    """

    stages: tuple[range, ...]
    ranks: tuple[tuple[StageLoad, ...], ...]
    shards: dict[LayerSpec, tuple[RankShard, ...]]


def spread_model(config: ModelConfig, scheme: WeightScheme, workload: Workload, layout: Layout) -> ModelLoads:
    """What every rank of one replica holds; PlanError if the model cannot be cut so."""
    shards = {
        spec: shard_layer(
            config, spec, scheme, ranks=layout.tensor, expert_parallel=layout.expert_parallel and spec.moe
        )
        for spec in dict.fromkeys(config.layers)
    }
    loads = {
        spec: [layer_load(config, spec, scheme, workload, shard, first=not i) for i, shard in enumerate(each)]
        for spec, each in shards.items()
    }
    try:
        stages = plan_stages(config, layout.pipeline)
    except ConfigError as error:
        raise PlanError(f"PP={layout.pipeline}: {error}") from error
    rows = _vocabulary_rows(config, layout)
    ranks = tuple(
        tuple(_stage_load(config, scheme, loads, stage, rows[rank], rank) for rank in range(layout.tensor))
        for stage in stages
    )
    return ModelLoads(stages=tuple(stages), ranks=ranks, shards=shards)


def layer_load(
    config: ModelConfig, spec: LayerSpec, scheme: WeightScheme, workload: Workload, shard: RankShard, *, first: bool
) -> LayerLoad:
    """A rank's part of one layer.

    Args:
        config: The model's.
        spec: The layer's.
        scheme: Of its matrices.
        workload: For the size of keys and values.
        shard: What the rank holds.
        first: Whether it is the rank that adds the biases of row-parallel products.
    """
    attention_bytes, attention_params = _attention(config, spec, scheme, shard, first=first)
    mlp_bytes, mlp_params = _dense_mlp(config, spec, scheme, shard, first=first)
    router = config.hidden_size * config.num_experts if spec.moe else 0
    norms = 2 * config.hidden_size
    fixed = attention_bytes + mlp_bytes + (router + norms) * scheme.float_bytes
    expert = _mlp_bytes(scheme, config.hidden_size, shard.expert_features)
    visits = config.num_experts_per_tok * len(shard.experts) / config.num_experts if spec.moe else 0.0
    width = 3 * shard.expert_features.size
    queries, keys = shard.heads.queries.size, len(shard.heads.kv_heads)
    return LayerLoad(
        weight_bytes=fixed + expert * len(shard.experts),
        fixed_bytes=fixed,
        params=attention_params + mlp_params + router + norms,
        expert_params=visits * config.hidden_size * width,
        score_width=queries * spec.head_dim,
        kv_bytes=keys * workload.kv_bytes(head_dim=spec.head_dim),
        window=spec.window,
        widest=max((queries + 2 * keys) * spec.head_dim, visits * width if spec.moe else 3 * shard.features.size),
    )


def _attention(
    config: ModelConfig, spec: LayerSpec, scheme: WeightScheme, shard: RankShard, *, first: bool
) -> tuple[float, int]:
    """Bytes and parameters of a rank's attention."""
    columns = scaled(shard.heads.queries, spec.head_dim)
    queries, keys = columns.size, len(shard.heads.kv_heads) * spec.head_dim
    small = (queries + 2 * keys) * config.qkv_bias + config.hidden_size * (config.output_bias and first)
    small += 2 * spec.head_dim * config.qk_norm
    num_bytes = scheme.matrix_bytes(queries + 2 * keys, config.hidden_size)
    num_bytes += scheme.matrix_bytes(config.hidden_size, queries, group_size=column_group(scheme, columns))
    return num_bytes + small * scheme.float_bytes, config.hidden_size * 2 * (queries + keys) + small


def _dense_mlp(
    config: ModelConfig, spec: LayerSpec, scheme: WeightScheme, shard: RankShard, *, first: bool
) -> tuple[float, int]:
    if spec.moe:
        return 0.0, 0
    width = shard.features.size
    biases = (2 * width + config.hidden_size * first) * config.mlp_bias
    num_bytes = _mlp_bytes(scheme, config.hidden_size, shard.features) + biases * scheme.float_bytes
    return num_bytes, 3 * config.hidden_size * width + biases


def _mlp_bytes(scheme: WeightScheme, hidden_size: int, features: Selection) -> float:
    width = features.size
    down = scheme.matrix_bytes(hidden_size, width, group_size=column_group(scheme, features))
    return scheme.matrix_bytes(2 * width, hidden_size) + down if width else 0.0


def _vocabulary_rows(config: ModelConfig, layout: Layout) -> list[int]:
    """Rows of the head (and of a cut embedding table) on each rank of a stage; a process alone cuts nothing."""
    if layout.tensor * layout.pipeline == 1:
        return [config.vocab_size]
    return [share.size for share in share_vocabulary(config.vocab_size, layout.tensor)]


def _stage_load(
    config: ModelConfig,
    scheme: WeightScheme,
    loads: dict[LayerSpec, list[LayerLoad]],
    stage: range,
    vocabulary: int,
    rank: int,
) -> StageLoad:
    counts = Counter(loads[config.layers[layer]][rank] for layer in stage)
    is_first, is_last = stage.start == 0, stage.stop == config.num_hidden_layers
    rows = vocabulary if is_last else 0
    norm = config.hidden_size * is_last
    return StageLoad(
        layers=tuple(counts.items()),
        embedding_bytes=vocabulary * config.hidden_size * scheme.table_bytes if is_first else 0,
        head_bytes=scheme.matrix_bytes(rows, config.hidden_size) + norm * scheme.float_bytes,
        head_params=rows * config.hidden_size + norm,
        vocabulary=rows,
    )
