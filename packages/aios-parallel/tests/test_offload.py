"""Offloaded weights: the same tokens, the promised bytes, and every copy in order with every read.

On a device that keeps track of orders (`support/fake_streaming.py`); the last test needs a GPU.
"""

from __future__ import annotations

from random import Random

import pytest
import torch
from fake_streaming import FakeDevice, RaceError
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from aios_model.errors import ConfigError
from aios_model.layers.linear import Linear
from aios_model.model import weight_bytes
from aios_parallel.mesh import Mesh
from aios_parallel.offload.choice import choose_layers, spread
from aios_parallel.offload.device import streaming_device
from aios_parallel.offload.streaming import HostLayer, WeightStream, tensors_of
from aios_parallel.offload.weights import WeightOffload
from aios_sched.model_runner import ModelRunner

NUM_LAYERS = 6


@given(st.integers(1, 80), st.data())
def test_chosen_layers_are_spread_evenly(num_layers, data):
    count = data.draw(st.integers(0, num_layers))
    chosen = spread(num_layers, count)
    assert len(set(chosen)) == count
    assert all(0 <= index < num_layers for index in chosen)
    gaps = [after - before for before, after in zip([-1, *chosen], chosen, strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert not count or chosen[-1] == num_layers - 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 1200))
def test_as_few_layers_are_moved_as_have_the_bytes(sizes, wanted):
    chosen = choose_layers(sizes, wanted)
    held = sum(sizes[index] for index in chosen)
    if sum(sizes) < wanted:
        assert chosen == list(range(len(sizes)))
    else:
        assert held >= wanted
        fewer = spread(len(sizes), len(chosen) - 1)
        assert sum(sizes[index] for index in fewer) < wanted


class Offloaded:
    """A decoder some of whose weights stay in host memory, moved while it is loaded."""

    def __init__(self, tiny, config, num_bytes, *, dtype=torch.float64, num_buffers=2):
        self.device = FakeDevice()
        offload = WeightOffload(num_bytes, self.device, dtype=dtype, num_buffers=num_buffers)
        self.decoder = tiny("build_decoder")(config, offload.choose, dtype=dtype, on_loaded=offload.take)
        self.weights = offload.install(self.decoder)
        watch_all(self.device, self.decoder.layers)


def watch_all(device, layers):
    for layer in layers:
        device.watch(layer, tensors_of(layer))


def layer_bytes(config, tiny, dtype=torch.float64):
    decoder = tiny("build_decoder")(config, dtype=dtype)
    return [sum(tensor.nbytes for tensor in tensors_of(layer)) for layer in decoder.layers]


def run(tiny, decoder, config):
    runner = ModelRunner(
        decoder, tiny("build_cache")(decoder), tiny("Sampler")(vocab_size=config.vocab_size, device="cpu")
    )
    engine = tiny("build_engine")(runner)
    tokens = tiny("tokens_of")(engine, tiny("requests")())
    assert engine.stats().num_preemptions > 0
    return tokens


@pytest.mark.parametrize("family", ["llama", "llama-biases", "qwen3", "qwen3-moe"])
@pytest.mark.parametrize("num_moved", [3, 4, 5, 6])
def test_tokens_are_those_of_a_model_that_is_all_on_the_device(tiny, family, num_moved):
    config = tiny("config_of")(family, num_hidden_layers=NUM_LAYERS)
    sizes = layer_bytes(config, tiny)
    wanted = sum(sizes[index] for index in spread(NUM_LAYERS, num_moved))
    moved = Offloaded(tiny, config, wanted)
    assert moved.weights.layers == tuple(spread(NUM_LAYERS, num_moved))
    assert run(tiny, moved.decoder, config) == run(tiny, tiny("build_decoder")(config), config)
    assert moved.device.num_copies > 3 * num_moved


