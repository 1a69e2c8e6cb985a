"""The clock of traces: CLOCK_MONOTONIC in nanoseconds, one clock for all processes of a host, native code included."""

from __future__ import annotations

import time


def now() -> int:
    """Nanoseconds since some moment that all processes of this host have in common."""
    return _clock(_MONOTONIC) if _MONOTONIC is not None else time.monotonic_ns()


_MONOTONIC: int | None = getattr(time, "CLOCK_MONOTONIC", None)
_clock = getattr(time, "clock_gettime_ns", lambda _: time.monotonic_ns())
