"""How many pages there is room for, and how long a sequence may then become. No torch.

Too little memory is noticed here, before anything is allocated, and the message carries the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aios_kvcache.errors import PoolTooSmallError
from aios_kvcache.host_memory import available_memory
from aios_kvcache.layout import FIRST_BLOCK, SCALE_BYTES, KvDtype, key_width, num_blocks_for, value_width
from aios_model.config import ModelConfig, check_context_length
from aios_model.errors import ConfigError

__all__ = [
    "CachePolicy",
    "PoolPlan",
    "available_memory",
    "device_budget",
    "native_kv_bytes_per_token",
    "plan_pool",
    "torch_kv_bytes_per_token",
]

CachePolicy = Literal["paged", "contiguous"]

_NUMBER_BYTES: dict[KvDtype, int] = {"float32": 4, "bfloat16": 2, "int8": 1, "fp8": 1}

DEFAULT_MAX_MODEL_LEN = 8192
DEFAULT_MEMORY_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPlan:
    """How large the pool will be.

    Attributes:
        num_blocks: Pages to hand out.
        block_size: Tokens per page; `max_model_len` if the policy is contiguous.
        max_model_len: Longest sequence, prompt and output together, in tokens; the pool holds at least one of these.
        num_bytes: What the pool takes, null page included.
    """

    num_blocks: int
    block_size: int
    max_model_len: int
    num_bytes: int

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return self.num_bytes // (FIRST_BLOCK + self.num_blocks)


def plan_pool(
    config: ModelConfig,
    *,
    dtype_bytes: int,
    bytes_per_token: int | None = None,
    block_size: int = 16,
    max_num_seqs: int,
    max_model_len: int | None = None,
    memory_bytes: int | None = None,
    num_blocks: int | None = None,
    policy: CachePolicy = "paged",
    available_bytes: int | None = None,
) -> PoolPlan:
    """Decides the size of the pool.

    Without `memory_bytes` and `num_blocks` it takes a quarter of the available memory, but no more than `max_num_seqs`
    sequences of full length need.

    Args:
        config: The model's.
        dtype_bytes: Bytes per stored number.
        bytes_per_token: What a token takes in all layers, where that is not `dtype_bytes` per number: see
            `native_kv_bytes_per_token` and `torch_kv_bytes_per_token`.
        block_size: Tokens per page; the contiguous policy replaces it by `max_model_len`: one page per sequence.
        max_num_seqs: Sequences that run at once.
        max_model_len: Longest sequence to serve. None: what the model supports, up to 8,192, less if memory is short.
        memory_bytes: Memory to use.
        num_blocks: Pages to hand out, instead of `memory_bytes`.
        policy: `paged`, or `contiguous`: one reservation of `max_model_len` per sequence, kept for comparison.
        available_bytes: What there is to take from. None: measured, if it matters.

    Raises:
        ConfigError: An option is out of range, contradicts another, or asks for more than the model supports.
        PoolTooSmallError: Not one sequence of `max_model_len` fits, or not even one page.
    """
    _check_options(
        policy,
        memory_bytes=memory_bytes,
        num_blocks=num_blocks,
        dtype_bytes=dtype_bytes,
        bytes_per_token=bytes_per_token,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
    )
    if max_model_len is not None:
        check_context_length(config, max_model_len)
    if memory_bytes is None and num_blocks is None and available_bytes is None:
        available_bytes = available_memory()
    budget = memory_bytes if memory_bytes is not None else int((available_bytes or 0) * DEFAULT_MEMORY_SHARE)
    if bytes_per_token is None:
        bytes_per_token = config.kv_bytes_per_token(dtype_bytes)
    room = _Room(bytes_per_token=bytes_per_token, budget=budget, num_blocks=num_blocks)
    length = max_model_len or min(config.max_position_embeddings, DEFAULT_MAX_MODEL_LEN)
    if policy == "contiguous":
        if max_model_len is None:
            length = room.longest_page(at_most=length)
        block_size = length
    num_useful = (
        None if memory_bytes is not None and policy == "paged" else max_num_seqs * num_blocks_for(length, block_size)
    )
    num_pages = room.num_pages(block_size, at_most=num_useful)
    if num_pages < 1 or (max_model_len is not None and num_pages * block_size < length):
        raise room.too_small(length, block_size, contiguous=policy == "contiguous")
    num_bytes = (FIRST_BLOCK + num_pages) * block_size * room.bytes_per_token
    if available_bytes is not None and num_bytes > available_bytes:
        raise ConfigError(
            f"{num_pages} pages of {block_size} tokens take {_memory(num_bytes)} of keys and values, "
            f"but {_memory(available_bytes)} of memory is available; ask for less"
        )
    max_model_len = min(length, num_pages * block_size)
    return PoolPlan(num_blocks=num_pages, block_size=block_size, max_model_len=max_model_len, num_bytes=num_bytes)


def native_kv_bytes_per_token(config: ModelConfig, dtype: KvDtype) -> int:
    """Bytes that one token takes in all layers of the native layout: padding and the scales of int8 included."""
    number, scales = _NUMBER_BYTES[dtype], 2 * _scale_bytes(dtype)
    return sum(
        spec.num_key_value_heads * (number * (key_width(spec.head_dim, dtype) + value_width(spec.head_dim)) + scales)
        for spec in config.layers
    )


def torch_kv_bytes_per_token(config: ModelConfig, dtype: KvDtype) -> int:
    """Bytes that one token takes in all layers where torch attends: the scales of int8 included."""
    return sum(
        2 * spec.num_key_value_heads * (_NUMBER_BYTES[dtype] * spec.head_dim + _scale_bytes(dtype))
        for spec in config.layers
    )


def device_budget(*, free_bytes: int, total_bytes: int, device_memory_utilization: float) -> int:
    """Bytes of a GPU's memory to give to keys and values: a share of what is free once the weights are loaded.

    The rest is left for activations.

    Raises:
        ConfigError: The share is not between 0 and 1.
        PoolTooSmallError: Nothing is free.
    """
    if not 0.0 < device_memory_utilization <= 1.0:
        raise ConfigError(f"device_memory_utilization must lie above 0 and at most 1, got {device_memory_utilization}")
    budget = int(free_bytes * device_memory_utilization)
    if budget <= 0:
        raise PoolTooSmallError(
            f"{_memory(free_bytes)} of the device's {_memory(total_bytes)} are free, which leaves no room for keys and "
            "values"
        )
    return budget


@dataclass(frozen=True, slots=True, kw_only=True)
class _Room:
    """What limits the pool: a number of pages, or else a number of bytes."""

    bytes_per_token: int
    budget: int
    num_blocks: int | None

    def num_pages(self, block_size: int, *, at_most: int | None) -> int:
        """Pages there is room for, the null page not counted."""
        if self.num_blocks is not None:
            return self.num_blocks
        num_pages = max(0, self.budget // (block_size * self.bytes_per_token) - FIRST_BLOCK)
        return num_pages if at_most is None else min(num_pages, at_most)

    def longest_page(self, *, at_most: int) -> int:
        """Tokens of the largest page that can be handed out beside the null page; at least 1."""
        if self.num_blocks is not None:
            return at_most
        return max(1, min(at_most, self.budget // (FIRST_BLOCK + 1) // self.bytes_per_token))

    def too_small(self, length: int, block_size: int, *, contiguous: bool) -> PoolTooSmallError:
        """Says what is needed, what there is, and what would fit."""
        needed = (FIRST_BLOCK + num_blocks_for(length, block_size)) * block_size * self.bytes_per_token
        there_is = f"{_memory(self.budget)} is there for it"
        if self.num_blocks is not None:
            there_is = f"the pool is set to {self.num_blocks} pages of {block_size} tokens"
        fitting = self.num_pages(block_size, at_most=None) * block_size
        if contiguous:
            fitting = self.budget // (FIRST_BLOCK + 1) // self.bytes_per_token
        remedy = f"the largest context that fits is {fitting} tokens: lower max_model_len to that, or "
        if fitting < 1:
            remedy = "not even one page fits: "
        return PoolTooSmallError(
            f"one sequence of {length} tokens needs {_memory(needed)} of keys and values "
            f"({self.bytes_per_token} bytes a token), but {there_is}; {remedy}give the cache more memory"
        )


def _check_options(policy: str, *, memory_bytes: int | None, num_blocks: int | None, **options: int | None) -> None:
    if policy not in ("paged", "contiguous"):
        raise ConfigError(f"kv_cache_policy must be 'paged' or 'contiguous', got {policy!r}")
    if memory_bytes is not None and num_blocks is not None:
        raise ConfigError(f"the pool is given twice, as {memory_bytes} bytes and as {num_blocks} pages; give one")
    for name, value in {"memory_bytes": memory_bytes, "num_blocks": num_blocks, **options}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be positive, got {value}")


def _scale_bytes(dtype: KvDtype) -> int:
    return SCALE_BYTES if dtype == "int8" else 0


def _memory(num_bytes: int) -> str:
    """In the largest unit of which there is one: a message with 0.00 GiB on both sides explains nothing."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 1 << power:
            return f"{num_bytes / 2**power:.2f} {unit}"
    return f"{num_bytes} bytes"
