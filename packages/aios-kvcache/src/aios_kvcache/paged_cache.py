"""The pages themselves: one pool per layer, bound to one step's batch at a time.

The block manager decides which page holds what; this file holds the numbers. It fills the socket
`aios_model.cache.KVCache`: a decoder calls `attend` and does not know that there are pages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aios_kvcache.attention import GatherBuffers, paged_attention
from aios_kvcache.attention_plan import AttentionPlan, AttentionPlanner, SequenceSlice, Slots, write_slots
from aios_kvcache.block import BlockCopy, independent_waves
from aios_kvcache.layout import KEY, VALUE, pool_shape
from aios_kvcache.pool_memory import allocate_pool
from aios_kvcache.stored_heads import stored_heads
from aios_model.config import LayerSpec, ModelConfig
from aios_model.errors import UnsupportedModelError
from aios_model.transfers import upload

__all__ = ["PagedKVCache", "SequenceSlice"]

CPU_GROUP_BYTES = 2 << 20
"""Keys that a group of decodes reads at once on a CPU: what was gathered should still be in its cache when attended.

Measured for 16 decodes over 512 and over 2,048 tokens (9 heads of 64, float32, one thread of an AMD EPYC with 1 MB of
second-level cache): 3.2 and 13.7 ms in groups of 2 MB, 6.1 and 19.2 in groups of 8, 4.4 and 18.8 in one group."""

DEVICE_GROUP_BYTES = 256 << 20
"""The same on a GPU, where large groups are good and only memory bounds them."""


class PagedKVCache:
    """Keys and values of many sequences, in pages 1..`num_blocks` of every layer's pool; see `layout.py`.

    On a CPU the pools are reserved but not backed: a page takes memory when it is first written.

    Args:
        config: The model's.
        num_blocks: Pages to hand out; the null page comes on top.
        block_size: Tokens per page.
        dtype: Of keys, values and queries as they come, and of the attention.
        device: Where the pages live.
        kv_dtype: How keys and values are kept: a floating dtype, int8 with a scale per token and head, or
            float8_e4m3fn; None for `dtype`.

    Attributes:
        pools: [2, X, C, K, R] of each layer; R is what a head takes, H but for int8: see `stored_heads.py`.

    Raises:
        UnsupportedModelError: A layer keeps something else than keys and values.
        PoolTooSmallError: The operating system refuses to reserve that much.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.kv_dtype = kv_dtype or dtype
        self.device = torch.device(device)
        self._heads = stored_heads(self.kv_dtype, computed=dtype)
        self._specs = config.layers
        for index, spec in enumerate(self._specs):
            if spec.kind != "attention":
                raise UnsupportedModelError(f"layer {index} is of kind {spec.kind!r}, which keeps no pages")
        self.pools = [self._allocate(spec) for spec in self._specs]
        self._keys = [pool[KEY].flatten(0, 1) for pool in self.pools]
        self._values = [pool[VALUE].flatten(0, 1) for pool in self.pools]
        self._buffers = GatherBuffers(heads=self._heads, device=self.device)
        self._planners = {window: self._planner(window) for window in {None, *(spec.window for spec in self._specs)}}
        self._plans: dict[int | None, AttentionPlan] = {}
        self._slots_T: Slots = slice(0, 0)
        self._num_tokens = 0

    @property
    def num_bytes(self) -> int:
        """Bytes reserved for keys and values, null page included."""
        return sum(pool.nbytes for pool in self.pools)

    @property
    def page_tensors(self) -> list[Tensor]:
        """Keys and values of every layer, [X, C, K, H] each: what a page consists of, for whoever moves pages."""
        return [pool[which] for pool in self.pools for which in (KEY, VALUE)]

    def bind(self, batch: Sequence[SequenceSlice]) -> None:
        """Prepares `attend` for a step whose T tokens are those of `batch`, packed in its order.

        Raises:
            ValueError: A slice is empty, or its block table has no room for its tokens.
        """
        for piece in batch:
            if piece.length < 1 or piece.start < 0 or piece.end > len(piece.block_table) * self.block_size:
                raise ValueError(
                    f"tokens [{piece.start}, {piece.end}) are none, or more than "
                    f"{len(piece.block_table)} pages of {self.block_size} hold"
                )
        self._slots_T = write_slots(batch, block_size=self.block_size, device=self.device)
        self._num_tokens = sum(piece.length for piece in batch)
        self._plans = self._plan(batch)

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Writes the new tokens' keys and values, then attends over what is stored, the new tokens included.

        Args:
            layer: Index of the layer.
            q_TNH: Queries of the bound batch's T tokens, after the rotary embedding.
            k_TKH: Their keys, after the rotary embedding.
            v_TKH: Their values.

        Returns:
            [T, N, H].
        """
        keys_PKR, values_PKR, spec = self._keys[layer], self._values[layer], self._specs[layer]
        assert len(q_TNH) == self._num_tokens, f"{self._num_tokens} tokens are bound, {len(q_TNH)} came"
        _write(keys_PKR, self._slots_T, self._heads.store(k_TKH))
        _write(values_PKR, self._slots_T, self._heads.store(v_TKH))
        plan = self._plans[spec.window]
        return paged_attention(q_TNH, keys_PKR, values_PKR, plan, scale=spec.scale, buffers=self._buffers)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copies whole pages in every layer, as if one after the other."""
        for wave in independent_waves(copies):
            sources = upload([copy.source for copy in wave], dtype=torch.int64, device=self.device)
            destinations = upload([copy.destination for copy in wave], dtype=torch.int64, device=self.device)
            for pool in self.pools:
                pool.index_copy_(1, destinations, pool.index_select(1, sources))

    def _allocate(self, spec: LayerSpec) -> Tensor:
        shape = pool_shape(spec, num_blocks=self.num_blocks, block_size=self.block_size)
        shape = (*shape[:-1], self._heads.width(spec.head_dim))
        return allocate_pool(shape, dtype=self._heads.dtype, device=self.device)

    def _planner(self, window: int | None) -> AttentionPlanner:
        widest = max(_bytes_per_key(spec, self.dtype) for spec in self._specs if window in (None, spec.window))
        group_bytes = CPU_GROUP_BYTES if self.device.type == "cpu" else DEVICE_GROUP_BYTES
        return AttentionPlanner(
            block_size=self.block_size,
            window=window,
            max_group_keys=group_bytes // widest,
            dtype=self.dtype,
            device=self.device,
        )

    def _plan(self, batch: Sequence[SequenceSlice]) -> dict[int | None, AttentionPlan]:
        """A plan per window that occurs; windows that no sequence has outgrown yet share the plan without one."""
        longest = max((piece.end for piece in batch), default=0)
        plans: dict[int | None, AttentionPlan] = {}
        for window in {spec.window for spec in self._specs}:
            effective = window if window is not None and window < longest else None
            if effective not in plans:
                plans[effective] = self._planners[effective].plan(batch)
            plans[window] = plans[effective]
        return plans


def _write(pool_PKR: Tensor, slots: Slots, stored_TKR: Tensor) -> None:
    if isinstance(slots, slice):
        pool_PKR[slots] = stored_TKR
    else:
        pool_PKR.index_copy_(0, slots, stored_TKR)


def _bytes_per_key(spec: LayerSpec, dtype: torch.dtype) -> int:
    return spec.num_key_value_heads * spec.head_dim * dtype.itemsize
