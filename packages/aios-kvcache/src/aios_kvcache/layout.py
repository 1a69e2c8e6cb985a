"""How keys and values lie in memory: what the torch code, the C++ kernels and the Triton kernels agree on.

Two layouts, of the same pages.

**Token by token** (torch, Triton). Every layer owns one dense, row-major tensor (the "pool") of shape

    [2, X, C, K, H]      keys and values, X pages, C tokens per page, K kv heads, H head size

(int8 keeps H codes and four bytes of scale per head, fp8 H bytes; both are uint8: see `stored_heads.py`)

- `pool[KEY]` and `pool[VALUE]` are each one contiguous stretch of X * C * K * H numbers.
- Token number t of a sequence lies in page `block_table[t // C]` at offset `t % C`. That is one *slot*:
  `slot = block_id * C + t % C`. As K and H are innermost, `pool[KEY].view(X * C, K, H)[slot]` is the token's keys, and
  a run of tokens in neighbouring slots is one stretch of memory.

**Sixteen by sixteen** (C++, `native/csrc/kv_pool.h`), for pages of a multiple of sixteen tokens. Every layer owns

    keys    [X, K, C/16, H, 16]    sixteen tokens side by side: the lanes of a vector
    values  [X, K, C, W]           W is H rounded up to sixteen; zeros behind H
    scales  [X, K, C]              for int8 only, float32: one tensor for keys, one for values

- A query meets the keys of sixteen tokens at once: number h of the query times vector h of the keys, H times, makes
  sixteen scores. Nothing is summed across lanes, so the order of every sum is plain to see.
- One kv head's share of a page is contiguous, since threads divide the work by heads.
- bfloat16 is kept in pairs, which one 64-byte read, a shift and a mask turn into two float32 vectors:

      keys    [X, K, C/16, H/2, 16, 2]    numbers 2i and 2i + 1 of a token's key are a pair
      values  numbers i and i + 16 of each whole 32 are a pair: 0 16 1 17 2 18 … 15 31, 32 48 …

- fp8 (E4M3, no scale; larger numbers become ±448) lies as float32 does, a byte each. torch moves hardly anything of
  type float8_e4m3fn, so the tensors are uint8: `tensor.view(torch.float8_e4m3fn)` reads them.
- int8: `number = code * scale`, with one scale per token and head, amax / 127, and
  `code = round_half_even(x * (127 / amax))`. Codes are kept in fours, which one instruction multiplies and adds:

      keys    [X, K, C/16, Hp/4, 16, 4]    uint8, code + 128; Hp is H rounded up to four
      values  [X, K, C/4, W, 4]            int8, four tokens side by side

Both:

- A page has the same number in every layer, though layers may differ in K and H: one block table serves them all.
- Page 0 is the null page. It is never written, so it reads as zeros; padding points there. Pages 1..X-1 are handed out.
- Slots behind the last token of a sequence hold leftovers, which may be NaN after a fault: a kernel must not let them
  reach a result, not even multiplied with zero.
- Keys are stored after the rotary embedding, in the dtype of the cache.

Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aios_model.config import LayerSpec, ModelConfig

KEY = 0
VALUE = 1
NULL_BLOCK = 0
FIRST_BLOCK = 1

LANES = 16
"""Tokens that stand side by side in the native layout."""

FOUR = 4
"""Codes that stand side by side for one lane in int8 pages: numbers of a key, tokens of the values."""

SCALE_BYTES = 4
"""Of the float32 scale that each token's key and value of a head have in int8 pages."""

MAX_NATIVE_HEAD_DIM = 1024

KvDtype = Literal["float32", "bfloat16", "int8", "fp8"]


def pool_shape(spec: LayerSpec, *, num_blocks: int, block_size: int) -> tuple[int, int, int, int, int]:
    """Shape [2, X, C, K, H] of one layer's pool that hands out `num_blocks` pages."""
    return 2, FIRST_BLOCK + num_blocks, block_size, spec.num_key_value_heads, spec.head_dim


def slot_of(block_table: list[int], position: int, *, block_size: int) -> int:
    """Where the keys and values of the token at `position` lie, counted in tokens from the start of the pool."""
    return block_table[position // block_size] * block_size + position % block_size


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Pages that so many tokens take: the quotient, rounded up."""
    return -(-num_tokens // block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeShapes:
    """Shapes of one layer's pool in the native layout.

    Attributes:
        keys: [X, K, C/16, H, 16]; [X, K, C/16, H/2, 16, 2] for bfloat16; [X, K, C/16, Hp/4, 16, 4] for int8.
        values: [X, K, C, W]; [X, K, C/4, W, 4] for int8.
        scales: [X, K, C], twice; None unless int8.
    """

    keys: tuple[int, ...]
    values: tuple[int, ...]
    scales: tuple[int, ...] | None


def native_shapes(spec: LayerSpec, *, dtype: KvDtype, num_blocks: int, block_size: int) -> NativeShapes:
    """Shapes of one layer's pool that hands out `num_blocks` pages, in the native layout."""
    num_pages, heads, size = FIRST_BLOCK + num_blocks, spec.num_key_value_heads, spec.head_dim
    key, value = (size, LANES), (block_size, value_width(size))
    if dtype == "bfloat16":
        key = (size // 2, LANES, 2)
    elif dtype == "int8":
        key = (key_width(size, dtype) // FOUR, LANES, FOUR)
        value = (block_size // FOUR, value_width(size), FOUR)
    return NativeShapes(
        keys=(num_pages, heads, block_size // LANES, *key),
        values=(num_pages, heads, *value),
        scales=(num_pages, heads, block_size) if dtype == "int8" else None,
    )


def key_width(head_dim: int, dtype: KvDtype) -> int:
    """Hp: numbers that one token's key of one head takes in the native layout."""
    return num_blocks_for(head_dim, FOUR) * FOUR if dtype == "int8" else head_dim


def value_width(head_dim: int) -> int:
    """W: numbers that one token's values of one head take in the native layout."""
    return num_blocks_for(head_dim, LANES) * LANES


def why_not_native(config: ModelConfig, *, block_size: int) -> str | None:
    """Why pages of this model cannot be kept in the native layout; None if they can."""
    if block_size % LANES:
        return f"pages of {block_size} tokens do not divide into sixteens; choose a block_size that is a multiple of 16"
    for index, spec in enumerate(config.layers):
        if spec.kind != "attention":
            return f"layer {index} is of kind {spec.kind!r}, which keeps no pages"
        if spec.head_dim % 2 or spec.head_dim > MAX_NATIVE_HEAD_DIM:
            return (
                f"layer {index} has heads of {spec.head_dim} numbers; even sizes up to {MAX_NATIVE_HEAD_DIM} are built"
            )
        if config.num_attention_heads % spec.num_key_value_heads:
            return (
                f"layer {index} has {spec.num_key_value_heads} kv heads, "
                f"of which {config.num_attention_heads} query heads are no multiple"
            )
    return None
