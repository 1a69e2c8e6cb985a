"""The most important first, and waiting makes important."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aios_model.errors import ConfigError, InvalidRequestError
from aios_sched.policy.ranked import RankedQueue

if TYPE_CHECKING:
    from aios_sched.request import Request

MIN_PRIORITY, MAX_PRIORITY = -100, 100
DEFAULT_AGING_SECONDS = 10.0


class PriorityQueue(RankedQueue):
    """Admits by priority, lower first, as in vLLM; every `aging_seconds` of age count like one level of priority.

    All requests age at the same rate, so the order of two of them never changes:

        priority_a - age_a / aging_seconds < priority_b - age_b / aging_seconds
        whenever  priority_a + arrival_a / aging_seconds < priority_b + arrival_b / aging_seconds

    The right side is a fixed rank. It orders the queue, and it says who gives way when pages run out.

    Nobody starves: a request of priority p is overtaken only by those that arrive within
    `(p - MIN_PRIORITY) * aging_seconds` after it, and by one of priority q only within `(p - q) * aging_seconds`.

    Args:
        aging_seconds: Seconds of age worth one level of priority. Small is close to first come, first served.

    Raises:
        ConfigError: `aging_seconds` is not a positive number.
    """

    def __init__(self, *, aging_seconds: float = DEFAULT_AGING_SECONDS) -> None:
        super().__init__()
        if not 0 < aging_seconds < float("inf"):
            raise ConfigError(f"aging_seconds={aging_seconds} cannot be used: it must be a positive number of seconds")
        self._aging_seconds = aging_seconds

    def push(self, request: Request) -> None:
        """Takes a request; a priority out of range is refused."""
        if not MIN_PRIORITY <= request.priority <= MAX_PRIORITY:
            raise InvalidRequestError(
                f"priority={request.priority} does not exist: the most important is {MIN_PRIORITY}, the least "
                f"{MAX_PRIORITY}, and 0 the default",
                param="priority",
            )
        request.rank = request.priority + request.arrival_time / self._aging_seconds
        super().push(request)
