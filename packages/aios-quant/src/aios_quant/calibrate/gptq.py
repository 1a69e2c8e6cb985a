"""GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded one after the other, each makes up for those before it.

The output error of a row w is (w - q) H (w - q)ᵀ with the Hessian H = Σ x xᵀ over the inputs. Rounding column j leaves
an error that the columns still to come can absorb; the best way to do so follows from the Cholesky factor U of H⁻¹
(section 3.3, step 3 of the paper):

    e = (w_j - q_j) / U_jj;   w_k -= e * U_jk   for all k > j

Updates reach the rest of the matrix once per block of 128 columns (step 2, lazy batches). A share of the mean diagonal
is added to H, so that directions that the text never visited do not blow up (step 3, damping).

Columns with the largest inputs go first, while there are still many columns to absorb their error (the authors' code
calls it act-order). Their groups stay where they are, with grids chosen beforehand, so the checkpoint is a plain one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aios_model.config import LayerSpec
from aios_model.decoder import DecoderLayer
from aios_quant.calibrate.grid import Grid, GridSpec, find_grid
from aios_quant.calibrate.hooks import CalibrationRun, InputStatistics, quantizable_linears
from aios_quant.quantized_tensor import PackedWeight, QuantizedTensor

BLOCK = 128
# The paper takes 0.01, with 262,144 tokens. With the 5,632 of our own text, 0.05 left less divergence (0.172 instead of
# 0.182 nats, bundled model, groups of 64).
DAMPING = 0.05

# Wider Hessians are factorised in float32: four of them at once, as float64, would outweigh the layer.
_EXACT_COLUMNS = 4096

# Linears in the order in which a layer uses them: each is fed by those before it, already rounded.
_STAGES = ("qkv", "output", "gate_up", "down")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """Quantises a layer stage by stage; every stage sees what the rounded ones before it make of the text.

    Attributes:
        spec: The grids.
        damping: Share of the mean diagonal added to the Hessian.
    """

    spec: GridSpec
    damping: float = DAMPING
    needs_inputs: bool = True

    def quantize_layer(
        self, layer: DecoderLayer, layer_spec: LayerSpec, run: CalibrationRun | None
    ) -> dict[str, PackedWeight]:
        """See `Calibrator.quantize_layer`."""
        assert run is not None, "GPTQ needs inputs"
        linears = quantizable_linears(layer)
        packed: dict[str, PackedWeight] = {}
        for stage in _STAGES:
            paths = [path for path in linears if path.endswith(stage)]
            statistics = run.collect(layer, layer_spec, paths)
            for path in paths:
                weight = linears[path].dense_weight()
                packed[path] = gptq(weight, statistics.get(path), self.spec, damping=self.damping)
                linears[path].set_weight(packed[path].dequantize())
        return packed


def gptq(
    weight_NK: Tensor, statistics: InputStatistics | None, spec: GridSpec, *, damping: float = DAMPING
) -> QuantizedTensor:
    """Rounds a matrix so that its output on the inputs of `statistics` changes little.

    Args:
        weight_NK: float32 [N, K].
        statistics: Of its inputs; None for an expert that no token was sent to, which is rounded to nearest.
        spec: The grids.
        damping: As for `Gptq`.
    """
    gram_KK = None if statistics is None else statistics.gram_KK / max(1, statistics.num_tokens)
    grid = find_grid(weight_NK, spec, search=spec.bits < 8, gram_KK=gram_KK)
    if gram_KK is None:
        return grid.with_codes(grid.encode(weight_NK))
    order_K = gram_KK.diagonal().argsort(descending=True, stable=True)
    factor_KK = inverse_factor(gram_KK[order_K][:, order_K], damping=damping)
    codes_KN = _round_columns(weight_NK.T[order_K], factor_KK, grid, order_K)
    in_place = torch.empty_like(codes_KN)
    in_place[order_K] = codes_KN
    return grid.with_codes(in_place.T.contiguous())


def inverse_factor(gram_KK: Tensor, *, damping: float) -> Tensor:
    """The upper Cholesky factor U of the damped H⁻¹ = Uᵀ U, float32 [K, K].

    Where the text has fewer independent tokens than columns, rounding may leave H indefinite even so: then it is
    damped ten times as much, as often as needed. A diagonal alone always works.
    """
    mean = float(gram_KK.diagonal().mean()) or 1.0
    exact = torch.float64 if len(gram_KK) <= _EXACT_COLUMNS else torch.float32
    identity = torch.eye(len(gram_KK), dtype=exact, device=gram_KK.device)
    for _ in range(8):
        factor, failed = torch.linalg.cholesky_ex(gram_KK.to(exact) + damping * mean * identity)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return upper.float()
        damping *= 10
    return identity.float()


def _round_columns(weight_KN: Tensor, factor_KK: Tensor, grid: Grid, order_K: Tensor) -> Tensor:
    """The codes, uint8 [K, N], of a weight whose columns lie in the order in which they are rounded; it is used up.

    Columns are rows here: what is read and written at each step then lies together.
    """
    num_columns = len(weight_KN)
    groups_K = order_K // (num_columns // grid.scales_NG.shape[1])
    codes_KN = torch.empty(weight_KN.shape, dtype=torch.uint8, device=weight_KN.device)
    for start in range(0, num_columns, BLOCK):
        block = slice(start, min(start + BLOCK, num_columns))
        weight_BN, factor_BB = weight_KN[block], factor_KK[block, block]
        scales_BN = grid.scales_NG.T[groups_K[block]]
        points_BN = grid.zero_points_NG.T[groups_K[block]]
        errors_BN = torch.empty_like(weight_BN)
        for j, divisor in enumerate(factor_BB.diagonal().tolist()):
            code = (weight_BN[j] / scales_BN[j]).round_().add_(points_BN[j]).clamp_(0, grid.spec.num_codes - 1)
            codes_KN[start + j] = code
            rounded = code.sub_(points_BN[j]).mul_(scales_BN[j])
            torch.sub(weight_BN[j], rounded, out=errors_BN[j]).div_(divisor)
            weight_BN[j + 1 :].addr_(factor_BB[j, j + 1 :], errors_BN[j], alpha=-1)
        weight_KN[block.stop :].addmm_(factor_KK[block, block.stop :].T, errors_BN, alpha=-1)
    return codes_KN
