"""Shards cover the model, each number once unless it must be held twice."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aios_model.families import find_hf_family
from aios_parallel.planning.devices import find_device
from aios_parallel.planning.errors import PlanError
from aios_parallel.planning.shards import balance_stages, shard_layer, split_evenly, split_heads
from aios_parallel.planning.weights import find_scheme

MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}


def shards_of(raw, ranks, *, scheme="none", expert_parallel=False):
    config = find_hf_family(raw).read_hf(raw)
    found = find_scheme(scheme, config, find_device("h100"))
    return shard_layer(config, config.layers[0], found, ranks=ranks, expert_parallel=expert_parallel)


@given(st.integers(1, 400), st.integers(1, 40), st.sampled_from([1, 32, 64]))
def test_even_ranges_cover_everything_in_whole_units(total, parts, unit):
    ranges = split_evenly(total, parts, unit=unit)
    assert list(itertools.chain(*ranges)) == list(range(total))
    assert all(each.start % unit == 0 for each in ranges if each)
    sizes = [-(-len(each) // unit) for each in ranges]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_ranks_hold_their_query_heads_once_and_every_kv_head_that_these_use(num_kv_heads, group, data):
    ranks = data.draw(st.integers(1, num_kv_heads * group))
    shards = split_heads(num_kv_heads * group, num_kv_heads, ranks)
    assert list(itertools.chain(*(shard.query_heads for shard in shards))) == list(range(num_kv_heads * group))
    for shard in shards:
        assert set(shard.kv_heads) == {head // group for head in shard.query_heads}
        assert shard.num_padded % len(shard.kv_heads) == 0
        assert len(shard.query_heads) <= shard.num_padded <= group * len(shard.kv_heads)
    held = sum(len(shard.kv_heads) for shard in shards)
    assert held >= num_kv_heads
    if num_kv_heads % ranks == 0:
        assert held == num_kv_heads
        assert all(shard.num_padded == len(shard.query_heads) for shard in shards)
    if ranks % num_kv_heads == 0 and (num_kv_heads * group) % ranks == 0:
        assert all(len(shard.kv_heads) == 1 for shard in shards)


def test_nine_heads_over_two_ranks_go_with_their_kv_heads():
    first, second = split_heads(9, 3, 2)
    assert (first.query_heads, first.kv_heads, first.num_padded) == (range(3), range(1), 3)
    assert (second.query_heads, second.kv_heads, second.num_padded) == (range(3, 9), range(1, 3), 6)


def test_ranks_that_share_a_kv_head_pad_to_the_widest_group():
    shards = split_heads(10, 2, 3)
    assert [shard.query_heads for shard in shards] == [range(3), range(3, 6), range(6, 10)]
    assert [shard.kv_heads for shard in shards] == [range(1), range(2), range(1, 2)]
    assert [shard.num_padded for shard in shards] == [3, 4, 4]


def test_nine_heads_over_four_ranks():
    shards = split_heads(9, 3, 4)
    assert [len(shard.query_heads) for shard in shards] == [2, 2, 2, 3]
    assert [shard.kv_heads for shard in shards] == [range(1), range(2), range(1, 2), range(2, 3)]
    assert [shard.num_padded for shard in shards] == [2, 2, 2, 3]


@given(
    st.lists(st.floats(0.1, 10), min_size=1, max_size=9),
    st.data(),
    st.floats(0, 20),
    st.floats(0, 20),
)
def test_stages_are_whole_and_within_a_layer_of_the_best(costs, data, first, last):
    num_stages = data.draw(st.integers(1, len(costs)))
    stages = balance_stages(costs, num_stages, first_cost=first, last_cost=last)
    assert list(itertools.chain(*stages)) == list(range(len(costs)))
    assert all(len(stage) for stage in stages)
    loaded = list(costs)
    loaded[0] += first
    loaded[-1] += last
    assert slowest(loaded, stages) <= best_possible(loaded, num_stages) + max(costs) + 1e-9


def test_a_heavy_head_leaves_the_last_stage_fewer_layers():
    assert balance_stages([1.0] * 12, 3, last_cost=3.0) == [range(5), range(5, 10), range(10, 12)]


def test_more_stages_than_layers_are_refused():
    with pytest.raises(PlanError, match=r"PP=3 exceeds the 2 layers"):
        balance_stages([1.0, 1.0], 3)


def test_experts_are_whole_with_expert_parallelism_and_cut_without():
    whole = shards_of(MIXTURE, 4, expert_parallel=True)
    assert [shard.experts for shard in whole] == [range(1), range(1, 3), range(3, 4), range(4, 6)]
    assert {shard.expert_columns for shard in whole} == {range(64)}
    cut = shards_of(MIXTURE, 4)
    assert {shard.experts for shard in cut} == {range(6)}
    assert [shard.expert_columns for shard in cut] == [range(0, 16), range(16, 32), range(32, 48), range(48, 64)]


def test_quantised_columns_are_cut_between_groups():
    shards = shards_of(MIXTURE | {"num_experts": 0, "architectures": ["LlamaForCausalLM"]}, 2, scheme="int4-g32")
    assert [shard.columns for shard in shards] == [range(32), range(32, 96)]


@pytest.mark.parametrize(
    ("change", "ranks", "options", "message"),
    [
        ({}, 5, {}, r"TP=5 exceeds the 4 query heads"),
        ({}, 4, {"scheme": "int4-g32"}, r"would cut groups of 32 columns: heads have 16"),
        ({"num_experts": 2}, 4, {"expert_parallel": True}, r"over TP=4 ranks needs as many experts, there are 2"),
        ({"moe_intermediate_size": 32}, 2, {"scheme": "int4-g32"}, r"TP=2 exceeds the 1 groups of 32 columns"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(change, ranks, options, message):
    with pytest.raises(PlanError, match=message):
        shards_of(MIXTURE | change, ranks, **options)


def slowest(costs, stages):
    return max(sum(costs[layer] for layer in stage) for stage in stages)


def best_possible(costs, num_stages):
    """By trying all."""
    borders = itertools.combinations(range(1, len(costs)), num_stages - 1)
    cuts = ([0, *inner, len(costs)] for inner in borders)
    return min(slowest(costs, [range(a, b) for a, b in itertools.pairwise(cut)]) for cut in cuts)