@pytest.mark.parametrize("num_moved", [1, 2, 3])
@pytest.mark.parametrize("num_buffers", [1, 2, 3])
def test_any_number_of_layers_and_buffers_gives_the_same_tokens(tiny, num_moved, num_buffers):
    config = tiny("config_of")("llama")
    decoder, device = tiny("build_decoder")(config), FakeDevice()
    chosen = sorted(Random(num_moved * 7 + num_buffers).sample(range(3), num_moved))
    hosted = [HostLayer(decoder.layers[index], device) for index in chosen]
    WeightStream(hosted, device, num_buffers=num_buffers)
    watch_all(device, decoder.layers)
    assert run(tiny, decoder, config) == run(tiny, tiny("build_decoder")(config), config)
    assert len(device.memories) == min(num_moved, num_buffers)
    if num_moved <= num_buffers:
        assert device.num_copies == num_moved, "a layer with a buffer of its own is copied once"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_stays_where_is_counted_to_the_byte(tiny, dtype):
    config = tiny("config_of")("llama-biases", num_hidden_layers=NUM_LAYERS)
    size = layer_bytes(config, tiny, dtype)[0]
    moved = Offloaded(tiny, config, 3 * size + 1, dtype=dtype)
    assert moved.weights.layers == (0, 2, 3, 5)
    assert moved.weights.num_host_bytes == 4 * size
    assert moved.weights.num_staging_bytes == sum(memory.tensor.nbytes for memory in moved.device.memories)
    assert 2 * size <= moved.weights.num_staging_bytes <= 2 * size + 2 * 16 * 256  # tensors begin at multiples of 256
    assert moved.device.num_host_bytes == 2 * moved.weights.num_staging_bytes
    staged = {memory.tensor.untyped_storage().data_ptr() for memory in moved.device.memories}
    for index, layer in enumerate(moved.decoder.layers):
        places = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(layer)}
        assert (places <= staged) == (index in moved.weights.layers)
    assert weight_bytes(moved.decoder) == weight_bytes(tiny("build_decoder")(config, dtype=dtype))


def test_weights_leave_the_device_while_the_model_is_loaded(tiny):
    config = tiny("config_of")("llama", num_hidden_layers=NUM_LAYERS)
    size = layer_bytes(config, tiny)[0]
    offload = WeightOffload(4 * size, FakeDevice(), dtype=torch.float64)
    moved: list[nn.Module] = []

    def on_loaded(module):
        before = module.weight if isinstance(module, Linear) else None
        offload.take(module)
        if before is not None and module.weight is not before:
            moved.append(module)

    # `Tensor.cpu` of a CPU tensor is the tensor itself; a copy shows what was moved.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)
        decoder = tiny("build_decoder")(config, offload.choose, on_loaded=on_loaded)
    wanted = [linear for index in spread(6, 4) for linear in decoder.layers[index].modules() if type(linear) is Linear]
    assert set(moved) == set(wanted)


def test_ranks_of_a_group_stream_their_own_shards(tiny):
    config = tiny("config_of")("qwen3-moe", num_hidden_layers=NUM_LAYERS)
    runner = tiny("ThreadedRunner")(config, Mesh(tensor=2, pipeline=2), expert_parallel=True)
    for decoder in runner.decoders:
        device = FakeDevice()
        sizes = [sum(tensor.nbytes for tensor in tensors_of(layer)) for layer in decoder.layers]
        weights = WeightOffload(sum(sizes), device, dtype=torch.float64, num_buffers=1).install(decoder)
        assert weights.num_host_bytes == sum(sizes)
        watch_all(device, decoder.layers)
    expected = tiny("tokens_of")(tiny("build_engine")(tiny("single_runner")(config)), tiny("requests")())
    assert tiny("tokens_of")(tiny("build_engine")(runner), tiny("requests")()) == expected


def stack_of(device, num_layers, *, kind=WeightStream, num_buffers=2):
    """Layers x -> W x in host memory, and what they give together."""
    layers = [nn.Sequential(Linear(8, 8)) for _ in range(num_layers)]
    for layer in layers:
        layer[0].set_weight(torch.randn(8, 8, dtype=torch.float64))
    weights = [layer[0].weight.clone() for layer in layers]
    kind([HostLayer(layer, device) for layer in layers], device, num_buffers=num_buffers)
    watch_all(device, layers)
    return layers, weights


