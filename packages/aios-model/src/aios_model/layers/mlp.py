"""The gated feed-forward block, SwiGLU (arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from aios_model.layers.linear import Linear


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.intermediate_size = intermediate_size
        self.gate_up = Linear(hidden_size, {"gate": intermediate_size, "up": intermediate_size}, bias=bias)
        self.down = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        gate_up_T2F = self.gate_up(x_TD)
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        return self.down(F.silu(gate_TF) * up_TF)
