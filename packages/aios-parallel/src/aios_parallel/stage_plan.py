"""Which layers make a stage of a pipeline: neighbours, in runs that take equally long."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from aios_model.config import LayerSpec, ModelConfig
from aios_model.errors import ConfigError


def plan_stages(config: ModelConfig, num_stages: int) -> list[range]:
    """Cuts the layers into neighbouring runs so that the slowest stage is as quick as can be.

    Raises:
        ConfigError: There are more stages than layers.
    """
    if num_stages > config.num_hidden_layers:
        raise ConfigError(
            f"{config.num_hidden_layers} layers cannot make {num_stages} pipeline stages; use "
            f"{config.num_hidden_layers} at most"
        )
    return balance(layer_costs(config), num_stages, last_extra=head_cost(config))


def layer_costs(config: ModelConfig) -> list[float]:
    """What each layer costs a step: half of it bytes, which decoding waits for, half operations, as prefill does.

    In parameters: those that are read, and those that a token is multiplied with; they differ for experts.
    """
    return [(_parameters(config, spec, False) + _parameters(config, spec, True)) / 2 for spec in config.layers]


def head_cost(config: ModelConfig) -> float:
    """What the head adds to the last stage: it is read in every step, and multiplied with one token in many."""
    return config.vocab_size * config.hidden_size / 2


def balance(costs: Sequence[float], num_stages: int, *, last_extra: float = 0.0) -> list[range]:
    """Cuts `costs` into `num_stages` runs, none of them empty, whose largest sum is the smallest possible.

    Args:
        costs: Of each layer.
        num_stages: Runs to make, no more than layers.
        last_extra: What the last run bears beside its layers.
    """
    total = [0.0, *accumulate(costs)]
    num_layers = len(costs)
    # worst[k][i]: the least possible worst run when the first i layers make k runs; cut[k][i]: where the last begins.
    worst = [[float("inf")] * (num_layers + 1) for _ in range(num_stages + 1)]
    cut = [[0] * (num_layers + 1) for _ in range(num_stages + 1)]
    worst[0][0] = 0.0
    for stage in range(1, num_stages + 1):
        for end in range(stage, num_layers + 1):
            extra = last_extra if stage == num_stages else 0.0
            for start in range(stage - 1, end):
                candidate = max(worst[stage - 1][start], total[end] - total[start] + extra)
                if candidate < worst[stage][end]:
                    worst[stage][end], cut[stage][end] = candidate, start
    stages: list[range] = []
    end = num_layers
    for stage in range(num_stages, 0, -1):
        stages.append(range(cut[stage][end], end))
        end = cut[stage][end]
    return stages[::-1]


def _parameters(config: ModelConfig, spec: LayerSpec, active: bool) -> int:
    """Parameters of a layer; `active`: those that one token meets."""
    attention = 2 * config.hidden_size * spec.head_dim * (config.num_attention_heads + spec.num_key_value_heads)
    if not spec.moe:
        return attention + 3 * config.hidden_size * config.intermediate_size
    experts = config.num_experts_per_tok if active else config.num_experts
    return attention + config.hidden_size * (config.num_experts + 3 * experts * config.moe_intermediate_size)
