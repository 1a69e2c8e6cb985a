"""Self-attention over a cache: project, normalise, rotate, attend, project back.

The layer does not know where keys and values live. It hands them to the cache, which stores them and attends; that is
the socket into which paged caches plug.
"""

from __future__ import annotations

from torch import Tensor, nn

from aios_model.cache import KVCache
from aios_model.config import LayerSpec, ModelConfig
from aios_model.layers.linear import Linear
from aios_model.layers.norm import RMSNorm
from aios_model.layers.rope import Rotation


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) of one layer.

    Args:
        config: The model's.
        spec: This layer's.
        layer: Its global index, by which the cache knows it.
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec, *, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_query_heads = config.num_attention_heads
        self.num_kv_heads = spec.num_key_value_heads
        self.head_dim = spec.head_dim
        query_width, kv_width = self.num_query_heads * self.head_dim, self.num_kv_heads * self.head_dim
        parts = {"q": query_width, "k": kv_width, "v": kv_width}
        self.qkv = Linear(config.hidden_size, parts, bias=config.qkv_bias)
        self.output = Linear(query_width, config.hidden_size, bias=config.output_bias)
        self.query_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x_TD: Tensor, rotation: Rotation, cache: KVCache) -> Tensor:
        """[T, D] -> [T, D]; the tokens' keys and values are in `cache` afterwards."""
        heads = self.qkv(x_TD).view(x_TD.shape[0], -1, self.head_dim)
        qk_heads, v_TKH = heads.split((self.num_query_heads + self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            q_TNH, k_TKH = qk_heads.split((self.num_query_heads, self.num_kv_heads), dim=1)
            q_TNH, k_TKH = rotation.apply(self.query_norm(q_TNH)), rotation.apply(self.key_norm(k_TKH))
        else:
            q_TNH, k_TKH = rotation.apply(qk_heads).split((self.num_query_heads, self.num_kv_heads), dim=1)
        attended_TNH = cache.attend(self.layer, q_TNH, k_TKH, v_TKH)
        return self.output(attended_TNH.reshape(x_TD.shape[0], -1))
