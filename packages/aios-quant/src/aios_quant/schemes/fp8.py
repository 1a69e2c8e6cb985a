"""FP8 (E4M3, arXiv 2209.05433), one scale per output channel: w = scale * e4m3, scale = amax / 448."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aios_quant.kernel import Activation
from aios_quant.quantized_tensor import Fp8Tensor
from aios_quant.schemes.base import check_finite

LARGEST = 448.0
"""Largest magnitude of E4M3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Scheme:
    """Floating codes; the inputs stay floats."""

    name: str = "fp8"
    bits: int = 8
    activation: Activation = "a16"
    keeps_stored: bool = False

    def check_shape(self, n: int, k: int) -> None:
        """Every shape fits."""

    def quantize(self, weight_NK: Tensor) -> Fp8Tensor:
        """See `QuantScheme.quantize`. Rows of zeros have scale 1."""
        weight = weight_NK.to(torch.float32)
        amax = weight.abs().amax(dim=1)
        check_finite(amax)
        scales = torch.where(amax > 0, amax / LARGEST, 1.0)
        # Beyond the largest magnitude, which rounding of the quotient may reach, E4M3 has only NaN.
        codes = weight.div(scales.unsqueeze(1)).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return Fp8Tensor(codes_NK=codes.view(torch.uint8), scales_N=scales)
