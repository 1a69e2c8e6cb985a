"""AWQ and GPTQ lose less of a layer's output than rounding to nearest, and scaling alone loses nothing."""

from __future__ import annotations

import pytest
import torch

from aios_model.decoder import DecoderLayer
from aios_model.weights.hub import resolve_model
from aios_quant.calibrate.awq import Awq, ScaledGroup, scaled_groups, search_scales
from aios_quant.calibrate.gptq import Gptq, gptq, inverse_factor
from aios_quant.calibrate.grid import GridSpec, find_grid
from aios_quant.calibrate.hooks import CalibrationRun, InputStatistics, quantizable_linears
from aios_quant.calibrate.rtn import RoundToNearest, round_to_nearest
from aios_quant.layerwise import LayerwiseCheckpoint

INT4 = GridSpec(bits=4, group_size=32, symmetric=True, scale_dtype=torch.bfloat16)
SPECS = [
    INT4,
    GridSpec(bits=4, group_size=64, symmetric=False, scale_dtype=torch.bfloat16),
    GridSpec(bits=4, group_size=192, symmetric=True, scale_dtype=torch.float16),
    GridSpec(bits=8, group_size=None, symmetric=True, scale_dtype=torch.bfloat16),
]


def correlated_inputs(tokens: int = 1024, columns: int = 192) -> torch.Tensor:
    """Inputs as layers have them: few directions carry most, and a few columns are large."""
    mixing = torch.randn(24, columns)
    x = torch.randn(tokens, 24) @ mixing + 0.3 * torch.randn(tokens, columns)
    x[:, torch.randperm(columns)[:6]] *= 8
    return x


