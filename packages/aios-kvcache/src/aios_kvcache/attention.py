"""PagedAttention in plain torch: attention over keys and values that lie scattered in pages.

Ordinary attention wants the keys of a sequence in one tensor. Here they lie in pages, in any order, wherever there was
room when the tokens came (Kwon et al. 2023, arXiv 2309.06180). Two steps bring the two together:

1. *gather*: the block table is turned into slots, and the rows of the pool at those slots are read, in the order of the
   sequence. Where the pages happen to be neighbours, a view does it without copying.
2. *attend*: torch's fused attention runs on what was read, a step for many decodes at once, padded to one length, and
   block by block for the chunk of a prompt.

Grouped-query attention needs no repetition of keys: the G = N / K query heads that share a kv head are laid out so
that they meet the same keys. For a decode they take the place of query positions; for a chunk, the place of heads.

The oracle of all attention kernels, and the path that runs where none is built. Which slots are read and what is
masked was decided once per step: see `attention_plan.py`. A kernel that reads pages in place saves step 1; measured for
16 decodes at 512 tokens of context (2 cores, 3 kv heads of 64), gathering is a quarter of the time.

Letters of shapes: T packed tokens of all sequences, B sequences, S keys, N query heads, K kv heads, G = N / K,
H head size, P slots of the pool, R what a head takes there (H, but for int8: see `stored_heads.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from aios_kvcache.attention_plan import AttentionPlan, DecodeGroup, PrefillChunk, Slots
from aios_kvcache.stored_heads import StoredHeads


def paged_attention(
    q_TNH: Tensor, keys_PKR: Tensor, values_PKR: Tensor, plan: AttentionPlan, *, scale: float, buffers: GatherBuffers
) -> Tensor:
    """Attends from T queries over what the pools hold; their own keys and values must have been written before.

    Args:
        q_TNH: Queries, in the dtype in which `buffers` reads the pools.
        keys_PKR: One layer's keys, slot by slot.
        values_PKR: One layer's values, slot by slot.
        plan: Which query sees which slot.
        scale: Multiplies the products before the softmax.
        buffers: Working memory.

    Returns:
        [T, N, H].
    """
    if len(plan.decode_groups) == 1 and not plan.prefill_chunks:  # the usual step of few sequences
        [group] = plan.decode_groups
        k, v = buffers.read(keys_PKR, values_PKR, group.slots)
        return _attend_decodes(q_TNH, k, v, group, scale=scale)
    out_TNH = q_TNH.new_empty(q_TNH.shape)
    for group in plan.decode_groups:
        k, v = buffers.read(keys_PKR, values_PKR, group.slots)
        out_TNH[group.rows] = _attend_decodes(q_TNH[group.rows], k, v, group, scale=scale)
    for chunk in plan.prefill_chunks:
        k, v = buffers.read(keys_PKR, values_PKR, chunk.slots)
        _attend_chunk(q_TNH, k, v, chunk, scale=scale, out_TNH=out_TNH)
    return out_TNH


def _attend_decodes(q_BNH: Tensor, k_LKH: Tensor, v_LKH: Tensor, group: DecodeGroup, *, scale: float) -> Tensor:
    """One query per sequence over L = B * S keys: -> [B, N, H].

    The G query heads of a kv head stand where positions usually do.
    """
    batch, num_heads, head_dim = q_BNH.shape
    num_kv_heads = k_LKH.shape[1]
    q_BKGH = q_BNH.view(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    k_BKSH = k_LKH.view(batch, group.num_keys, num_kv_heads, head_dim).transpose(1, 2)
    v_BKSH = v_LKH.view(batch, group.num_keys, num_kv_heads, head_dim).transpose(1, 2)
    out_BKGH = scaled_dot_product_attention(q_BKGH, k_BKSH, v_BKSH, attn_mask=group.mask, scale=scale)
    return out_BKGH.reshape(batch, num_heads, head_dim)


def _attend_chunk(
    q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, chunk: PrefillChunk, *, scale: float, out_TNH: Tensor
) -> None:
    """Many queries of one sequence, a block at a time: each block reads no key behind its last query.

    The kv heads stand where sequences usually do, so that the G heads of each can share its keys by a stride of 0.
    """
    num_kv_heads = k_SKH.shape[1]
    group = q_TNH.shape[1] // num_kv_heads
    for block in chunk.query_blocks:
        q_KGTH = q_TNH[block.rows].unflatten(1, (num_kv_heads, group)).permute(1, 2, 0, 3)
        k_KGSH = k_SKH[block.keys].transpose(0, 1)[:, None].expand(-1, group, -1, -1)
        v_KGSH = v_SKH[block.keys].transpose(0, 1)[:, None].expand(-1, group, -1, -1)
        mask = block.mask
        if mask is not None and not mask.is_cpu:
            mask = mask.contiguous()  # CUDA's memory-efficient kernel wants aligned rows, a corner has none
        out_KGTH = scaled_dot_product_attention(q_KGTH, k_KGSH, v_KGSH, attn_mask=mask, scale=scale)
        out_TNH[block.rows] = out_KGTH.permute(2, 0, 1, 3).flatten(1, 2)


class GatherBuffers:
    """Where gathered keys and values are put. Kept, since fresh memory costs more than the copying.

    Measured for 8,192 keys of 8 heads of 128 in float32: 1.6 ms into a kept buffer, 12 ms into a new one.

    Args:
        heads: How the pools keep them.
        device: Of the pools.
    """

    def __init__(self, *, heads: StoredHeads, device: torch.device) -> None:
        self._heads = heads
        self._keys = torch.empty(0, dtype=heads.dtype, device=device)
        self._values = torch.empty(0, dtype=heads.dtype, device=device)

    def read(self, keys_PKR: Tensor, values_PKR: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """Keys and values at `slots`, [S, K, H] each, as attention takes them; valid until the next call."""
        stored_SKR = self._gather(keys_PKR, values_PKR, slots)
        return self._heads.read(stored_SKR[0]), self._heads.read(stored_SKR[1])

    def _gather(self, keys_PKR: Tensor, values_PKR: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        if isinstance(slots, slice):
            return keys_PKR[slots], values_PKR[slots]
        needed = slots.numel() * keys_PKR[0].numel()
        if needed > self._keys.numel():
            with torch.inference_mode(False):  # or it could not be written outside of inference mode
                self._keys, self._values = self._keys.new_empty(needed), self._values.new_empty(needed)
        return _gather(keys_PKR, slots, self._keys[:needed]), _gather(values_PKR, slots, self._values[:needed])


def _gather(pool_PKR: Tensor, slots_S: Tensor, buffer: Tensor) -> Tensor:
    out = buffer.view(slots_S.numel(), -1)
    torch.index_select(pool_PKR.flatten(1), 0, slots_S, out=out)
    return out.unflatten(1, pool_PKR.shape[1:])
