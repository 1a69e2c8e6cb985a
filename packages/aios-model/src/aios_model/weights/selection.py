"""Which indices of a dimension a rank holds, as plain data.

A selection may name indices that another rank holds too, and it may have places for nothing at all, which read as
zeros: nine heads on four ranks are not shared evenly, and kernels want groups of heads of one size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring indices of a dimension.

    Attributes:
        start: The first of them; None for places that hold zeros.
        length: How many.
    """

    start: int | None
    length: int


@dataclass(frozen=True, slots=True)
class Selection:
    """The indices of a dimension that a rank holds, in its order."""

    runs: tuple[Run, ...]

    @classmethod
    def span(cls, start: int, stop: int) -> Selection:
        """The indices [start, stop)."""
        return cls((Run(start, stop - start),))

    @property
    def size(self) -> int:
        """How many there are, zeros included."""
        return sum(run.length for run in self.runs)

    @property
    def has_zeros(self) -> bool:
        """Whether some places hold nothing."""
        return any(run.start is None for run in self.runs)

    def within(self, places: range) -> Iterator[tuple[slice, Run]]:
        """The runs of some of the rank's places: where each lies among them, and what it holds.

        Args:
            places: Indices of the rank's own dimension, step 1.
        """
        at = 0
        for run in self.runs:
            start, stop = max(at, places.start), min(at + run.length, places.stop)
            if start < stop:
                source = None if run.start is None else run.start + start - at
                yield slice(start - places.start, stop - places.start), Run(source, stop - start)
            at += run.length
