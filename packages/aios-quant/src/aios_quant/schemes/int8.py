"""INT8, one scale per output channel: w = scale * (code - 128), scale = amax / 127 (arXiv 2208.07339, section 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aios_quant.kernel import Activation
from aios_quant.quantized_tensor import QuantizedTensor
from aios_quant.schemes.base import check_finite

ZERO = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Scheme:
    """Symmetric, per channel; float32 scales, 8.06 bits a weight at K = 576.

    Attributes:
        activation: W8A8 with dynamic inputs (`a8`) or W8A16 (`a16`).
    """

    activation: Activation = "a8"
    bits: int = 8
    keeps_stored: bool = False

    @property
    def name(self) -> str:
        """`int8` or `int8-a16`."""
        return "int8" if self.activation == "a8" else "int8-a16"

    def check_shape(self, n: int, k: int) -> None:
        """Every shape fits."""

    def quantize(self, weight_NK: Tensor) -> QuantizedTensor:
        """See `QuantScheme.quantize`. Rows of zeros have scale 1."""
        weight = weight_NK.to(torch.float32)
        amax = weight.abs().amax(dim=1, keepdim=True)
        check_finite(amax)
        scales = torch.where(amax > 0, amax / 127.0, 1.0)
        codes = weight.div(scales).round_().clamp_(-127, 127).add_(ZERO).to(torch.uint8)
        return QuantizedTensor(codes_NK=codes, bits=8, zero=ZERO, group_size=codes.shape[1], scales_NG=scales)
