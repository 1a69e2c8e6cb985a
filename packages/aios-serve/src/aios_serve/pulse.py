"""Signs of life: when the last one came, and how long the next may take."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Pulse:
    """Tells a busy engine from a stuck one by the silence between two messages.

    The deadline is `timeout`, or four times the longest silence so far if that is more, up to ten times the timeout: a
    large model on a small machine can take its time over one chunk of a prompt.

    Args:
        timeout: Seconds of silence that are always allowed.
        clock: Tells the time in seconds.
    """

    def __init__(self, timeout: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout = timeout
        self._clock = clock
        self._longest = 0.0
        self._last = clock()

    @property
    def deadline(self) -> float:
        """Seconds of silence after which the engine counts as stuck."""
        return max(self._timeout, min(4 * self._longest, 10 * self._timeout))

    @property
    def silence(self) -> float:
        """Seconds since the last sign of life."""
        return self._clock() - self._last

    def beat(self) -> None:
        """A sign of life came."""
        if self.is_fresh():  # a silence that counted as stuck teaches nothing about steps
            self._longest = max(self._longest, self.silence)
        self._last = self._clock()

    def forgive(self) -> None:
        """Begin anew: the silence was ours, who did not listen."""
        self._last = self._clock()

    def is_fresh(self) -> bool:
        """Whether the deadline has not passed."""
        return self.silence <= self.deadline
