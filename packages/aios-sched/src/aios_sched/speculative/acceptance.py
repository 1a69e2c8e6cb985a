"""How many drafts will be right: estimates per request, leaning on what is known of all requests. Plain Python.

Two probabilities per request: that the first draft is right, and that a draft is right if the one before was. Text that
repeats shows why one is not enough: a match is wrong at once, or right for a long while. Both are ratios of counts that
fade, so that they follow a text that changes.
"""

from __future__ import annotations

_FIRST_GUESS = (0.75, 0.85)
"""Before anything is known: enough for trying, and forgotten after a few drafts."""
_OWN_MEMORY = 0.92
"""What is kept of a request's counts at each row with drafts: six such rows dominate."""
_COMMON_MEMORY = 0.98
_PRIOR_WEIGHT = 3.0
"""Drafts of its own for which a request trusts what is known of the others."""


class Acceptance:
    """Counts of right and wrong drafts.

    Args:
        common: Counts over all requests; None for those themselves.
    """

    __slots__ = ("_common", "_memory", "_next_hits", "_next_tries", "first_hits", "first_tries")

    def __init__(self, common: Acceptance | None = None) -> None:
        self._common = common
        self._memory = _COMMON_MEMORY if common is None else _OWN_MEMORY
        self.first_hits = self.first_tries = self._next_hits = self._next_tries = 0.0

    def note(self, *, num_drafted: int, num_accepted: int) -> None:
        """Of `num_drafted` >= 1 drafts in a row the first `num_accepted` were right."""
        memory, later = self._memory, max(0, num_accepted - 1)
        self.first_hits = memory * self.first_hits + (num_accepted > 0)
        self.first_tries = memory * self.first_tries + 1
        self._next_hits = memory * self._next_hits + later
        self._next_tries = memory * self._next_tries + later + (0 < num_accepted < num_drafted)
        if self._common is not None:
            self._common.note(num_drafted=num_drafted, num_accepted=num_accepted)

    @property
    def first(self) -> float:
        """Probability that the first draft is right."""
        prior = _FIRST_GUESS[0] if self._common is None else self._common.first
        return (self.first_hits + _PRIOR_WEIGHT * prior) / (self.first_tries + _PRIOR_WEIGHT)

    @property
    def following(self) -> float:
        """Probability that a draft is right if the one before was."""
        prior = _FIRST_GUESS[1] if self._common is None else self._common.following
        return (self._next_hits + _PRIOR_WEIGHT * prior) / (self._next_tries + _PRIOR_WEIGHT)

    def survival(self, max_drafts: int, *, least: float) -> list[float]:
        """Probabilities that the first 1, 2, ... `max_drafts` drafts are all right, as far as they reach `least`."""
        probability, following, kept = self.first, self.following, []
        while len(kept) < max_drafts and probability >= least:
            kept.append(probability)
            probability *= following
        return kept
