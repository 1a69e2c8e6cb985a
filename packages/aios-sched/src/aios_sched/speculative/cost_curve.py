"""What a step costs by its number of tokens, learned while steps run. Plain Python.

Decisions rest on ratios: what do eight tokens cost more than one? On a shared machine, and with growing contexts, all
steps become slower or faster together, and those of sizes that are not being run would be remembered as they once were.
So a curve is kept as a scale, which follows every step quickly, times a shape, which is learned slowly per size.

A size seen once, or long ago, may have been unlucky. It is given the benefit of the doubt (`hopeful`), so that it is
tried again; sizes beyond all that were seen are guessed at from the slope of those that were.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from math import exp, log

_MOST_WEIGHT = 50.0
"""A shape that is known well hardly moves: what changes then is taken for a change of all sizes."""
_SCALE_RATE = 0.05
"""Of sizes known that well. Others move the scale by the square of their weight: those that are chosen were lucky when
they were new, what follows is a disappointment, and that must not make all others look dearer."""
_FADING = 0.995
"""What is kept of the weight of all sizes when one is seen: after 200 steps a third."""
_SPREAD = 0.15
"""Steps of one size differ by about that much, by standard deviation, on a shared machine."""
_FIRST_ROUNDED = 16
"""Up to here every size has its own place, beyond eight places share an octave: kernels work in blocks there."""
_LARGEST_SURPRISE = log(2.0)
"""A step that took more than twice what was expected met something else: another process, a page fault."""


class CostCurve:
    """Seconds as a function of a size that never falls; between sizes seen, a straight line.

    Args:
        slope: What one more is believed to cost at least, relative to the cost of size 1, beyond what was seen.
    """

    def __init__(self, *, slope: float) -> None:
        self._slope = slope
        self._scale = 0.0
        self._places: dict[int, _Place] = {}
        self._num_notes = 0
        self._line: _Line | None = None

    @property
    def is_known(self) -> bool:
        """Whether anything was seen."""
        return bool(self._places)

    @property
    def largest_size(self) -> int:
        """The largest size seen, rounded; 0 before the first."""
        return max(self._places, default=0)

    def note(self, size: int, seconds: float) -> None:
        """Learns that `size` took so many seconds; nothing from a clock that says 0."""
        if seconds <= 0.0:
            return
        self._num_notes += 1
        self._line = None
        if not self._places:
            self._scale = seconds / (1.0 + self._slope * (size - 1))
        place = self._places.get(_rounded(size))
        if place is None:
            self._places[_rounded(size)] = _Place(seconds / self._scale, self._num_notes)
            return
        # In logarithms: the mean of ratios of noisy numbers is above the ratio of their means, and would creep upwards.
        surprise = log(seconds / (self._scale * place.shape))
        surprise = min(max(surprise, -_LARGEST_SURPRISE), _LARGEST_SURPRISE)
        weight = place.weight_at(self._num_notes)
        self._scale *= exp(_SCALE_RATE * (weight / _MOST_WEIGHT) ** 2 * surprise)
        place.shape *= exp(surprise / (weight + 1.0))
        place.weight, place.noted = min(weight + 1.0, _MOST_WEIGHT), self._num_notes

    def seconds(self, size: int) -> float:
        """What a step of this size takes; there must have been one of some size."""
        line = self._fitted()
        return self._scale * line.at(size, line.shape)

    def hopeful(self, size: int) -> float:
        """What it might take, where little is known."""
        line = self._fitted()
        return self._scale * line.at(size, line.hopeful)

    def _fitted(self) -> _Line:
        assert self._places, "nothing was seen"
        if self._line is None:
            sizes = sorted(self._places)
            weights = [max(self._places[size].weight_at(self._num_notes), 0.5) for size in sizes]
            shape = _non_decreasing([self._places[size].shape for size in sizes], weights)
            self._line = _Line(sizes, shape, weights, slope=self._slope)
        return self._line


class _Place:
    """What was seen of one size."""

    __slots__ = ("noted", "shape", "weight")

    def __init__(self, shape: float, noted: int) -> None:
        self.shape = shape
        self.weight = 1.0
        self.noted = noted

    def weight_at(self, num_notes: int) -> float:
        return self.weight * _FADING ** (num_notes - self.noted)


class _Line:
    """The shape as it is now."""

    def __init__(self, sizes: list[int], shape: list[float], weights: list[float], *, slope: float) -> None:
        self.sizes = sizes
        self.shape = shape
        self.hopeful = [y * (1.0 - _SPREAD / weight**0.5) for y, weight in zip(shape, weights, strict=True)]
        # Over half an octave, not from the neighbour: neighbours differ by less than the noise.
        index = bisect_right(sizes, sizes[-1] / 1.4) - 1
        seen = 0.0 if index < 0 else (shape[-1] - shape[index]) / (sizes[-1] - sizes[index])
        self._slope = max(seen, slope * shape[0] / (1.0 + slope * (sizes[0] - 1)))

    def at(self, size: int, y: list[float]) -> float:
        """The value of `y`, which belongs to the sizes, between or beyond them."""
        sizes = self.sizes
        index = bisect_left(sizes, size)
        if index == len(sizes):
            return y[-1] + self._slope * (size - sizes[-1])
        if sizes[index] == size:
            return y[index]
        if index == 0:
            return max(y[0] - self._slope * (sizes[0] - size), 0.5 * y[0])
        left, right = sizes[index - 1], sizes[index]
        return y[index - 1] + (size - left) / (right - left) * (y[index] - y[index - 1])


def _non_decreasing(values: list[float], weights: list[float]) -> list[float]:
    """The non-decreasing values nearest to those given: neighbours that contradict that share their mean."""
    blocks: list[tuple[float, float, int]] = []  # sum, weight, members
    for value, weight in zip(values, weights, strict=True):
        total, members = weight * value, 1
        while blocks and blocks[-1][0] * weight >= total * blocks[-1][1]:
            before = blocks.pop()
            total, weight, members = total + before[0], weight + before[1], members + before[2]
        blocks.append((total, weight, members))
    return [total / weight for total, weight, members in blocks for _ in range(members)]


def _rounded(size: int) -> int:
    if size <= _FIRST_ROUNDED:
        return size
    step = 1 << (size.bit_length() - 4)
    return (size + step // 2) // step * step
