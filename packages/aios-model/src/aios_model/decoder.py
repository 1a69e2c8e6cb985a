"""The decoder-only transformer: tokens in, a hidden state per token out, logits for the rows that need them.

It is written for one device, keeps no cache and knows nothing of quantisation: those attach from outside, through the
cache that is passed in and the `Linear` layers that may be replaced before the weights are loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aios_model.cache import KVCache
from aios_model.config import LayerSpec, ModelConfig
from aios_model.layers.attention import Attention
from aios_model.layers.embedding import Embedding
from aios_model.layers.linear import Linear
from aios_model.layers.mlp import MLP
from aios_model.layers.moe import MixtureOfExperts
from aios_model.layers.norm import RMSNorm
from aios_model.layers.rope import RotaryEmbedding, Rotation


class DecoderModel(nn.Module):
    """Embedding, layers, norm and head of a decoder-only transformer.

    Built empty; `aios_model.model.load_model` fills it.

    Args:
        config: What the model looks like.
        context_length: Longest context that will be served, in tokens; only dynamic rope depends on it. None is the
            length the checkpoint declares.

    Attributes:
        config: What the whole model looks like.
        local_config: What of it this decoder holds, where transforms have left layers or heads to other ranks.
    """

    def __init__(self, config: ModelConfig, *, context_length: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.local_config = config
        self.context_length = context_length or config.max_position_embeddings
        self.dtype = torch.float32
        self.device = torch.device("meta")
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.rotary = RotaryEmbedding(config, context_length=self.context_length)
        self.layers = nn.ModuleList(DecoderLayer(config, spec, layer=i) for i, spec in enumerate(config.layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, cache: KVCache) -> Tensor:
        """Runs T packed tokens, of one or many sequences, through all layers.

        Args:
            tokens_T: Token ids, int64; in a later stage of a pipeline the hidden states [T, D] of the stage before.
            positions_T: Position of each token in its own sequence, int64.
            cache: Stores and attends; it knows which token belongs to which sequence.

        Returns:
            Hidden states after the last norm, [T, D]; in an earlier stage those after its last layer.
        """
        x_TD = self.embedding(tokens_T)
        rotation = self.rotary(positions_T)
        for layer in self.layers:
            x_TD = layer(x_TD, rotation, cache)
        return self.norm(x_TD)

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Scores of every token of the vocabulary, [S, V] in float32 or wider, for the S rows that sample."""
        logits_SV = self.head(hidden_SD)
        return logits_SV if logits_SV.dtype == torch.float64 else logits_SV.float()


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, *, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config, spec, layer=layer)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = _build_mlp(config, spec)

    def forward(self, x_TD: Tensor, rotation: Rotation, cache: KVCache) -> Tensor:
        """[T, D] -> [T, D]."""
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), rotation, cache)
        return x_TD + self.mlp(self.mlp_norm(x_TD))


def _build_mlp(config: ModelConfig, spec: LayerSpec) -> nn.Module:
    if not spec.moe:
        return MLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
    return MixtureOfExperts(
        config.hidden_size,
        config.moe_intermediate_size,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        norm_topk_prob=config.norm_topk_prob,
    )
