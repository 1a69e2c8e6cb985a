"""Pages in the native layout, written and attended by the C++ kernels of `csrc`.

A drop-in for `PagedKVCache` on a CPU: it fills the same socket, `aios_model.cache.KVCache`. The fused step of
aios-quant does not call `attend`; it takes `batch` and `kv_pool(layer)` and runs the same kernels inside its own job.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aios_kvcache.block import BlockCopy, independent_waves
from aios_kvcache.layout import KvDtype, native_shapes, why_not_native
from aios_kvcache.native.batch_buffer import BatchBuffer
from aios_kvcache.native.kernels import KV_TYPES, AttentionBatch, KvPool, attention_kernels, kvcache_library
from aios_kvcache.pool_memory import allocate_pool
from aios_model.config import LayerSpec, ModelConfig
from aios_model.errors import ConfigError
from aios_model.native.library import pointer

if TYPE_CHECKING:
    from aios_kvcache.attention_plan import SequenceSlice
    from aios_model.native.library import NativeLibrary
    from aios_model.native.threads import ThreadPool

KV_DTYPES: dict[torch.dtype, KvDtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
}


class NativePagedKVCache:
    """Keys and values of many sequences, in pages 1..`num_blocks` of every layer's pool; see `layout.py`.

    The pools are reserved but not backed: memory is taken when it is first written. Results are bitwise the same for a
    sequence alone and in any batch, for a prompt whole and in chunks, and for any number of threads.

    Args:
        config: The model's.
        num_blocks: Pages to hand out; the null page comes on top.
        block_size: Tokens per page, a multiple of 16.
        pool: The threads that do the work.
        kv_dtype: How keys and values are kept: float32, bfloat16, int8 with a scale per token and head, or
            float8_e4m3fn.
        dtype: Of the model's activations, for the record; `attend` takes and returns any floating dtype.
        device: Must be a CPU.
        library: The kernels; None for those of the best instruction set of this CPU.

    Attributes:
        layers: Each layer's tensors, for tests and for whoever inspects them.

    Raises:
        ConfigError: The layout cannot hold such pages, or there are no kernels for that dtype or device.
        PoolTooSmallError: The operating system refuses to reserve that much.
        NativeBuildError: The kernels cannot be compiled or loaded; ask `native_status(kvcache_library)` first.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        pool: ThreadPool,
        kv_dtype: torch.dtype = torch.bfloat16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        library: NativeLibrary | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.kv_dtype = kv_dtype
        self.device = torch.device(device)
        self._check(config)
        self._kernels = attention_kernels(library or kvcache_library())
        self._threads = pool
        self._specs = config.layers
        self._num_heads = config.num_attention_heads
        self.layers = [
            NativeLayer(spec, dtype=KV_DTYPES[kv_dtype], num_blocks=num_blocks, block_size=block_size)
            for spec in config.layers
        ]
        self._buffer = BatchBuffer(block_size=block_size, num_blocks=num_blocks)
        self._scratch = torch.empty(0, dtype=torch.uint8)

    @property
    def num_bytes(self) -> int:
        """Bytes reserved for keys, values and scales, null page included."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors)

    @property
    def page_tensors(self) -> list[Tensor]:
        """Keys, values and scales of every layer, pages first: what a page consists of, for whoever moves pages."""
        return [tensor for layer in self.layers for tensor in layer.tensors]

    @property
    def batch(self) -> AttentionBatch:
        """The bound batch as kernels take it; its pointers are valid until the next `bind`."""
        return self._buffer.batch

    def kv_pool(self, layer: int) -> KvPool:
        """One layer's pages as kernels take them; valid as long as this cache is."""
        return self.layers[layer].kv_pool

    def bind(self, batch: Sequence[SequenceSlice]) -> None:
        """Prepares `attend`, and `batch` for the fused step, for a step whose T tokens are those of `batch`.

        Raises:
            ValueError: A slice is empty, or its block table has no room for its tokens or names a page that is none.
        """
        self._buffer.fill(batch)

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Writes the new tokens' keys and values, then attends over what is stored, the new tokens included.

        Args:
            layer: Index of the layer.
            q_TNH: Queries of the bound batch's T tokens, after the rotary embedding.
            k_TKH: Their keys, after the rotary embedding.
            v_TKH: Their values.

        Returns:
            [T, N, H], in the dtype of the queries.
        """
        batch, pool, spec = self.batch, self.layers[layer].kv_pool, self._specs[layer]
        assert len(q_TNH) == batch.num_rows, f"{batch.num_rows} tokens are bound, {len(q_TNH)} came"
        q, k, v = (x.to(torch.float32).contiguous() for x in (q_TNH, k_TKH, v_TKH))
        assert k.shape == v.shape == (len(q), spec.num_key_value_heads, spec.head_dim), (k.shape, v.shape)
        assert q.shape[1:] == (self._num_heads, spec.head_dim), q.shape
        out = torch.empty_like(q)
        scratch = self._scratch_for(batch, pool)
        threads, num_heads = self._threads.pointer, self._num_heads
        at_batch, at_pool, stride = ctypes.byref(batch), ctypes.byref(pool), num_heads * spec.head_dim
        self._kernels.store_kv(
            threads, at_batch, at_pool, pointer(k), pointer(v), spec.num_key_value_heads * spec.head_dim
        )
        self._kernels.attend(
            *(threads, at_batch, at_pool, pointer(q), stride, num_heads, spec.scale, spec.window or 0),
            *(pointer(out), stride, pointer(scratch)),
        )
        return out.to(q_TNH.dtype)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copies whole pages in every layer, as if one after the other."""
        for wave in independent_waves(copies):
            sources = torch.tensor([copy.source for copy in wave])
            destinations = torch.tensor([copy.destination for copy in wave])
            for layer in self.layers:
                for tensor in layer.tensors:
                    tensor.index_copy_(0, destinations, tensor.index_select(0, sources))

    def _check(self, config: ModelConfig) -> None:
        if self.device.type != "cpu":
            raise ConfigError(f"native pages live in the host's memory, not on {self.device}; use PagedKVCache there")
        if self.kv_dtype not in KV_DTYPES:
            names = ", ".join(KV_DTYPES.values())
            raise ConfigError(f"native pages are kept as {names}, not as {self.kv_dtype}; choose one of them")
        reason = why_not_native(config, block_size=self.block_size)
        if reason is not None:
            raise ConfigError(f"no native attention: {reason}, or use PagedKVCache")

    def _scratch_for(self, batch: AttentionBatch, pool: KvPool) -> Tensor:
        needed = self._kernels.attention_scratch_bytes(
            ctypes.byref(batch), ctypes.byref(pool), self._num_heads, self._threads.num_threads
        )
        if needed > len(self._scratch):
            self._scratch = torch.empty(needed, dtype=torch.uint8)
        return self._scratch