@given(st.integers(1, 5), st.integers(1, 4), st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_steps_that_break_off_leave_the_next_its_weights(num_layers, num_buffers, ends):
    layers, weights = stack_of(FakeDevice(), num_layers, num_buffers=num_buffers)
    for end in ends:
        x = torch.randn(1, 8, dtype=torch.float64)
        expected = x
        for layer, weight in list(zip(layers, weights, strict=True))[: end + 1]:
            x, expected = layer(x), expected @ weight.T
        assert torch.equal(x, expected)


def test_a_layer_that_fails_leaves_the_next_step_its_weights():
    device = FakeDevice()
    layers, weights = stack_of(device, 5)
    broken = layers[3].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("no")))
    x = torch.randn(2, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="no"):
        nn.Sequential(*layers)(x)
    broken.remove()
    for layer, weight in zip(layers, weights, strict=True):
        assert torch.equal(layer(x), x @ weight.T)


class NeverWaits(WeightStream):
    def _before(self, index, *_):
        if self._buffer_of(index).holds != index:
            self._start_copy(index)


class ForgetsReads(WeightStream):
    def _after(self, index, *_):
        following = index + len(self._buffers)
        self._start_copy(following if following < len(self._layers) else index % len(self._buffers))


class TooEarly(WeightStream):
    def _before(self, index, *_):
        super()._before(index)
        self._after(index)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (NeverWaits, "before they have come"),
        (ForgetsReads, "still reads"),
        (TooEarly, "before they have come|still reads"),
    ],
)
def test_the_device_of_these_tests_notices_what_is_out_of_order(kind, message):
    layers, _ = stack_of(FakeDevice(), 5, kind=kind)
    x = torch.randn(1, 8, dtype=torch.float64)
    with pytest.raises(RaceError, match=message):
        nn.Sequential(*layers, *layers)(x)


def test_copies_are_under_way_before_their_layer_begins():
    device = FakeDevice()
    layers, _ = stack_of(device, 6)
    assert device.num_copies == 2
    started = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: started.append(device.num_copies))
    x = torch.randn(1, 8, dtype=torch.float64)
    nn.Sequential(*layers)(x)
    assert started == [2, 3, 4, 5, 6, 7]
    nn.Sequential(*layers)(x)
    assert started[6:] == [8, 9, 10, 11, 12, 13], "the copies of a step's first layers end the step before"


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (1.5, r"cpu_offload_gb=\S+ cannot be used: all layers .* ask for less"),
        (0.1, r"would free nothing.* ask for more"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_weights_are_read(tiny, share, message):
    config = tiny("config_of")("llama", num_hidden_layers=NUM_LAYERS)
    offload = WeightOffload(int(share * sum(layer_bytes(config, tiny))), FakeDevice(), dtype=torch.float64)
    with pytest.raises(ConfigError, match=message):
        tiny("build_decoder")(config, offload.choose, on_loaded=pytest.fail)


def test_a_cpu_has_nothing_to_offload():
    with pytest.raises(ConfigError, match="in host memory already"):
        streaming_device(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_streams_layers_in_time():
    device = torch.device("cuda")
    layers = [nn.Sequential(Linear(2048, 2048)) for _ in range(9)]
    for layer in layers:
        layer[0].set_weight(torch.randn(2048, 2048, device=device) / 45)
    weights = [layer[0].weight.clone() for layer in layers]
    streaming = streaming_device(device)
    before = torch.cuda.memory_allocated()
    stream = WeightStream([HostLayer(layer, streaming) for layer in layers], streaming)
    assert torch.cuda.memory_allocated() - before == stream.num_staging_bytes - 9 * 4 * 2048**2
    for rows in (1, 64, 2048):
        x = torch.randn(rows, 2048, device=device)
        found = [x.clone() for _ in range(20)]
        for index in range(20):  # steps follow each other without waiting
            found[index] = nn.Sequential(*layers)(x)
        expected = x
        for weight in weights:
            expected = nn.functional.linear(expected, weight)
        assert all(torch.equal(each, expected) for each in found)
