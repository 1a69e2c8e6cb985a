"""How often, and after what wait, an engine that died is started again."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

WINDOW_SECONDS = 600.0
"""Restarts longer ago than this are forgiven: what dies once a day may go on doing so."""


class RestartBudget:
    """Counts restarts and says how long to wait before each: 1 s, 2, 4 … up to 30, for those of the last ten minutes.

    Args:
        max_restarts: Most of them within `window` seconds; 0 allows none.
        first_delay: Seconds before the first one; each further one waits twice as long.
        longest_delay: Seconds that no wait exceeds.
        window: Seconds after which a restart no longer counts.
        clock: Tells the time in seconds.
    """

    def __init__(
        self,
        max_restarts: int,
        *,
        first_delay: float = 1.0,
        longest_delay: float = 30.0,
        window: float = WINDOW_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_restarts = max_restarts
        self._first_delay = first_delay
        self._longest_delay = longest_delay
        self._window = window
        self._clock = clock
        self._recent: deque[float] = deque()

    def take(self) -> float | None:
        """Spend one restart; returns the seconds to wait before it, or None if there is none left."""
        now = self._clock()
        while self._recent and now - self._recent[0] > self._window:
            self._recent.popleft()
        if len(self._recent) >= self._max_restarts:
            return None
        delay = min(self._first_delay * 2 ** len(self._recent), self._longest_delay)
        self._recent.append(now)
        return delay

    def spent(self) -> str:
        """Why there is none left, for people: completes "it is not started again: …"."""
        if self._max_restarts == 0:
            return "restarts are turned off (max_engine_restarts=0)"
        times = "once" if self._max_restarts == 1 else f"{self._max_restarts} times"
        return f"it was restarted {times} within {self._window / 60:g} minutes already (max_engine_restarts)"