class NativeLayer:
    """One layer's pages.

    Args:
        spec: The layer's.
        dtype: How numbers are kept.
        num_blocks: Pages to hand out; the null page comes on top.
        block_size: Tokens per page.

    Attributes:
        dtype: How numbers are kept.
        keys: [X, K, C/16, H, 16]; [X, K, C/16, H/2, 16, 2] for bfloat16; uint8 [X, K, C/16, Hp/4, 16, 4] for int8.
        values: [X, K, C, W]; [X, K, C/4, W, 4] for int8.
            Both are uint8 for fp8, bit by bit a float8_e4m3fn.
        key_scales: [X, K, C] float32; None unless int8.
        value_scales: [X, K, C] float32; None unless int8.
        kv_pool: The same for C.
    """

    def __init__(self, spec: LayerSpec, *, dtype: KvDtype, num_blocks: int, block_size: int) -> None:
        shapes = native_shapes(spec, dtype=dtype, num_blocks=num_blocks, block_size=block_size)
        kept = next(kept for kept, name in KV_DTYPES.items() if name == dtype)
        self.dtype = dtype
        self.keys = _zeros(shapes.keys, torch.uint8 if dtype in ("int8", "fp8") else kept)
        self.values = _zeros(shapes.values, torch.uint8 if dtype == "fp8" else kept)
        self.key_scales = None if shapes.scales is None else _zeros(shapes.scales, torch.float32)
        self.value_scales = None if shapes.scales is None else _zeros(shapes.scales, torch.float32)
        self.kv_pool = KvPool(
            pointer(self.keys),
            pointer(self.values),
            None if self.key_scales is None else pointer(self.key_scales),
            None if self.value_scales is None else pointer(self.value_scales),
            *(KV_TYPES[dtype], spec.num_key_value_heads, spec.head_dim, block_size),
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All of them; pages are their first dimension."""
        tensors = (self.keys, self.values, self.key_scales, self.value_scales)
        return [tensor for tensor in tensors if tensor is not None]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return allocate_pool(shape, dtype=dtype, device=torch.device("cpu"))
