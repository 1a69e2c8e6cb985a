"""What a plan says a rank holds is what a rank holds: decoders are cut and loaded for real, and weighed."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aios_model.decoder import DecoderModel
from aios_model.families import find_hf_family
from aios_model.loader import load_weights, parameter_shapes, parameter_slots
from aios_model.model import weight_bytes
from aios_model.weights.dummy import DummySource
from aios_parallel.communicator import SoloCommunicator
from aios_parallel.mesh import Mesh
from aios_parallel.pipeline import split_stages
from aios_parallel.planning.devices import find_device
from aios_parallel.planning.errors import PlanError
from aios_parallel.planning.hardware import Workload
from aios_parallel.planning.loads import Layout, spread_model
from aios_parallel.planning.shards import shard_layer, span_of
from aios_parallel.planning.weights import find_scheme
from aios_parallel.shares import share_features
from aios_parallel.stage_plan import plan_stages
from aios_parallel.tensor_parallel import shard_model

WORK = Workload(batch=2, context=16, prompt=8, max_num_batched_tokens=8, kv_cache_dtype="float32", utilization=0.5)
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 36,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "torch_dtype": "float32",
}
SHAPES = {
    "nine heads": SHAPE,
    "tied, with biases": SHAPE | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "uneven heads": SHAPE | {"num_attention_heads": 10, "num_key_value_heads": 2, "intermediate_size": 90},
    "qwen2": SHAPE | {"architectures": ["Qwen2ForCausalLM"], "num_attention_heads": 8, "num_key_value_heads": 2},
    "qwen3": SHAPE | {"architectures": ["Qwen3ForCausalLM"], "num_attention_heads": 6, "num_key_value_heads": 1},
    "mixture": SHAPE
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 40,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
    },
}


class StandIn(SoloCommunicator):
    """A rank of a group whose other ranks are not there; enough to be cut and loaded."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def config_of(raw):
    return find_hf_family(raw).read_hf(raw)


def load_rank(config, layout: Layout, rank: int, *, on_gpu: bool) -> DecoderModel:
    """What rank `rank` of a group loads, cut as `aios_serve.served_rank` cuts it."""
    decoder = DecoderModel(config).eval()
    shapes, slots = parameter_shapes(decoder), parameter_slots(decoder)
    if layout.tensor * layout.pipeline > 1:
        place = Mesh(tensor=layout.tensor, pipeline=layout.pipeline).place(rank)
        split_stages(place, plan_stages(config, layout.pipeline))(decoder)
        group = StandIn(place.tensor_rank, layout.tensor)
        shard_model(group, expert_parallel=layout.expert_parallel, shard_embedding=on_gpu)(decoder)
    options = {"file_format": "safetensors", "dtype": torch.float32, "device": torch.device("cpu")}
    load_weights(decoder, DummySource(shapes), parameters=slots, **options)
    return decoder


def held_bytes(decoder: DecoderModel, *, on_gpu: bool) -> int:
    """As the engine reports it; a table that is not cut stays in the file here, and would not on a GPU."""
    table = decoder.embedding
    in_file = on_gpu and getattr(table, "table", None) is not None
    return weight_bytes(decoder) + (4 * table.num_embeddings * table.size if in_file else 0)


def check(raw, layout: Layout, *, on_gpu: bool) -> None:
    config = config_of(raw)
    device = replace(find_device("h100"), kind="gpu" if on_gpu else "cpu")
    loads = spread_model(config, find_scheme("none", config, device), WORK, layout)
    planned = [load for stage in loads.ranks for load in stage]
    for rank, load in enumerate(planned):
        decoder = load_rank(config, layout, rank, on_gpu=on_gpu)
        assert load.weight_bytes == held_bytes(decoder, on_gpu=on_gpu)
        assert load.kv_bytes == decoder.local_config.kv_bytes_per_token(4)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 3)], ids=str)
def test_a_rank_holds_the_bytes_of_the_plan(name, tensor, pipeline, on_gpu):
    check(SHAPES[name], Layout(tensor=tensor, pipeline=pipeline), on_gpu=on_gpu)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (4, 1), (2, 2)], ids=str)
