"""Root-mean-square normalisation (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aios_model.weights.source import TensorEntry


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, the mean taken in float32 or wider."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.weight: Tensor = torch.empty(size, device="meta")

    def load(self, entry: TensorEntry, *, dtype: torch.dtype, device: torch.device) -> None:
        """Fills the weight [size]."""
        self.weight = entry.read(dtype=dtype).to(device)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return F.rms_norm(x, (self.size,), self.weight, self.eps)
