"""Times counted in classes of equal ratio: percentiles of a billion values within a percent, in a few kilobytes."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_CLASSES_PER_E = 100
"""Neighbouring classes differ by one percent."""


class Histogram:
    """Counts of positive whole numbers."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self.count = 0
        self.total = 0

    def add(self, value: int, *, weight: int = 1) -> None:
        """Counts `value`, which is at least 1, `weight` times."""
        self._counts[_class_of(value)] += weight
        self.count += weight
        self.total += value * weight

    def add_all(self, values: Sequence[int], *, weight: int) -> None:
        """Counts each of a few ascending values `weight` times."""
        first = _class_of(values[0])
        if first == _class_of(values[-1]):
            self._counts[first] += weight * len(values)
        else:
            for value in values:
                self._counts[_class_of(value)] += weight
        self.count += weight * len(values)
        self.total += weight * sum(values)

    def merge(self, other: Histogram) -> None:
        """Counts what the other one counted, too."""
        self._counts += other._counts
        self.count += other.count
        self.total += other.total

    def percentile(self, percent: float) -> float | None:
        """The middle of the class below or in which `percent` of the values lie; None without values."""
        if not self.count:
            return None
        rank, seen = max(1, math.ceil(self.count * percent / 100)), 0
        for number in sorted(self._counts):
            seen += self._counts[number]
            if seen >= rank:
                return math.exp((number + 0.5) / _CLASSES_PER_E)
        raise AssertionError("more counted than there is")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Histogram) and (self._counts, self.total) == (other._counts, other.total)

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def _class_of(value: int) -> int:
    return math.floor(math.log(value) * _CLASSES_PER_E)
