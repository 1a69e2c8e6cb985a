"""Codes packed into int32 words, the lowest bits first: the common ground of GPTQ, AWQ and compressed-tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unpack_words(words: Tensor, bits: int, *, dim: int) -> Tensor:
    """All codes of `words`, which are packed along `dim`.

    Args:
        words: int32 [A, B].
        bits: 4 or 8; codes of a word are consecutive along `dim`.
        dim: 0 or 1.

    Returns:
        uint8 [A * 32 / bits, B] or [A, B * 32 / bits].
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    shifts = shifts[:, None] if dim == 0 else shifts
    spread = words.unsqueeze(dim + 1).bitwise_right_shift(shifts).bitwise_and_((1 << bits) - 1)
    return spread.to(torch.uint8).flatten(dim, dim + 1)


def codes_at(
    words: Tensor, bits: int, index: Tensor, *, dim: int, order: Sequence[int] | None = None, increment: int = 0
) -> Tensor:
    """The codes at `index` along the dimension in which `words` are packed.

    Args:
        words: int32 [A, B].
        bits: 4 or 8.
        index: Which codes, int64 [R], counted along `dim`.
        dim: 0 or 1.
        order: The place in its word of each of a word's codes; None if they are consecutive.
        increment: Added to every code of a word, carries included: to the word as a whole.

    Returns:
        uint8 [R, B] or [A, R].
    """
    per_word = 32 // bits
    places = torch.tensor(order if order is not None else range(per_word), dtype=torch.int32)
    shifts = places[index % per_word] * bits
    shifts = shifts[:, None] if dim == 0 else shifts
    selected = words.index_select(dim, index // per_word)
    if increment:
        fields = sum(increment << shift for shift in range(0, 32, bits))
        selected = selected.to(torch.int64).add_(fields)
    return selected.bitwise_right_shift_(shifts).bitwise_and_((1 << bits) - 1).to(torch.uint8)
