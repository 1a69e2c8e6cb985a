"""Bytes and times: computed by hand for a small model, equal to `aios_model.inspect` on one device, and monotonous."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aios_model.families import find_hf_family
from aios_model.hardware import Hardware
from aios_model.inspect import flops_per_token, kv_bytes, num_parameters, roofline
from aios_parallel.planning.collectives import CollectiveTimes
from aios_parallel.planning.costs import PlanCosts
from aios_parallel.planning.devices import Device, Link
from aios_parallel.planning.hardware import Cluster, Workload
from aios_parallel.planning.loads import Layout
from aios_parallel.planning.weights import find_scheme

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
MIXTURE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
}
MODELS = {
    "llama": LLAMA,
    "tied": LLAMA | {"tie_word_embeddings": True},
    "biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "qwen3": LLAMA | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
    "mixture": MIXTURE,
    "window": LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": 48},
}
DEVICE = Device(
    name="toy", memory_bytes=1e6, bandwidth=1e6, flops={"float": 1e9, "int8": 2e9}, links=(), source="this test"
)
LINK = Link(name="wire", bandwidth=1e6, latency=1e-3)
SLOW = Link(name="string", bandwidth=1e4, latency=1e-2)
WORK = Workload(batch=2, context=16, prompt=8, max_num_batched_tokens=8, kv_cache_dtype="bfloat16", utilization=0.5)


def config_of(raw):
    return find_hf_family(raw).read_hf(raw)


def costs_of(raw=LLAMA, *, scheme="none", work=WORK, hosts=1, devices=8, device=DEVICE, links=(LINK, SLOW), **sizes):
    config = config_of(raw)
    times = CollectiveTimes(links={"host": links[0], "network": links[1]})
    cluster = Cluster(device=device, num_devices=devices, num_hosts=hosts, times=times)
    return PlanCosts(config, find_scheme(scheme, config, device), cluster, work, Layout(**sizes))


def test_a_rank_of_two_holds_what_was_counted_by_hand():
    ranks = costs_of(tensor=2).memory()[0]
    attention, mlp, norms = (32 + 16 + 16) * 64 + 64 * 32, 3 * 64 * 64, 2 * 64
    weights = 2 * (2 * (attention + mlp + norms) + 64 * 64 + 64 * 64 + 64)
    for rank in ranks:
        assert rank.weights == weights
        assert rank.kv_cache == 2 * 16 * (2 * 16 * 2 * 2)
        assert rank.activations == 8 * (3 * 64 + 3 * 64) * 2 + 2 * 128 * 4
        assert rank.reserve == 0.5e6
        assert rank.used == sum((rank.weights, rank.kv_cache, rank.activations, rank.reserve))


def test_a_decode_step_takes_what_was_computed_by_hand():
    step = costs_of(tensor=2).decode()
    layers, head = 2 * (6144 + 12288 + 128), 64 * 64 + 64
    reading = (2 * (layers + head) + 2 * 16 * 128) / 1e6
    computing = (2 * 2 * (layers + head) + 4 * 2 * 2 * 32 * 16) / 1e9
    all_reduce = 2 * (1e-3 + 0.5 * (2 * 64 * 2) / 1e6)
    communicating = 5 * all_reduce + 1e-3 + 0.5 * (2 * 128 * 4) / 1e6
    assert step.reading == pytest.approx(reading)
    assert step.computing == pytest.approx(computing)
    assert step.communicating == pytest.approx(communicating)
    assert step.seconds == pytest.approx(reading + communicating)
    assert (step.bubble, step.num_micro_batches, step.bound) == (0.0, 1, "reading")


def test_a_pipeline_takes_as_long_as_its_slowest_stage_times_the_micro_batches():
    costs = costs_of(pipeline=2, work=replace(WORK, batch=4))
    step = costs.decode()
    layer, head = 2 * (12288 + 24576 + 128), 2 * (8192 + 64)
    kv = 2 * 16 * 128
    send, back = 1e-3 + 2 * 64 * 2 / 1e6, 1e-3 + 2 * 8 / 1e6
    first, last = (layer + kv) / 1e6 + send, (layer + head + kv) / 1e6
    assert step.num_micro_batches == 1 or step.seconds < 2 * (first + last)
    one = (layer + 2 * kv) / 1e6 + (layer + head + 2 * kv) / 1e6 + 1e-3 + 4 * 64 * 2 / 1e6 + 1e-3 + 4 * 8 / 1e6
    two = max(2 * max(first, last), first + last + back)
    assert step.seconds == pytest.approx(min(one, two))
    alone = costs.decode(sequences=1)
    assert alone.num_micro_batches == 1
    assert alone.bubble == pytest.approx(0.5, abs=0.05)


def test_prefill_follows_its_chunks_through_the_stages():
    work = replace(WORK, context=32, prompt=32)
    one, two = costs_of(work=work).prefill_seconds(), costs_of(work=work, pipeline=2).prefill_seconds()
    layer, kv = 2 * (12288 + 24576 + 128), 128 * 16.5
    assert one == pytest.approx((4 * (2 * layer + 2 * kv) + 2 * 8256) / 1e6)
    send = 1e-3 + 8 * 64 * 2 / 1e6
    assert two == pytest.approx((5 * (layer + kv) + 2 * 8256) / 1e6 + 4 * send)


def test_collectives_and_bytes_sent_per_token():
    tensor = costs_of(tensor=4)
    assert tensor.collectives_per_pass() == 1 + 2 * 2 + 1
    assert tensor.bytes_sent_per_token() == 5 * 2 * 0.75 * 128 + 0.75 * 512
    assert costs_of(pipeline=2).collectives_per_pass() == 1
    assert costs_of(pipeline=2).bytes_sent_per_token() == 128
    assert costs_of().bytes_sent_per_token() == 0
    assert costs_of().decode().communicating == 0


@pytest.mark.parametrize("raw", MODELS.values(), ids=MODELS)
def test_one_device_agrees_with_inspect(raw):
    config = config_of(raw)
    work = replace(WORK, batch=1, context=100)
    costs = costs_of(raw, work=work)
    tied_head = config.vocab_size * config.hidden_size * config.tie_word_embeddings  # held beside the embedding
    assert costs.memory()[0][0].weights == 2 * (num_parameters(config) + tied_head)
    assert costs.loads.ranks[0][0].kv_bytes == config.kv_bytes_per_token(2)
    hardware = Hardware(name="", memory_bytes=1e6, bandwidth=1e6, flops=1e9, source="")
    limit = roofline(config, hardware, context=100, bytes_per_weight=2, kv_dtype_bytes=2)
    assert costs.decode().reading == pytest.approx(limit.bytes_per_token / 1e6)
    assert costs.decode().computing == pytest.approx(flops_per_token(config, context=100) / 1e9)
    assert costs.decode().seconds == pytest.approx(1 / limit.tokens_per_second)
    assert kv_bytes(config, context=100, dtype_bytes=2) <= 100 * config.kv_bytes_per_token(2)


@pytest.mark.parametrize("raw", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    "sizes", [{"tensor": 2}, {"tensor": 3}, {"tensor": 4}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2}]
)
def test_shards_add_up_to_the_model_plus_what_is_held_twice(raw, sizes):
    config = config_of(raw)
    costs = costs_of(raw, **sizes)
    held = sum(rank.weights for stage in costs.memory() for rank in stage)
    assert held >= 2 * num_parameters(config)
    tensor = sizes.get("tensor", 1)
    if tensor in (1, 2):  # two kv heads: nothing but norms, routers and a tied table is held twice
        routers = config.hidden_size * config.num_experts * sum(spec.moe for spec in config.layers)
        norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
        norms += 2 * config.num_hidden_layers * config.head_dim * config.qk_norm
        twice = (tensor - 1) * (norms + routers)
        if config.tie_word_embeddings:
            twice += config.vocab_size * config.hidden_size
        assert held == 2 * (num_parameters(config) + twice)


def test_expert_parallel_shards_add_up_too():
    config = config_of(MIXTURE)
    cut, whole = costs_of(MIXTURE, tensor=2), costs_of(MIXTURE, tensor=2, expert_parallel=True)
    held = [sum(rank.weights for rank in costs.memory()[0]) for costs in (cut, whole)]
    assert held[0] == held[1] > 2 * num_parameters(config)
    assert whole.decode().computing == pytest.approx(cut.decode().computing)


def test_int8_takes_a_byte_and_a_scale_per_row_and_int4_half_a_byte_and_one_per_group():
    rows = 2 * (64 + 2 * 32 + 64 + 2 * 128 + 64) + 128
    matrices = 2 * (12288 + 3 * 64 * 128) + 128 * 64
    rest = 2 * (128 * 64 + 5 * 64)
    assert costs_of(scheme="int8").memory()[0][0].weights == matrices + 4 * rows + rest
    assert costs_of(scheme="int4").memory()[0][0].weights == matrices / 2 + 2 * matrices / 64 + rest
    assert costs_of(scheme="int8").decode().computing < costs_of(scheme="int4").decode().computing


def test_a_processor_computes_in_float32_and_leaves_the_embedding_table_in_the_file():
    cpu = replace(DEVICE, kind="cpu")
    assert costs_of(device=cpu).memory()[0][0].weights == 4 * (num_parameters(config_of(LLAMA)) - 128 * 64)


def test_int8_kv_cache_has_a_scale_per_head():
    work = replace(WORK, kv_cache_dtype="int8")
    assert costs_of(work=work).loads.ranks[0][0].kv_bytes == 2 * 2 * 2 * (16 + 4)
    assert costs_of(work=replace(WORK, kv_cache_dtype="fp8")).loads.ranks[0][0].kv_bytes == 2 * 2 * 2 * 16


def test_experts_are_read_as_far_as_tokens_visit_them():
    one = costs_of(MIXTURE, work=replace(WORK, batch=1)).decode().reading
    many = costs_of(MIXTURE, work=replace(WORK, batch=64, context=1, prompt=1)).decode().reading
    expert = 2 * 3 * 64 * 32
    seen = 8 * (1 - 0.75**64) - 2
    kv = 256 * (64 * 1 - 1 * 16)
    assert many - one == pytest.approx((seen * expert + kv) / 1e6)


def test_groups_that_span_hosts_use_the_network():
    assert costs_of(tensor=4, hosts=2).tensor_place() == "host"
    wide = LLAMA | {"num_attention_heads": 8}
    assert costs_of(wide, tensor=8, hosts=2).tensor_place() == "network"
    assert costs_of(tensor=3, data=2, hosts=2).tensor_place() == "network"
    pipeline = costs_of(MODELS["llama"] | {"num_hidden_layers": 4}, tensor=2, pipeline=4, hosts=2)
    assert [pipeline.border_place(stage) for stage in range(3)] == ["host", "network", "host"]
    assert costs_of(tensor=4, pipeline=2, hosts=2).decode().seconds > costs_of(tensor=4, pipeline=2).decode().seconds


def test_the_largest_batch_is_the_last_that_fits():
    costs = costs_of(tensor=2)
    largest = costs.largest_batch
    assert largest > 2
    assert not any(rank.missing for stage in costs.memory(sequences=largest) for rank in stage)
    assert any(rank.missing for stage in costs.memory(sequences=largest + 1) for rank in stage)
    assert costs_of(tensor=2, data=2).largest_batch == 2 * largest
    assert costs_of(device=replace(DEVICE, memory_bytes=1e5)).largest_batch == 0


layouts = st.sampled_from(
    [{}, {"tensor": 2}, {"tensor": 4}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2}, {"data": 2}, {"tensor": 3}]
)


@given(st.sampled_from(sorted(MODELS)), layouts, st.integers(1, 64), st.floats(1.0, 100.0))
def test_faster_hardware_is_never_slower(name, sizes, batch, factor):
    work = replace(WORK, batch=batch)
    faster = replace(
        DEVICE,
        bandwidth=DEVICE.bandwidth * factor,
        flops={kind: rate * factor for kind, rate in DEVICE.flops.items()},
    )
    link = Link(name="better", bandwidth=LINK.bandwidth * factor, latency=LINK.latency / factor)
    before = costs_of(MODELS[name], work=work, **sizes)
    for changed in ({"device": faster}, {"links": (link, link)}):
        after = costs_of(MODELS[name], work=work, **changed, **sizes)
        assert after.decode().seconds <= before.decode().seconds * (1 + 1e-9)
        assert after.prefill_seconds() <= before.prefill_seconds() * (1 + 1e-9)


@given(st.sampled_from(sorted(MODELS)), layouts, st.integers(1, 64), st.integers(1, 2000))
def test_more_context_takes_more_memory_and_never_less_time(name, sizes, batch, context):
    short = costs_of(MODELS[name], work=replace(WORK, batch=batch, context=context, prompt=1), **sizes)
    long = costs_of(MODELS[name], work=replace(WORK, batch=batch, context=2 * context, prompt=1), **sizes)
    assert long.decode().seconds >= short.decode().seconds * (1 - 1e-9)
    assert long.fullest.kv_cache >= short.fullest.kv_cache
    assert long.largest_batch <= short.largest_batch


@given(st.sampled_from(["llama", "tied", "biases", "qwen3"]), st.sampled_from([{}, {"tensor": 2}]), st.integers(1, 200))
def test_a_larger_batch_takes_longer_but_less_per_sequence(name, sizes, batch):
    costs = costs_of(MODELS[name], **sizes)
    one, more = costs.decode(sequences=batch).seconds, costs.decode(sequences=batch + 1).seconds
    assert more >= one
    assert more / (batch + 1) <= one / batch * (1 + 1e-9)


@given(st.sampled_from(sorted(MODELS)), st.sampled_from([1, 2]), st.sampled_from(["none", "int8"]))
def test_more_ranks_hold_less_each(name, ranks, scheme):
    before = costs_of(MODELS[name], scheme=scheme, tensor=ranks).fullest
    after = costs_of(MODELS[name], scheme=scheme, tensor=2 * ranks).fullest
    assert after.weights < before.weights
    assert after.kv_cache <= before.kv_cache
