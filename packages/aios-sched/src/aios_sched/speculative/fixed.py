"""As many drafts as were asked for, always: the plainest controller."""

from __future__ import annotations


class FixedController:
    """Wants the same number of drafts for every request, whatever becomes of them.

    Args:
        num_drafts: How many.
    """

    def __init__(self, num_drafts: int) -> None:
        self._num_drafts = num_drafts

    def num_drafts(self, request_id: str, *, num_requests: int) -> int:
        """See DraftController."""
        return self._num_drafts

    def note(self, request_id: str, *, num_drafted: int, num_accepted: int) -> None:
        """See DraftController."""

    def note_step(
        self, *, num_requests: int, num_tokens: int, num_drafts: int, seconds: float, proposer_seconds: float
    ) -> None:
        """See DraftController."""

    def forget(self, request_id: str) -> None:
        """See DraftController."""
