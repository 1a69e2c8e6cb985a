"""A mixture of experts: a router sends each token to a few of many small MLPs (arXiv 1701.06538, 2401.04088)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from aios_model.layers.linear import Linear
from aios_model.layers.mlp import MLP


class MixtureOfExperts(nn.Module):
    """Weighs the outputs of the `num_experts_per_tok` experts that the router likes best.

    Args:
        hidden_size: D.
        intermediate_size: Width of one expert.
        num_experts: E.
        num_experts_per_tok: Experts each token visits.
        norm_topk_prob: Whether the visited experts' weights are rescaled to sum to one.

    Attributes:
        held_experts: Those that this rank computes; the others' share of the output is left out.
        on_routed: Told how many of a step's tokens each expert got, if anybody wants to know.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_experts: int,
        num_experts_per_tok: int,
        norm_topk_prob: bool,
    ) -> None:
        super().__init__()
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.router = Linear(hidden_size, num_experts)
        self.experts = nn.ModuleList(MLP(hidden_size, intermediate_size) for _ in range(num_experts))
        self.held_experts = range(num_experts)
        self.on_routed: Callable[[list[int]], None] | None = None

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]. Tokens are sorted by expert, so that each expert runs once over its own."""
        weights, experts = self._route(x_TD)
        order = experts.flatten().argsort(stable=True)
        tokens = order // self.num_experts_per_tok
        counts = torch.bincount(experts.flatten(), minlength=len(self.experts)).tolist()
        scale = weights.flatten()[order, None]
        out = torch.zeros_like(x_TD)
        start = 0
        for index, count in enumerate(counts):
            mine = slice(start, start + count)
            if count and index in self.held_experts:
                out.index_add_(0, tokens[mine], self.experts[index](x_TD[tokens[mine]]) * scale[mine])
            start += count
        if self.on_routed is not None:
            self.on_routed(counts)
        return out

    def _route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices of the chosen experts, both [T, num_experts_per_tok]."""
        logits_TE = self.router(x_TD)
        probabilities_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        weights, experts = probabilities_TE.topk(self.num_experts_per_tok, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(x_TD.dtype), experts
