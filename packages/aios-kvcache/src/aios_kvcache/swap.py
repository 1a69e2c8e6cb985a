"""Pages on the move between the pool, host memory and disk, as plain data that a step carries.

The books (`tiers.py`) decide by number: page 7 to host slot 3, host slot 3 to disk slot 12. Whoever keeps pages carries
it out for its own layers and heads (`page_mover.py`), so the same list serves one device and every rank of a group.

A list is carried out strictly in its order, before the step writes anything: an eviction may empty a page that the next
move fills. Moves are numbered through all steps. After a failed step its moves are sent again under the same numbers,
and whoever has made them already skips them: a page that was saved has been overwritten since.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

SwapKind = Literal["out", "in", "demote", "load"]
"""`out`: page to host slot. `in`: host slot to page. `demote`: host slot to disk slot. `load`: disk slot to page."""


@dataclass(frozen=True, slots=True)
class Swap:
    """One page on the move.

    Attributes:
        kind: From where to where.
        source: Number of the page or slot that is read.
        target: Number of the page or slot that is overwritten.
    """

    kind: SwapKind
    source: int
    target: int


def reads_disk(swaps: Iterable[Swap]) -> bool:
    """Whether anything comes from disk, the one place that may have lost it: then every rank has to say if it did."""
    return any(swap.kind == "load" for swap in swaps)
