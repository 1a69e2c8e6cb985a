"""Applying masks of one bit per token to logits.

Shapes: R rows, V vocabulary, M words of 32 tokens (V / 32, rounded up).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


def num_mask_words(vocab_size: int) -> int:
    """M."""
    return -(-vocab_size // 32)


def apply_masks(logits_RV: Tensor, allowed_RM: NDArray[np.uint32]) -> None:
    """Sets logits to -inf, in place, wherever a token's bit is 0.

    Args:
        logits_RV: float32 or float64.
        allowed_RM: Token t is bit t % 32 of word t // 32.
    """
    if logits_RV.device.type == "cpu":
        _apply_on_cpu(logits_RV, allowed_RM)
    else:
        _apply_on_device(logits_RV, torch.from_numpy(allowed_RM.view(np.int32)).to(logits_RV.device))


def _apply_on_cpu(logits_RV: Tensor, allowed_RM: NDArray[np.uint32]) -> None:
    banned_RV = np.unpackbits(
        (~allowed_RM).astype("<u4", copy=False).view(np.uint8), axis=1, count=logits_RV.shape[1], bitorder="little"
    )
    logits_RV.masked_fill_(torch.from_numpy(banned_RV.view(np.bool_)), -torch.inf)


def _apply_on_device(logits_RV: Tensor, allowed_RM: Tensor) -> None:
    """A twentieth of what a mask of bytes would take on the way to the device."""
    bits_32 = torch.arange(32, device=logits_RV.device, dtype=torch.int32)
    allowed_RV = ((allowed_RM[:, :, None] >> bits_32) & 1).flatten(1)[:, : logits_RV.shape[1]]
    logits_RV.masked_fill_(allowed_RV == 0, -torch.inf)
