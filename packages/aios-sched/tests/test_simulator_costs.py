"""Cost models: stretches cost what their steps cost, and a fit finds what the steps were made of."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios_model.config import LayerSpec, ModelConfig
from aios_model.errors import ConfigError
from aios_model.hardware import DATASHEETS
from aios_sched.simulator.cost import FEMTOSECONDS, LinearCost, StepShape, interpolate
from aios_sched.simulator.fitting import CostFileError, MeasuredStep, fit, load_cost, save_cost
from aios_sched.simulator.histogram import Histogram
from aios_sched.simulator.roofline_cost import RooflineCost

small = st.floats(0, 0.1)


def model():
    """The shape of Llama 3 8B, with a smaller vocabulary."""
    spec = LayerSpec(num_key_value_heads=8, head_dim=128, window=None, scale=128**-0.5)
    return ModelConfig(
        architecture="llama",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        layers=(spec,) * 32,
    )


@settings(max_examples=200, deadline=None)
@given(
    terms=st.tuples(small, small, small, small, small),
    curve=st.lists(st.tuples(st.integers(1, 500), small), min_size=2, max_size=5, unique_by=lambda point: point[0]),
    sequences=st.integers(1, 200),
    context=st.integers(1, 10**6),
    count=st.integers(1, 50),
)
def test_a_stretch_costs_exactly_what_its_steps_cost(terms, curve, sequences, context, count):
    step, token, sequence, per_context, pair = terms
    linear = LinearCost(
        step_s=step,
        token_s=token,
        sequence_s=sequence,
        context_s=per_context,
        pair_s=pair,
        curve=tuple(sorted(curve)),
    )
    assert_stretch_is_its_steps(linear, sequences, context, count)


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(sorted(DATASHEETS)),
    devices=st.sampled_from((1, 2, 8)),
    sequences=st.integers(1, 4000),
    context=st.integers(1, 10**7),
    count=st.integers(1, 50),
)
def test_a_stretch_on_a_roofline_costs_exactly_what_its_steps_cost(name, devices, sequences, context, count):
    roofline = RooflineCost(config=model(), hardware=DATASHEETS[name], num_devices=devices)
    assert_stretch_is_its_steps(roofline, sequences, context, count)


def assert_stretch_is_its_steps(cost, sequences, context, count):
    stretch = cost.decode_steps(num_sequences=sequences, num_context=context, count=count)
    contexts = [context + sequences * index for index in range(count)]
    assert list(stretch) == [cost.step(StepShape(sequences, sequences, each, each)) for each in contexts]


def test_a_roofline_is_what_one_reads_off_the_datasheet():
    config, h100 = model(), DATASHEETS["h100"]
    cost = RooflineCost(config=config, hardware=h100, efficiency=1.0, host_s=0.0)
    weights = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336) + 32000 * 4096
    decode = cost.step(StepShape(1, 1, 1000, 1000)) / FEMTOSECONDS
    assert decode == pytest.approx((2 * weights + 1000 * 131072) / 3.35e12, rel=0.001)
    prefill = cost.step(StepShape(4096, 1, 4096, 4096 * 4097 // 2)) / FEMTOSECONDS
    body = 2 * (weights - 32000 * 4096) * 4096 + 2 * 32000 * 4096
    assert prefill == pytest.approx((body + 4 * 32 * 32 * 128 * 4096 * 4097 / 2) / 989e12, rel=0.001)


def test_several_devices_are_faster_and_pay_for_their_sums():
    times = [
        RooflineCost(config=model(), hardware=DATASHEETS["l4"], num_devices=n).step(StepShape(1, 1, 10, 10))
        for n in (1, 2)
    ]
    assert times[0] / 2 < times[1] < times[0]


def test_a_pool_that_holds_no_page_is_refused_with_the_arithmetic():
    with pytest.raises(ConfigError, match=r"24 GB \(l4\) hold no page beside weights of .* GB"):
        RooflineCost(config=model(), hardware=DATASHEETS["l4"], bytes_per_weight=4.0).max_blocks(block_size=16)
    assert RooflineCost(config=model(), hardware=DATASHEETS["h100"]).max_blocks(block_size=16) > 10_000


@pytest.mark.parametrize(
    "terms",
    [
        {"step_s": -1.0},
        {"step_s": float("nan")},
        {"step_s": 0.1, "host_s": 0.2},
        {"step_s": 0.1, "curve": ((2, 0.0), (1, 0.0))},
        {"step_s": 0.1, "curve": ((1, 0.0),)},
    ],
)
def test_costs_that_cannot_be_are_refused(terms):
    with pytest.raises(ConfigError):
        LinearCost(**terms)


def test_a_curve_goes_on_as_it_ends():
    curve = ((1, 0.0), (3, 2.0), (5, 8.0))
    assert [interpolate(curve, x) for x in (1, 2, 3, 4, 5, 6)] == [0, 1, 2, 5, 8, 11]


def test_a_fit_predicts_steps_it_has_not_seen():
    generator = random.Random()
    truth = LinearCost(
        step_s=0.004,
        sequence_s=1e-4,
        context_s=3e-7,
        pair_s=2e-8,
        curve=((1, 0.0), (16, 0.01), (256, 0.2)),
    )
    noisy = fit([measured(truth, generator, noise=0.02) for _ in range(400)])
    assert noisy.num_steps == 400
    assert noisy.median_error < 0.03
    for _ in range(50):
        step = measured(truth, generator, noise=0.0)
        assert noisy.cost.step(step.shape) / FEMTOSECONDS == pytest.approx(step.seconds, rel=0.06)


def measured(truth, generator, *, noise):
    sequences = generator.randint(1, 16)
    num_prefill = generator.choice((0, 0, generator.randint(1, 240)))
    context = sequences * generator.randint(1, 800) + num_prefill
    pairs = context + num_prefill * (num_prefill + 1) // 2
    shape = StepShape(sequences + num_prefill, sequences, context, pairs)
    seconds = truth.step(shape) / FEMTOSECONDS
    return MeasuredStep(shape=shape, seconds=seconds * generator.uniform(1 - noise, 1 + noise))


def test_too_few_or_impossible_steps_are_refused():
    one = MeasuredStep(shape=StepShape(1, 1, 1, 1), seconds=0.1)
    with pytest.raises(ConfigError, match="two shapes"):
        fit([one, one])
    with pytest.raises(ConfigError, match="no time"):
        fit([one, MeasuredStep(shape=StepShape(2, 1, 2, 3), seconds=0.0)])


def test_a_fit_survives_its_file(tmp_path):
    generator = random.Random(1)
    fitted = fit([measured(LinearCost(step_s=0.01, token_s=1e-3), generator, noise=0.1) for _ in range(50)])
    path = tmp_path / "cost.json"
    save_cost(path, fitted, about={"machine": "this one"})
    assert load_cost(path) == fitted.cost
    assert json.loads(path.read_text())["about"] == {"machine": "this one"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"step_s": "x"}', '{"step_s": -1}', '{"step_s": 1, "other": 2}'])
def test_a_file_that_is_no_cost_model_is_refused(tmp_path, text):
    path = tmp_path / "cost.json"
    path.write_text(text)
    with pytest.raises(CostFileError, match=str(path)):
        load_cost(path)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.integers(1, 10**18), min_size=1, max_size=60), weight=st.integers(1, 5))
def test_a_histogram_knows_percentiles_within_a_percent(values, weight):
    single, together = Histogram(), Histogram()
    for value in values:
        single.add(value, weight=weight)
    together.add_all(sorted(values), weight=weight)
    assert single == together
    assert single.count == weight * len(values)
    ordered = sorted(values * weight)
    for percent in (1, 50, 99):
        exact = ordered[max(0, -(-len(ordered) * percent // 100) - 1)]
        assert single.percentile(percent) == pytest.approx(exact, rel=0.011)
