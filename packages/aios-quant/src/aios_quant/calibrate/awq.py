"""AWQ (Lin et al., arXiv 2306.00978): columns that see large inputs are scaled up before they are rounded.

Multiplying column k of a weight by s_k > 1 and dividing its input by s_k changes nothing, but the rounding error of
that column is divided by s_k too (section 3.2, equation 2). Which columns matter is read off the inputs: s = mean|x|^α,
and α is searched over twenty values from 0 (nothing is scaled) to 1 for the smallest output error (equation 5).

The inputs need no division while the model runs: it is folded into what makes them, once for all Linears they feed.

    qkv       ← the norm in front of attention
    output    ← the rows of v; query heads that share a kv head share its scales
    gate_up   ← the norm in front of the MLP (a mixture's router, which also reads it, is multiplied and not rounded)
    down      ← the rows of up: silu(gate) * up is linear in up

So the result is a plain checkpoint. Finally each group's grid may be narrowed (the authors' code calls it clipping), or
GPTQ chooses the codes of the scaled weights: the two see different errors, and together they leave less than either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aios_model.config import LayerSpec
from aios_model.decoder import DecoderLayer
from aios_model.layers.linear import Linear
from aios_model.layers.mlp import MLP
from aios_model.layers.moe import MixtureOfExperts
from aios_model.layers.norm import RMSNorm
from aios_quant.calibrate.gptq import gptq
from aios_quant.calibrate.grid import GridSpec, find_grid
from aios_quant.calibrate.hooks import CalibrationRun, InputStatistics, quantizable_linears
from aios_quant.quantized_tensor import PackedWeight

NUM_ALPHAS = 20

# Rows whose error is compared, at most, per Linear: the best α of a sample is that of the whole.
_SAMPLED_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq:
    """Scales the columns of a layer, folds the scales away, and rounds to nearest.

    Attributes:
        spec: The grids.
        stored_dtype: What norms are stored in; scales make up for its rounding.
        compensate: Whether GPTQ chooses the codes, instead of rounding to nearest.
    """

    spec: GridSpec
    stored_dtype: torch.dtype
    compensate: bool = False
    needs_inputs: bool = True

    def quantize_layer(
        self, layer: DecoderLayer, layer_spec: LayerSpec, run: CalibrationRun | None
    ) -> dict[str, PackedWeight]:
        """See `Calibrator.quantize_layer`."""
        assert run is not None, "AWQ needs inputs"
        linears = quantizable_linears(layer)
        statistics = run.collect(layer, layer_spec, list(linears))
        for group in scaled_groups(layer, layer_spec, self.stored_dtype):
            scales_K = search_scales(group, statistics, self.spec)
            effective_K = group.divide_inputs(scales_K)
            for path, linear in group.readers.items():
                linear.set_weight(linear.dense_weight() * effective_K)
                if path in statistics:
                    statistics[path] = _divided(statistics[path], effective_K)
        return {path: self._round(linear, statistics.get(path)) for path, linear in linears.items()}

    def _round(self, linear: Linear, statistics: InputStatistics | None) -> PackedWeight:
        weight = linear.dense_weight()
        if self.compensate:
            return gptq(weight, statistics, self.spec)
        gram_KK = None if statistics is None else statistics.gram_KK / max(1, statistics.num_tokens)
        grid = find_grid(weight, self.spec, search=self.spec.bits < 8, gram_KK=gram_KK)
        return grid.with_codes(grid.encode(weight))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledGroup:
    """Linears that read the same inputs, and what makes these.

    Attributes:
        readers: By their path in the layer; all must be multiplied.
        divide_inputs: Divides the inputs by scales [K] and returns the scales that took effect, which rounding of what
            stores them may have changed a little.
        shared: Brings magnitudes [K] to one value for columns that cannot be scaled apart.
    """

    readers: dict[str, Linear]
    divide_inputs: Callable[[Tensor], Tensor]
    shared: Callable[[Tensor], Tensor] = lambda magnitudes_K: magnitudes_K


def scaled_groups(layer: DecoderLayer, spec: LayerSpec, stored_dtype: torch.dtype) -> Iterator[ScaledGroup]:
    """The groups of a layer, in the order in which inputs flow."""
    attention, mlp = layer.attention, layer.mlp
    yield ScaledGroup(
        readers={"attention.qkv": attention.qkv}, divide_inputs=_norm_divider(layer.attention_norm, stored_dtype)
    )
    heads = _HeadSharing(num_kv_heads=spec.num_key_value_heads, head_dim=spec.head_dim)
    yield ScaledGroup(
        readers={"attention.output": attention.output},
        divide_inputs=lambda scales_K: heads.divide_values(attention.qkv, scales_K),
        shared=heads.mean_over_group,
    )
    readers = {path: linear for path, linear in _linears(mlp) if not path.endswith("down")}
    yield ScaledGroup(readers=readers, divide_inputs=_norm_divider(layer.mlp_norm, stored_dtype))
    for path, expert in _mlps(mlp):
        yield ScaledGroup(readers={f"{path}.down": expert.down}, divide_inputs=_up_divider(expert))


def search_scales(group: ScaledGroup, statistics: dict[str, InputStatistics], spec: GridSpec) -> Tensor:
    """The scales [K] with the smallest output error, over α from 0 to 0.95.

    Args:
        group: Whose weights are scaled.
        statistics: Of inputs, by path; readers without (a router, an unvisited expert) have no say.
        spec: The grids that weights are rounded to.
    """
    weights = {path: linear.dense_weight() for path, linear in group.readers.items()}
    seen = [(_sample(weights[path]), statistics[path]) for path in weights if path in statistics]
    unscaled_K = torch.ones_like(next(iter(weights.values()))[0])
    best_K, least = unscaled_K, float("inf")
    total_K = sum((each.total_abs_K for _, each in seen), torch.zeros_like(unscaled_K))
    magnitude_K = group.shared(total_K / max(1, sum(each.num_tokens for _, each in seen)))
    for step in range(NUM_ALPHAS if seen else 0):
        scales_K = _scales(magnitude_K, step / NUM_ALPHAS)
        error = sum(_output_error(weight, each.gram_KK, scales_K, spec) for weight, each in seen)
        if error < least:
            best_K, least = scales_K, error
    return best_K


def _scales(magnitude_K: Tensor, alpha: float) -> Tensor:
    """s = magnitude^α, with 1 in the middle of their range. Columns without inputs stay as they are."""
    powers = magnitude_K.clamp(min=1e-4 * float(magnitude_K.max()) or 1.0).pow(alpha)
    return powers / (powers.max() * powers.min()).sqrt()


def _output_error(weight_NK: Tensor, gram_KK: Tensor, scales_K: Tensor, spec: GridSpec) -> float:
    scaled = weight_NK * scales_K
    delta = find_grid(scaled, spec).round(scaled).div_(scales_K).sub_(weight_NK)
    return float((delta @ gram_KK).mul_(delta).sum())


def _sample(weight_NK: Tensor) -> Tensor:
    """Evenly spaced rows."""
    return weight_NK[:: -(-len(weight_NK) // _SAMPLED_ROWS)]


def _divided(statistics: InputStatistics, scales_K: Tensor) -> InputStatistics:
    """Of the inputs divided by `scales_K`."""
    divided = InputStatistics(0, scales_K.device)
    divided.gram_KK = statistics.gram_KK / scales_K / scales_K[:, None]
    divided.total_abs_K = statistics.total_abs_K / scales_K
    divided.num_tokens = statistics.num_tokens
    return divided


def _norm_divider(norm: RMSNorm, stored_dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def divide(scales_K: Tensor) -> Tensor:
        stored = (norm.weight / scales_K).to(stored_dtype).to(norm.weight.dtype)
        usable = torch.isfinite(stored) & (stored != 0)
        before, norm.weight = norm.weight, torch.where(usable, stored, norm.weight)
        return torch.where(usable, before / stored, 1.0)

    return divide


def _up_divider(mlp: MLP) -> Callable[[Tensor], Tensor]:
    return lambda scales_K: _divide_rows(mlp.gate_up, mlp.gate_up.parts["gate"], scales_K)


def _divide_rows(linear: Linear, start: int, scales_R: Tensor) -> Tensor:
    """Divides the rows (and biases) from `start` on, one by each scale."""
    weight, rows = linear.dense_weight().clone(), slice(start, start + len(scales_R))
    weight[rows] /= scales_R[:, None]
    linear.set_weight(weight)
    if linear.bias is not None:
        linear.bias[rows] /= scales_R
    return scales_R


@dataclass(frozen=True, slots=True, kw_only=True)
class _HeadSharing:
    """Query heads n of the attention's output, of which several read the values of one kv head."""

    num_kv_heads: int
    head_dim: int

    def mean_over_group(self, magnitudes_K: Tensor) -> Tensor:
        by_head = magnitudes_K.view(self.num_kv_heads, -1, self.head_dim)
        return by_head.mean(dim=1, keepdim=True).expand(by_head.shape).reshape(-1)

    def divide_values(self, qkv: Linear, scales_K: Tensor) -> Tensor:
        by_kv_head = scales_K.view(self.num_kv_heads, -1, self.head_dim)[:, 0].reshape(-1)
        _divide_rows(qkv, qkv.parts["q"] + qkv.parts["k"], by_kv_head)
        return scales_K


def _mlps(mlp: torch.nn.Module) -> Sequence[tuple[str, MLP]]:
    if isinstance(mlp, MixtureOfExperts):
        return [(f"mlp.experts.{i}", expert) for i, expert in enumerate(mlp.experts) if isinstance(expert, MLP)]
    assert isinstance(mlp, MLP), "an MLP or a mixture of them"
    return [("mlp", mlp)]


def _linears(mlp: torch.nn.Module) -> list[tuple[str, Linear]]:
    """All Linears of a block, the router too."""
    return [(f"mlp.{path}", module) for path, module in mlp.named_modules() if isinstance(module, Linear)]
