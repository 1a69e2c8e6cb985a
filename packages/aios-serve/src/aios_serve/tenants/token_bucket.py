"""TokenBucket: so much a minute, evenly refilled, with what runs held back for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_MINUTE = 60.0


class TokenBucket:
    """Holds a minute's worth, and is full at first.

    What a request may need is *held* when it is admitted, *spent* as it is used, and the rest *released* at the end.
    Held amounts are still in the bucket, so that no more than a minute's worth is ever spent or promised: in any `T`
    seconds at most `per_minute * (1 + T / 60)` is spent, whatever was held, spent or released, and when.

    Args:
        per_minute: Capacity, and what flows in within a minute.
        clock: Seconds; never goes back.
    """

    def __init__(self, per_minute: float, *, clock: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._held = 0.0
        self._time = clock()

    @property
    def available(self) -> float:
        """What is there and not held back."""
        self._refill()
        return self._level - self._held

    @property
    def held(self) -> float:
        """What requests that run may still need."""
        return self._held

    def seconds_until(self, amount: float) -> float:
        """How long until `amount` has flowed in; 0 if it is there. It takes longer if others are faster."""
        return max(0.0, amount - self.available) * _MINUTE / self.per_minute

    def hold(self, amount: float) -> bool:
        """Hold `amount` back if it is there; returns whether it was."""
        if amount > self.available:
            return False
        self._held += amount
        return True

    def spend(self, amount: float) -> None:
        """Take out `amount` of what was held."""
        self._refill()
        self._held -= amount
        self._level -= amount

    def release(self, amount: float) -> None:
        """Hold `amount` back no more."""
        self._held -= amount

    def put_back(self, amount: float) -> None:
        """Undo a `spend` that came to nothing."""
        self._refill()
        self._level = min(float(self.per_minute), self._level + amount)

    def resize(self, per_minute: float) -> None:
        """From now on hold and refill `per_minute`. What is in stays in, as far as it fits."""
        self._refill()
        self.per_minute = per_minute
        self._level = min(self._level, float(per_minute))

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(float(self.per_minute), self._level + (now - self._time) * self.per_minute / _MINUTE)
        self._time = now
