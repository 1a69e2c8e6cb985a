"""What ranks are given to add up, and what must come of it."""

from __future__ import annotations

import torch
from rank_processes import RankProcesses
from torch import Tensor


def inputs(ranks: RankProcesses, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A random tensor for each rank, of magnitudes so different that the order of a sum shows."""
    return [(torch.randn(shape) * 10 ** (4 * torch.rand(shape) - 2)).to(dtype) for _ in range(ranks.size)]


def sum_in_order(summands: list[Tensor]) -> Tensor:
    """The sum from the first rank to the last; narrow floats are added up in float32 and rounded once."""
    wide = torch.promote_types(summands[0].dtype, torch.float32)
    total = summands[0].to(wide)
    for summand in summands[1:]:
        total = total + summand.to(wide)
    return total.to(summands[0].dtype)


def singles(values: list[Tensor]) -> list[tuple[Tensor]]:
    """Each value as the arguments of a call."""
    return [(value,) for value in values]