def test_a_rank_with_whole_experts_holds_the_bytes_of_the_plan(tensor, pipeline):
    check(SHAPES["mixture"], Layout(tensor=tensor, pipeline=pipeline, expert_parallel=True), on_gpu=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(4, 80), st.integers(1, 60), st.data())
def test_ranks_of_any_shape_hold_the_bytes_of_the_plan(num_kv_heads, group, width, vocab_size, data):
    heads = num_kv_heads * group
    raw = SHAPE | {
        "num_attention_heads": heads,
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": width,
        "vocab_size": vocab_size,
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "tie_word_embeddings": data.draw(st.booleans()),
    }
    tensor = data.draw(st.integers(1, min(heads, 4)))
    check(raw, Layout(tensor=tensor, pipeline=data.draw(st.integers(1, 2))), on_gpu=data.draw(st.booleans()))


def shards_of(raw, ranks, *, scheme="none", expert_parallel=False):
    config = config_of(raw)
    found = find_scheme(scheme, config, find_device("h100"))
    return shard_layer(config, config.layers[0], found, ranks=ranks, expert_parallel=expert_parallel)


def test_nine_heads_over_two_ranks_and_four():
    first, second = shards_of(SHAPE, 2)
    assert (first.query_heads, first.kv_heads, first.heads.queries.size) == (range(3), range(1), 3)
    assert (second.query_heads, second.kv_heads, second.heads.queries.size) == (range(3, 9), range(1, 3), 6)
    four = shards_of(SHAPE, 4)
    assert list(itertools.chain(*(shard.query_heads for shard in four))) == list(range(9))
    assert [shard.kv_heads for shard in four] == [range(1), range(2), range(1, 2), range(2, 3)]


def test_experts_are_whole_with_expert_parallelism_and_cut_without():
    mixture = SHAPES["mixture"]
    whole = shards_of(mixture, 4, expert_parallel=True)
    assert [shard.experts for shard in whole] == [range(1), range(1, 2), range(2, 3), range(3, 5)]
    assert {span_of(shard.expert_features) for shard in whole} == {range(40)}
    cut = shards_of(mixture, 2)
    assert {shard.experts for shard in cut} == {range(5)}
    assert [shard.expert_features for shard in cut] == share_features(40, 2)


def test_a_group_that_two_ranks_share_has_two_scales():
    raw = SHAPE | {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96, "num_hidden_layers": 1}
    config = config_of(raw)
    scheme = find_scheme("int4-g32", config, find_device("h100"))
    ranks = spread_model(config, scheme, WORK, Layout(tensor=2)).ranks[0]
    # 48 features each: the second of three groups of 32 columns is cut, so both shards have groups of 16.
    attention = [scheme.matrix_bytes(5 * 32, 64), scheme.matrix_bytes(10 * 32, 64)]
    outputs = [scheme.matrix_bytes(64, 3 * 32), scheme.matrix_bytes(64, 6 * 32)]
    mlp = scheme.matrix_bytes(96, 64) + 64 * 48 / 2 + 64 * 3 * 2
    norms = 2 * 64 * 4
    assert [load.layers[0][0].weight_bytes for load in ranks] == [
        each + output + mlp + norms for each, output in zip(attention, outputs, strict=True)
    ]


@pytest.mark.parametrize(
    ("change", "ranks", "options", "message"),
    [
        ({}, 5, {}, r"TP=5: 5 ranks cannot share 4 attention heads"),
        ({"head_dim": 8}, 4, {"scheme": "int4-g32"}, r"would cut groups of 32 columns at a multiple of 8"),
        ({"num_experts": 2}, 4, {"expert_parallel": True}, r"TP=4: 4 ranks cannot share 2 experts"),
        ({"moe_intermediate_size": 3}, 4, {}, r"TP=4: 4 ranks cannot share 3 features"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(change, ranks, options, message):
    raw = SHAPES["mixture"] | {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64} | change
    with pytest.raises(PlanError, match=message):
        shards_of(raw, ranks, **options)


def test_more_stages_than_layers_are_refused():
    config = config_of(SHAPE)
    with pytest.raises(PlanError, match=r"PP=4: 3 layers cannot make 4 pipeline stages"):
        spread_model(config, find_scheme("none", config, find_device("h100")), WORK, Layout(pipeline=4))
