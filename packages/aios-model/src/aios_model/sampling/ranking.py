"""The likeliest tokens of each row, in one fixed order: higher logit first, and of equal logits the lower token id.

Sorting a vocabulary takes 4 ms a row on a CPU, finding its largest thousand 0.1 ms. So a ranking is cut off at some
width and says how much of it is certain; who needs more asks for a greater width.

Shapes: R rows, V vocabulary, W width of the ranking.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The head of each row in order.

    Attributes:
        values: [R, W], descending.
        token_ids: int64 [R, W], the tokens that have these values.
        num_certain: int64 [R], how many leading places are in the documented order. Beyond them tokens may stand that
            have the same value as others left out; the *values* are right at every place.
    """

    values: Tensor
    token_ids: Tensor
    num_certain: Tensor


def top_token(x_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The first place of the ranking: token ids (int64 [R]) and values ([R]).

    A row with a NaN yields NaN. On the CPU numpy's argmax is used, which is vectorised: 64 rows of 49,152 take 0.2 ms
    where torch's takes 2.6 ms.
    """
    if x_RV.device.type == "cpu":
        array_RV = x_RV.detach().numpy()
        token_ids = array_RV.argmax(axis=-1)
        return torch.from_numpy(token_ids), torch.from_numpy(array_RV[np.arange(len(token_ids)), token_ids])
    token_ids_R = x_RV.argmax(dim=-1)
    return token_ids_R, x_RV.gather(1, token_ids_R[:, None])[:, 0]


def rank(x_RV: Tensor, width: int) -> Ranking:
    """Ranks the `width` largest values of each row; all of them if the row is not longer."""
    num_rows, vocab_size = x_RV.shape
    if width >= vocab_size:
        values_RV, token_ids_RV = x_RV.sort(dim=-1, descending=True, stable=True)
        certain_R = torch.full((num_rows,), vocab_size, device=x_RV.device)
        return Ranking(values=values_RV, token_ids=token_ids_RV, num_certain=certain_R)
    values_RW, token_ids_RW = x_RV.topk(width, dim=-1)
    tied_R = (values_RW[:, 1:] == values_RW[:, :-1]).any(dim=-1)
    if tied_R.any():
        token_ids_RW[tied_R] = _order_ties(values_RW[tied_R], token_ids_RW[tied_R])
    # A token left out can only equal the last value here, so whatever is above that one is in its place.
    certain_R = (values_RW > values_RW[:, -1:]).sum(dim=-1)
    return Ranking(values=values_RW, token_ids=token_ids_RW, num_certain=certain_R)


def _order_ties(values_RW: Tensor, token_ids_RW: Tensor) -> Tensor:
    """Reorders token ids so that they ascend where values are equal. The values are sorted and stay as they are."""
    token_ids_RW, order_RW = token_ids_RW.sort(dim=-1)
    order_RW = values_RW.gather(1, order_RW).sort(dim=-1, descending=True, stable=True).indices
    return token_ids_RW.gather(1, order_RW)
