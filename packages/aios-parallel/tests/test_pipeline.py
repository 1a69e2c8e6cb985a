"""Stages are as balanced as they can be."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aios_model.errors import ConfigError
from aios_parallel.stage_plan import balance, plan_stages


@given(st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(1, 4), st.integers(0, 30))
def test_the_slowest_stage_is_as_quick_as_can_be(costs, num_stages, extra) -> None:
    num_stages = min(num_stages, len(costs))
    stages = balance(costs, num_stages, last_extra=extra)
    assert [layer for stage in stages for layer in stage] == list(range(len(costs)))
    assert all(stages)

    def worst(borders) -> int:
        runs = [sum(costs[a:b]) for a, b in zip((0, *borders), (*borders, len(costs)), strict=True)]
        return max(*runs[:-1], runs[-1] + extra) if len(runs) > 1 else runs[0] + extra

    best = min(worst(borders) for borders in combinations(range(1, len(costs)), num_stages - 1))
    assert worst([stage.start for stage in stages[1:]]) == best


def test_the_head_weighs_on_the_last_stage(tiny) -> None:
    config = tiny("config_of")("llama", vocab_size=30_000, num_hidden_layers=12)
    assert [len(stage) for stage in plan_stages(config, 2)] == [11, 1]
    light = tiny("config_of")("llama", vocab_size=16, num_hidden_layers=12)
    assert [len(stage) for stage in plan_stages(light, 3)] == [4, 4, 4]
    with pytest.raises(ConfigError, match="12 layers cannot make 13"):
        plan_stages(light, 13)
