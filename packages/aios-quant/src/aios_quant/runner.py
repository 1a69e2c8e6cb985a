"""The shortest way from tokens to hidden states, for measuring: one sequence at a time, on native kernels or torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aios_kvcache.attention_plan import SequenceSlice
from aios_kvcache.native.native_cache import NativePagedKVCache
from aios_model.cache import ContiguousCache
from aios_model.decoder import DecoderModel
from aios_model.errors import ConfigError
from aios_model.native.status import native_status
from aios_model.native.threads import ThreadPool, get_pool
from aios_quant.kernel import Activation, KernelFactory, Weight
from aios_quant.native.decoder import NativeDecoder, unsupported
from aios_quant.native.matrix import NativeMatrix
from aios_quant.native.structures import quant_library
from aios_quant.reference import ReferenceKernel

_BLOCK_SIZE = 16


class Runner(Protocol):
    """Runs one sequence, then the next."""

    def start(self, tokens_S: Tensor) -> Tensor:
        """Begins a new sequence with `tokens_S` (int64): hidden states after the last norm, [S, D]."""
        ...

    def extend(self, tokens_T: Tensor) -> Tensor:
        """Goes on with the sequence: hidden states of the new tokens, [T, D]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What computes products.

    Attributes:
        pack: Packs weights.
        pool: Threads of native kernels; None if torch computes.
        description: For reports.
    """

    pack: KernelFactory
    pool: ThreadPool | None
    description: str


def kernel_factory(kernels: str, threads: int | None) -> Kernels:
    """The kernels called `auto`, `native` or `torch`.

    Raises:
        ConfigError: An unknown name, or `native` where there are none.
    """
    if kernels not in ("auto", "native", "torch"):
        raise ConfigError(f"kernels {kernels!r} are unknown; choose auto, native or torch")
    status = native_status(quant_library) if kernels != "torch" else None
    if status is not None and status.available:
        pool = get_pool(threads, own_torch_threads=True)
        count = "1 thread" if pool.num_threads == 1 else f"{pool.num_threads} threads"
        return Kernels(pack=_NativeFactory(pool), pool=pool, description=f"{status.reason}, {count}")
    if kernels == "native" and status is not None:
        raise ConfigError(f"kernels 'native' cannot be used: {status.reason}; choose torch")
    return Kernels(pack=ReferenceKernel, pool=None, description="torch reference kernels")


def make_runner(
    decoder: DecoderModel, kernels: Kernels, *, max_length: int, kv_dtype: torch.dtype = torch.float32
) -> Runner:
    """The fastest runner for a decoder whose Linears were packed by `kernels`, for up to `max_length` tokens.

    Args:
        decoder: The model, in float32.
        kernels: What packed it.
        max_length: Of any sequence.
        kv_dtype: How keys and values are kept; float32 leaves only the weights to differ.

    Raises:
        ConfigError: Other pages than float32 where the modules run.
    """
    reason = "torch computes" if kernels.pool is None else unsupported(decoder)
    if kernels.pool is not None and reason is None:
        return _NativeRunner(decoder, kernels.pool, max_length, kv_dtype)
    if kv_dtype != torch.float32:
        raise ConfigError(f"keys and values are kept in {kv_dtype} by native steps only, but {reason}; take float32")
    return _ModuleRunner(decoder, max_length)


class _ModuleRunner:
    def __init__(self, decoder: DecoderModel, max_length: int) -> None:
        self._decoder = decoder
        self._max_length = max_length

    def start(self, tokens_S: Tensor) -> Tensor:
        decoder = self._decoder
        self._cache = ContiguousCache(
            decoder.config, max_length=self._max_length, dtype=decoder.dtype, device=decoder.device
        )
        return self.extend(tokens_S)

    def extend(self, tokens_T: Tensor) -> Tensor:
        start = self._cache.length
        hidden_TD = self._decoder(tokens_T, torch.arange(start, start + len(tokens_T)), self._cache)
        self._cache.advance(len(tokens_T))
        return hidden_TD


class _NativeRunner:
    """All layers in one call."""

    def __init__(self, decoder: DecoderModel, pool: ThreadPool, max_length: int, kv_dtype: torch.dtype) -> None:
        num_blocks = -(-max_length // _BLOCK_SIZE)
        self._blocks = list(range(num_blocks))
        self._length = 0
        self._pages = NativePagedKVCache(
            decoder.config, num_blocks=num_blocks, block_size=_BLOCK_SIZE, pool=pool, kv_dtype=kv_dtype
        )
        self._decoder = NativeDecoder(decoder, self._pages, pool=pool, max_positions=max_length)

    def start(self, tokens_S: Tensor) -> Tensor:
        self._length = 0
        return self.extend(tokens_S)

    def extend(self, tokens_T: Tensor) -> Tensor:
        start, length = self._length, len(tokens_T)
        self._pages.bind([SequenceSlice(start=start, length=length, block_table=self._blocks)])
        self._length = start + length
        return self._decoder(tokens_T, torch.arange(start, start + length), self._pages)


@dataclass(frozen=True, slots=True)
class _NativeFactory:
    pool: ThreadPool

    def __call__(self, weight: Weight, activation: Activation, dtype: torch.dtype, /) -> NativeMatrix:
        return NativeMatrix(weight, activation=activation, pool=self.pool)
