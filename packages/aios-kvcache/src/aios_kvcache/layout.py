"""How keys and values lie in memory: what the torch code, the C++ kernels and the Triton kernels agree on.

Every layer owns one dense, row-major tensor (the "pool") of shape

    [2, X, C, K, H]      keys and values, X pages, C tokens per page, K kv heads, H head size

- `pool[KEY]` and `pool[VALUE]` are each one contiguous stretch of X * C * K * H numbers.
- Token number t of a sequence lies in page `block_table[t // C]` at offset `t % C`. That is one *slot*:
  `slot = block_id * C + t % C`. As K and H are innermost, `pool[KEY].view(X * C, K, H)[slot]` is the token's keys, and
  a run of tokens in neighbouring slots is one stretch of memory.
- A page has the same number in every layer, though layers may differ in K and H: one block table serves them all.
- Page 0 is the null page. It is never written, so it reads as zeros; padding points there. Pages 1..X-1 are handed out.
- Slots behind the last token of a sequence hold leftovers, which may be NaN after a fault: a kernel must not read them,
  not even to multiply them with zero.
- Keys are stored after the rotary embedding, in the dtype of the cache.

Nothing here imports torch.
"""

from __future__ import annotations

from aios_model.config import LayerSpec

KEY = 0
VALUE = 1
NULL_BLOCK = 0
FIRST_BLOCK = 1


def pool_shape(spec: LayerSpec, *, num_blocks: int, block_size: int) -> tuple[int, int, int, int, int]:
    """Shape [2, X, C, K, H] of one layer's pool that hands out `num_blocks` pages."""
    return 2, FIRST_BLOCK + num_blocks, block_size, spec.num_key_value_heads, spec.head_dim


def slot_of(block_table: list[int], position: int, *, block_size: int) -> int:
    """Where the keys and values of the token at `position` lie, counted in tokens from the start of the pool."""
    return block_table[position // block_size] * block_size + position % block_size


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Pages that so many tokens take: the quotient, rounded up."""
    return -(-num_tokens // block_size)
