"""How long will the answers be, and how many pages will they need at the same time?

A request says how many tokens it may generate at most, and mostly generates far fewer. Were pages set aside for the
most, few requests would run at once; were none set aside, requests would be admitted only to be preempted later. So
admission expects of a request what others of its tenant did before it, and looks ahead to the moment at which those
that run, and the one that wants to, will need the most pages together: some will have finished by then (the peak that
"Past-Future", arXiv 2507.10150, computes). It may be wrong: then someone is preempted, and everybody still finishes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aios_sched.request import Request

_MAX_TENANTS = 1024


class OutputEstimator:
    """A quantile of the output lengths of each tenant's finished requests, which forgets what is long ago.

    Each finished request moves the estimate by a few percent: up by `rate * quantile` if it was longer, down by
    `rate * (1 - quantile)` if not. Where that comes to a halt, a share `quantile` of the requests is shorter.

    Args:
        quantile: 0 to 1, both exclusive.
        rate: How much one request counts; after some 2 / rate requests of a new kind the old ones are forgotten.
    """

    def __init__(self, *, quantile: float = 0.6, rate: float = 0.1) -> None:
        self._up = math.exp(rate * quantile)
        self._down = math.exp(-rate * (1.0 - quantile))
        self._by_tenant: dict[str, float] = {}
        self._of_all: float | None = None

    @property
    def knows_anything(self) -> bool:
        """Whether a request has finished yet."""
        return self._of_all is not None

    def observe(self, request: Request) -> None:
        """Learns from a request that came to its own end."""
        length = max(1, len(request.output_token_ids))
        estimates, tenant, of_all = self._by_tenant, request.tenant, self._of_all
        estimates[tenant] = self._moved(estimates.pop(tenant, of_all), length)
        self._of_all = self._moved(of_all, length)
        if len(estimates) > _MAX_TENANTS:
            del estimates[next(iter(estimates))]  # whose requests ended longest ago

    def remaining(self, request: Request) -> int:
        """Output tokens that the request is expected to need from now on, at least 1; 0 as long as nothing is known.

        One that has outlived the estimate is expected to go on for a quarter of it: long answers exist.
        """
        estimate = self._by_tenant.get(request.tenant, self._of_all)
        if estimate is None:
            return 0
        num_done = len(request.output_token_ids)
        expected = max(estimate - num_done, 0.25 * estimate)
        return max(1, min(int(expected), request.max_tokens - num_done))  # type: ignore[operator]

    def _moved(self, estimate: float | None, length: int) -> float:
        if estimate is None:
            return float(length)
        return estimate * (self._up if length > estimate else self._down)


def peak_tokens(lengths: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """What sequences hold at the moments at which they end, if all grow by a token per step.

    Args:
        lengths: For each sequence its tokens now, and those still to come.

    Returns:
        For each moment at which one ends, the last first: (sequences that are left, that one included; tokens they
        hold together). The most ever held is the largest of these.
    """
    moments, held = [], 0
    for num_left, (num_remaining, num_tokens) in enumerate(sorted(((b, a) for a, b in lengths), reverse=True), start=1):
        held += num_tokens
        moments.append((num_left, held + num_left * num_remaining))
    return moments
