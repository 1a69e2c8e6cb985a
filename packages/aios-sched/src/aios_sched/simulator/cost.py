"""How long does a step take? What every cost model answers, and the plainest of them.

Times are whole femtoseconds. Adding up whole numbers is exact in any order, so a stretch of steps that is simulated in
one go ends at the very same moment as the same steps one by one; and there is room: Python's integers have no limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from aios_model.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

FEMTOSECONDS = 10**15
"""In a second."""


class StepShape(NamedTuple):
    """What a step's time depends on.

    Attributes:
        num_tokens: Tokens that are computed.
        num_sequences: Requests they belong to.
        num_context: Tokens whose keys and values are read: of each request all up to the step's last.
        num_pairs: Pairs of a computed token and a token it attends to, itself included.
    """

    num_tokens: int
    num_sequences: int
    num_context: int
    num_pairs: int


class CostModel(Protocol):
    """Predicts the time of steps."""

    @property
    def host_time(self) -> int:
        """Part of every step in which the device waits for the host, in femtoseconds."""
        ...

    def step(self, shape: StepShape) -> int:
        """The time of one step, in femtoseconds; at least 1."""
        ...

    def decode_steps(self, *, num_sequences: int, num_context: int, count: int) -> Sequence[int]:
        """The times of `count` successive steps in each of which `num_sequences` requests compute one token.

        Exactly what `step` says of each; only quicker.

        Args:
            num_sequences: Requests, the same in all of them.
            num_context: Of the first step; each further one reads `num_sequences` more.
            count: Steps.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCost:
    """A sum of terms, one of which may be a curve: constants of one's own, or what `fitting.fit` finds.

    Attributes:
        step_s: Seconds of any step.
        token_s: Seconds per computed token.
        sequence_s: Seconds per request.
        context_s: Seconds per token of context that is read.
        pair_s: Seconds per pair of tokens in attention.
        curve: Points (tokens, seconds), ascending; what lies between is interpolated and what lies outside goes on like
            the nearest piece. Added to the other terms: batches are seldom linear from 1 to 256 tokens.
        host_s: Of `step_s`, the part in which the device waits.

    Raises:
        ConfigError: A term is negative or not finite, or the curve does not ascend.
    """

    step_s: float
    token_s: float = 0.0
    sequence_s: float = 0.0
    context_s: float = 0.0
    pair_s: float = 0.0
    curve: tuple[tuple[int, float], ...] = ()
    host_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("step_s", "token_s", "sequence_s", "context_s", "pair_s", "host_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"{name}={getattr(self, name)} is no cost: give seconds, 0 or more")
        if self.host_s > self.step_s:
            raise ConfigError(f"host_s={self.host_s} is a part of step_s={self.step_s} and cannot exceed it")
        tokens = [point[0] for point in self.curve]
        if tokens != sorted(set(tokens)) or len(tokens) == 1 or any(not math.isfinite(y) for _, y in self.curve):
            raise ConfigError(f"a curve needs two or more points of ascending numbers of tokens, got {self.curve}")

    @property
    def host_time(self) -> int:
        """`host_s`."""
        return _femtoseconds(self.host_s)

    def step(self, shape: StepShape) -> int:
        """The sum of the terms."""
        time = self._without_attention(shape.num_tokens, shape.num_sequences)
        time += _femtoseconds(self.context_s) * shape.num_context + _femtoseconds(self.pair_s) * shape.num_pairs
        return max(time, 1)

    def decode_steps(self, *, num_sequences: int, num_context: int, count: int) -> Sequence[int]:
        """An arithmetic progression."""
        slope = _femtoseconds(self.context_s) + _femtoseconds(self.pair_s)
        first = self._without_attention(num_sequences, num_sequences) + slope * num_context
        if first < 1:
            return [max(first + slope * num_sequences * index, 1) for index in range(count)]
        return progression(first, slope * num_sequences, count)

    def _without_attention(self, num_tokens: int, num_sequences: int) -> int:
        curve = _femtoseconds(interpolate(self.curve, num_tokens)) if self.curve else 0
        linear = _femtoseconds(self.token_s) * num_tokens + _femtoseconds(self.sequence_s) * num_sequences
        return _femtoseconds(self.step_s) + linear + curve


def progression(first: int, difference: int, count: int) -> Sequence[int]:
    """`count` numbers from `first` on, each `difference` more than the one before."""
    return range(first, first + difference * count, difference) if difference else [first] * count


def interpolate(curve: Sequence[tuple[int, float]], x: float) -> float:
    """The value at `x` of the line through the points, whose first and last pieces go on for ever."""
    right = next((index for index in range(1, len(curve) - 1) if x <= curve[index][0]), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _femtoseconds(seconds: float) -> int:
    return round(seconds * FEMTOSECONDS)
