"""Rounding to nearest: every weight becomes the number of its grid that is closest to it.

No text is needed. Eight bits need nothing better; at four bits it is the baseline that AWQ and GPTQ are measured
against.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aios_model.config import LayerSpec
from aios_model.decoder import DecoderLayer
from aios_quant.calibrate.grid import GridSpec, find_grid
from aios_quant.calibrate.hooks import CalibrationRun, quantizable_linears
from aios_quant.quantized_tensor import Fp8Tensor, PackedWeight, QuantizedTensor
from aios_quant.schemes.base import check_finite
from aios_quant.schemes.fp8 import LARGEST


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundToNearest:
    """Quantises the Linears of a layer each by itself.

    Attributes:
        spec: The grids of integer codes; None for FP8.
        scale_dtype: What scales are rounded to.
    """

    spec: GridSpec | None
    scale_dtype: torch.dtype
    needs_inputs: bool = False

    def quantize_layer(
        self, layer: DecoderLayer, layer_spec: LayerSpec, run: CalibrationRun | None
    ) -> dict[str, PackedWeight]:
        """See `Calibrator.quantize_layer`; `run` is not looked at."""
        weights = {path: linear.dense_weight() for path, linear in quantizable_linears(layer).items()}
        return {path: self.quantize(weight) for path, weight in weights.items()}

    def quantize(self, weight_NK: Tensor) -> PackedWeight:
        """One matrix, float32 [N, K]."""
        if self.spec is None:
            return round_to_fp8(weight_NK, self.scale_dtype)
        return round_to_nearest(weight_NK, self.spec)


def round_to_nearest(weight_NK: Tensor, spec: GridSpec) -> QuantizedTensor:
    """`weight` [N, K] on the grid that fits its groups best."""
    grid = find_grid(weight_NK, spec)
    return grid.with_codes(grid.encode(weight_NK))


def round_to_fp8(weight_NK: Tensor, scale_dtype: torch.dtype) -> Fp8Tensor:
    """`weight` [N, K] in E4M3 with a scale per row that `scale_dtype` holds exactly."""
    amax = weight_NK.abs().amax(dim=1)
    check_finite(amax)
    scales = (amax / LARGEST).to(scale_dtype).float()
    check_finite(scales)
    scales = torch.where(scales == 0, 1.0, scales)
    codes = (weight_NK / scales.unsqueeze(1)).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return Fp8Tensor(codes_NK=codes.view(torch.uint8), scales_N=scales)
