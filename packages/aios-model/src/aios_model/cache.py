"""Where keys and values of earlier tokens wait: the socket, and its simplest filling.

`DecoderModel.forward` passes each layer's fresh queries, keys and values to a `KVCache`. `ContiguousCache` keeps one
sequence in one stretch of memory, which is all that `generate()` needs; aios-kvcache brings pages and many sequences.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from aios_model.config import ModelConfig
from aios_model.errors import InvalidRequestError


class KVCache(Protocol):
    """Stores keys and values, and attends over all that is stored."""

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Stores T new keys and values of `layer` and attends from T queries: -> [T, N, H]."""
        ...


class ContiguousCache:
    """Keys and values of one sequence, in one tensor per layer.

    Args:
        config: The model's.
        max_length: Tokens to reserve room for.
        dtype: Of the stored keys and values.
        device: Where they live.
    """

    def __init__(self, config: ModelConfig, *, max_length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.max_length = max_length
        self.length = 0
        self._specs = config.layers
        self._kv = [
            torch.empty(2, spec.num_key_value_heads, max_length, spec.head_dim, dtype=dtype, device=device)
            for spec in config.layers
        ]

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Appends behind the `length` stored tokens and attends causally over them and itself: -> [T, N, H]."""
        spec, kv = self._specs[layer], self._kv[layer]
        end = self.length + q_TNH.shape[0]
        if end > self.max_length:
            raise InvalidRequestError(f"the cache holds {self.max_length} tokens, {end} are needed")
        kv[0, :, self.length : end] = k_TKH.transpose(0, 1)
        kv[1, :, self.length : end] = v_TKH.transpose(0, 1)
        return causal_attention(q_TNH, kv[0, :, :end], kv[1, :, :end], scale=spec.scale, window=spec.window)

    def advance(self, num_tokens: int) -> None:
        """Counts `num_tokens` as stored, once all layers have seen them."""
        self.length += num_tokens


def causal_attention(q_TNH: Tensor, k_KSH: Tensor, v_KSH: Tensor, *, scale: float, window: int | None) -> Tensor:
    """Attention of the last T of S tokens over all S: -> [T, N, H].

    The G query heads that share a kv head are laid out as extra query rows of it, so that each key and value is read
    once for all of them and never repeated in memory.

    Args:
        q_TNH: Queries of the newest T tokens.
        k_KSH: Keys of all S tokens, those T included.
        v_KSH: Values of all S tokens.
        scale: Multiplies the products before the softmax.
        window: Query i sees key j when i - j < window; None sees all before it.
    """
    num_tokens, num_heads, head_dim = q_TNH.shape
    num_kv_heads, context = k_KSH.shape[:2]
    group = num_heads // num_kv_heads
    q = q_TNH.view(num_tokens, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    q = q.reshape(1, num_kv_heads, group * num_tokens, head_dim)
    mask = None
    if num_tokens > 1 or (window is not None and context > window):
        mask = causal_mask(num_tokens, context, window, device=q.device).repeat(group, 1)
    out = F.scaled_dot_product_attention(q, k_KSH[None], v_KSH[None], attn_mask=mask, scale=scale)
    return out.view(num_kv_heads, group, num_tokens, head_dim).permute(2, 0, 1, 3).reshape(q_TNH.shape)


def causal_mask(num_tokens: int, context: int, window: int | None, *, device: torch.device) -> Tensor:
    """[T, S] booleans: which of `context` keys each of the last `num_tokens` positions may see."""
    queries = torch.arange(context - num_tokens, context, device=device)[:, None]
    keys = torch.arange(context, device=device)
    visible = keys <= queries
    return visible if window is None else visible & (queries - keys < window)
