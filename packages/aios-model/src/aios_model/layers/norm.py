"""Root-mean-square normalisation (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aios_model.weights.source import TensorEntry


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, the mean taken in float32 or wider.

    Written with the vector's length, since mean(x²) = |x|² / D: five small operations where `F.rms_norm` runs nine on a
    CPU. Measured on one row of 576: 6.7 µs instead of 11.1, and it runs 61 times a token in the bundled model.
    """

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.weight: Tensor = torch.empty(size, device="meta")
        self._eps: Tensor = torch.empty((), device="meta")
        self._exact = torch.float32

    def load(self, entry: TensorEntry, *, dtype: torch.dtype, device: torch.device) -> None:
        """Fills the weight [size]."""
        self.weight = entry.read(dtype=dtype).to(device)
        self._exact = torch.promote_types(dtype, torch.float32)
        self._eps = torch.tensor(self.eps, dtype=self._exact, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self._exact)
        scale = torch.addcmul(self._eps, length, length, value=1 / self.size).rsqrt_()
        return (x * scale).to(x.dtype) * self.weight
