"""The native layout and its rounding in plain torch: the oracle of the kernels' tests, and a second way to read them.

Legend: X pages, C tokens per page, K kv heads, N query heads, G of them per kv head, H head size, W value width,
T newest of S tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aios_kvcache.layout import LANES, KvDtype
from aios_kvcache.stored_heads import quantize_heads, round_to_fp8
from aios_model.cache import causal_mask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_kvcache.native.native_cache import NativeLayer

CODE_OFFSET = 128
"""Added to the codes of int8 keys, which are kept unsigned."""

SEGMENT = 256
"""Tokens of the context, at fixed positions, whose weights are rounded together."""

LARGEST_WEIGHT = 65535.0


def round_as_stored(x: Tensor, dtype: KvDtype) -> Tensor:
    """What float32 [..., H] reads as once it has been in a page: float32."""
    if dtype == "int8":
        return quantize_heads(x).dequantize()
    if dtype == "fp8":
        return round_to_fp8(x).float()
    return x.to(torch.bfloat16).float() if dtype == "bfloat16" else x


def attend_codes(q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, *, scale: float, window: int | None) -> Tensor:
    """Causal attention over int8 pages with every rounding that the kernels do on purpose; all else is float64.

    Queries are rounded as keys are. Within a segment, a row's weights times the values' scales are rounded to multiples
    of 1/65535 of the largest.

    Args:
        q_TNH: Queries of the newest T tokens, float32.
        k_SKH: Keys of all tokens before they are rounded, float32.
        v_SKH: Values, likewise.
        scale: Multiplies the products before the softmax.
        window: Query i sees key j when i - j < window; None sees all before it.

    Returns:
        float64 [T, N, H].
    """
    group = q_TNH.shape[1] // k_SKH.shape[1]
    q, k, v = (quantize_heads(x) for x in (q_TNH, k_SKH, v_SKH))
    keys, values = (x.codes.double().repeat_interleave(group, dim=1) for x in (k, v))
    key_scales, value_scales = (x.scales.double().repeat_interleave(group, dim=1).T for x in (k, v))
    products_NTS = torch.einsum("tnh,snh->nts", q.codes.double(), keys)
    scores_NTS = products_NTS * key_scales[:, None] * q.scales.double().T[..., None] * scale
    mask_TS = causal_mask(len(q_TNH), len(k_SKH), window, device=q_TNH.device)
    scores_NTS = scores_NTS.masked_fill(~mask_TS, -torch.inf)
    weights_NTS = (scores_NTS - scores_NTS.amax(-1, keepdim=True)).exp()
    total_NTH = torch.zeros_like(q_TNH, dtype=torch.float64).transpose(0, 1)
    for start in range(0, len(k_SKH), SEGMENT):
        here = slice(start, start + SEGMENT)
        scaled_NTS = weights_NTS[..., here] * value_scales[:, None, here]
        unit_NT1 = scaled_NTS.amax(-1, keepdim=True).clamp(min=1e-300) / LARGEST_WEIGHT
        total_NTH = total_NTH + unit_NT1 * torch.einsum("nts,snh->nth", (scaled_NTS / unit_NT1).round(), values[here])
    return (total_NTH / weights_NTS.sum(-1, keepdim=True)).transpose(0, 1)


def read_keys(layer: NativeLayer, block_table: Sequence[int], num_tokens: int) -> Tensor:
    """A sequence's keys out of their pages: float32 [S, K, H]."""
    pages = _as_numbers(layer, layer.keys[list(block_table)]).float()
    if layer.dtype == "int8":
        pages = pages - CODE_OFFSET
    if pages.dim() == 6:  # pairs [W, K, C/16, H/2, 16, 2], or fours -> [W, K, C/16, H, 16]
        pages = pages.movedim(-1, -2).flatten(3, 4)[..., : layer.kv_pool.head_dim, :]
    tokens = pages.movedim(-1, -2).flatten(2, 3).transpose(1, 2).flatten(0, 1)
    if layer.key_scales is not None:
        tokens = tokens * _read_scales(layer.key_scales, block_table)
    return tokens[:num_tokens]


def read_values(layer: NativeLayer, block_table: Sequence[int], num_tokens: int) -> Tensor:
    """A sequence's values out of their pages: float32 [S, K, W]; W >= H, zeros behind H."""
    pages = _as_numbers(layer, layer.values[list(block_table)])
    if pages.dtype == torch.bfloat16:
        pages = unpair_values(pages)
    elif pages.dtype == torch.int8:  # fours [X, K, C/4, W, 4] -> [X, K, C, W]
        pages = pages.movedim(-1, -2).flatten(2, 3)
    tokens = pages.float().transpose(1, 2).flatten(0, 1)
    if layer.value_scales is not None:
        tokens = tokens * _read_scales(layer.value_scales, block_table)
    return tokens[:num_tokens]


def unpair_values(values: Tensor) -> Tensor:
    """[..., W] as bfloat16 pages keep it, 0 16 1 17 …, put back into the order of the head."""
    paired = values.shape[-1] // (2 * LANES) * 2 * LANES
    whole = values[..., :paired].unflatten(-1, (-1, LANES, 2)).transpose(-1, -2).flatten(-3)
    return torch.cat([whole, values[..., paired:]], dim=-1)


def _as_numbers(layer: NativeLayer, pages: Tensor) -> Tensor:
    return pages.view(torch.float8_e4m3fn) if layer.dtype == "fp8" else pages


def _read_scales(scales_XKC: Tensor, block_table: Sequence[int]) -> Tensor:
    return scales_XKC[list(block_table)].transpose(1, 2).flatten(0, 1)[..., None]