def statistics_of(x: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(x.shape[1], x.device)
    for piece in x.split(300):
        statistics.add(piece)
    return statistics


def output_error(x: torch.Tensor, weight: torch.Tensor, rounded: torch.Tensor) -> float:
    return float((x @ (rounded - weight).T).norm() / (x @ weight.T).norm())


def test_statistics_are_the_sums_over_all_tokens():
    x = correlated_inputs()
    statistics = statistics_of(x)
    assert statistics.num_tokens == len(x)
    torch.testing.assert_close(statistics.gram_KK, x.T @ x, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(statistics.total_abs_K, x.abs().sum(dim=0), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gptq_halves_the_error_of_rounding_to_nearest(spec):
    x, weight = correlated_inputs(), torch.randn(48, 192) * 0.05
    nearest = output_error(x, weight, round_to_nearest(weight, spec).dequantize())
    ours = output_error(x, weight, gptq(weight, statistics_of(x), spec).dequantize())
    assert ours < 0.5 * nearest
    unseen = x.roll(1, dims=0) + 0.1 * torch.randn_like(x)
    assert output_error(unseen, weight, gptq(weight, statistics_of(x), spec).dequantize()) < 0.8 * nearest


def test_the_bound_on_gptq_would_notice_an_error():
    """Statistics of other columns, as a wrong permutation would bring them, do not pass."""
    x, weight = correlated_inputs(), torch.randn(48, 192) * 0.05
    nearest = output_error(x, weight, round_to_nearest(weight, INT4).dequantize())
    misled = gptq(weight, statistics_of(x[:, torch.randperm(192)]), INT4).dequantize()
    assert output_error(x, weight, misled) > 0.5 * nearest


def test_gptq_with_independent_inputs_rounds_to_nearest():
    weight = torch.randn(16, 160) * 0.05
    statistics = InputStatistics(160, weight.device)
    statistics.gram_KK, statistics.num_tokens = torch.eye(160) * 7, 7
    grid = find_grid(weight, INT4, search=True, gram_KK=torch.eye(160))
    assert torch.equal(gptq(weight, statistics, INT4).codes_NK, grid.encode(weight))


def test_gptq_leaves_the_weight_it_was_given_alone():
    weight = torch.randn(16, 160)
    before = weight.clone()
    gptq(weight, statistics_of(correlated_inputs(columns=160)), INT4)
    assert torch.equal(weight, before)


def test_an_expert_that_saw_no_token_is_rounded_to_nearest():
    weight = torch.randn(8, 64)
    grid = find_grid(weight, INT4, search=True)
    assert torch.equal(gptq(weight, None, INT4).codes_NK, grid.encode(weight))


@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_gptq_survives_few_tokens_and_columns_without_input(tokens):
    x, weight = correlated_inputs(tokens), torch.randn(16, 192) * 0.05
    x[:, 40:60] = 0
    rounded = gptq(weight, statistics_of(x), INT4).dequantize()
    assert torch.isfinite(rounded).all()
    assert output_error(x, weight, rounded) < output_error(x, weight, round_to_nearest(weight, INT4).dequantize())
    # Columns nobody looked at keep their weights.
    assert output_error(torch.randn(64, 192), weight, rounded) < 0.5


def test_the_factor_is_that_of_the_inverse():
    gram = statistics_of(correlated_inputs()).gram_KK
    upper = inverse_factor(gram, damping=0.01).double()
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(192)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(192).double(), rtol=0, atol=1e-2)


@pytest.fixture(scope="module")
def open_layer(tiny_checkpoint):
    """A layer of a tiny model, its spec, and windows in front of it with the outliers that real models have."""

    def open_case(case: str, index: int = 0) -> tuple[DecoderLayer, object, CalibrationRun]:
        checkpoint = LayerwiseCheckpoint(resolve_model(str(tiny_checkpoint(case))), device=torch.device("cpu"))
        layer, spec = checkpoint.layer(index), checkpoint.config.layers[index]
        # The channels that a trained norm lets through strongly.
        layer.attention_norm.weight[::9] *= 8
        layer.mlp_norm.weight[::7] *= 8
        mixing = torch.randn(8, checkpoint.config.hidden_size)
        hidden = torch.randn(4, 40, 8) @ mixing + 0.2 * torch.randn(4, 40, checkpoint.config.hidden_size)
        return layer, spec, CalibrationRun(hidden, checkpoint.rotary()(torch.arange(40)))

    return open_case


def layer_output(layer: DecoderLayer, spec, run: CalibrationRun) -> torch.Tensor:
    copy = CalibrationRun(run.hidden_WSD.clone(), run._rotation)
    copy.advance(layer, spec)
    return copy.hidden_WSD - run.hidden_WSD


@pytest.mark.parametrize("stored_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["llama2", "llama3", "llama-biases", "qwen2", "qwen3", "mixtral", "qwen3-moe"])
@torch.inference_mode()
def test_folding_scales_changes_nothing_before_rounding(case, stored_dtype, open_layer):
    """Random scales through every fold; for rounded norms the readers make up."""
    layer, spec, run = open_layer(case)
    before = layer_output(layer, spec, run)
    groups = list(scaled_groups(layer, spec, stored_dtype))
    multiplied = [path for group in groups for path in group.readers]
    assert set(multiplied) >= set(quantizable_linears(layer))
    for group in groups:
        columns = next(iter(group.readers.values())).in_features
        effective = group.divide_inputs(group.shared(torch.rand(columns) * 3 + 0.1))
        for linear in group.readers.values():
            linear.set_weight(linear.dense_weight() * effective)
    after = layer_output(layer, spec, run)
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()
    assert torch.equal(layer.attention_norm.weight.to(stored_dtype).float(), layer.attention_norm.weight)


@torch.inference_mode()
def test_a_fold_that_was_forgotten_would_be_noticed(open_layer):
    layer, spec, run = open_layer("llama3")
    before = layer_output(layer, spec, run)
    group = next(iter(scaled_groups(layer, spec, torch.float32)))
    group.divide_inputs(torch.rand(64) * 3 + 0.1)
    assert (layer_output(layer, spec, run) - before).abs().max() > 1e-2 * before.abs().max()


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("case", ["llama3", "qwen2", "mixtral"])
@torch.inference_mode()
def test_a_layer_keeps_more_of_its_output_than_by_rounding_to_nearest(method, case, open_layer):
    methods = {
        "rtn": RoundToNearest(spec=INT4, scale_dtype=torch.bfloat16),
        "awq": Awq(spec=INT4, stored_dtype=torch.bfloat16),
        "gptq": Gptq(spec=INT4),
    }
    layer, spec, run = open_layer(case)
    state = {path: linear.dense_weight().clone() for path, linear in quantizable_linears(layer).items()}
    expected = layer_output(layer, spec, run)
    errors = {}
    for name in ("rtn", method):
        for path, linear in quantizable_linears(layer).items():
            linear.set_weight(state[path])
        packed = methods[name].quantize_layer(layer, spec, run)
        for path, linear in quantizable_linears(layer).items():
            linear.set_weight(packed[path].dequantize())
        errors[name] = (layer_output(layer, spec, run) - expected).norm() / expected.norm()
    assert errors[method] < 0.85 * errors["rtn"]


@torch.inference_mode()
def test_awq_scales_up_what_sees_large_inputs_and_never_loses_by_it(open_layer):
    layer, _, _ = open_layer("llama2")
    x = torch.randn(512, 64)
    x[:, 3] *= 60
    statistics = statistics_of(x)
    group = ScaledGroup(readers={"qkv": layer.attention.qkv}, divide_inputs=lambda scales: scales)
    scales = search_scales(group, {"qkv": statistics}, INT4)
    assert scales[3] == scales.max() > 2 * scales.median()
    weight = layer.attention.qkv.dense_weight()
    plain = output_error(x, weight, round_to_nearest(weight, INT4).dequantize())
    scaled = output_error(x, weight, round_to_nearest(weight * scales, INT4).dequantize() / scales)
    assert scaled < 0.6 * plain


@torch.inference_mode()
def test_awq_without_statistics_scales_nothing(open_layer):
    layer, _, _ = open_layer("llama2")
    group = ScaledGroup(readers={"qkv": layer.attention.qkv}, divide_inputs=lambda scales: scales)
    assert torch.equal(search_scales(group, {}, INT4), torch.ones(64))


@torch.inference_mode()
def test_inputs_are_collected_as_the_model_makes_them(open_layer):
    layer, spec, run = open_layer("mixtral")
    names = list(quantizable_linears(layer))
    assert "mlp.router" not in names
    statistics = run.collect(layer, spec, names)
    normed = layer.attention_norm(run.hidden_WSD.flatten(0, 1))
    torch.testing.assert_close(statistics["attention.qkv"].gram_KK, normed.T @ normed, rtol=1e-3, atol=1e-2)
    visits = sum(statistics[name].num_tokens for name in statistics if name.endswith("gate_up"))
    assert visits == 2 * 4 * 40  # two experts for each token


@torch.inference_mode()
def test_windows_advance_as_the_layer_computes(open_layer):
    from aios_model.cache import ContiguousCache

    layer, spec, run = open_layer("mistral-window")
    config = type("Config", (), {"layers": (spec,)})
    expected = []
    for hidden in run.hidden_WSD:
        cache = ContiguousCache(config, max_length=40, dtype=torch.float32, device=torch.device("cpu"))
        expected.append(layer(hidden, run._rotation, cache))
    run.advance(layer, spec)
    torch.testing.assert_close(run.hidden_WSD, torch.stack(expected))
