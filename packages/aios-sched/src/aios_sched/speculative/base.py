"""What speculation asks of those who guess: which tokens come next, and how many guesses are worth checking.

Checking is none of their business. The scheduler puts the guesses into the request's own row, the runner draws a token
at every position of it, and the request keeps what agrees: a bad guess costs time, never a different token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_model.sampling.rows import SamplingRow


@dataclass(slots=True, kw_only=True)
class DraftContext:
    """A request for which drafts are wanted.

    Attributes:
        request_id: Key of what a proposer remembers between steps.
        token_ids: Known tokens, prompt and output; the live list, never changed by a proposer.
        num_prompt_tokens: How many of them are the prompt.
        max_drafts: At most so many are wanted now; at least 1.
        sampling: How the target will draw the token behind `token_ids`: for proposers that sample.
        salt: Only requests with the same salt may guess from each other's text, as with cached pages: else a tenant
            would notice by the clock what another one has been told.
    """

    request_id: str
    token_ids: Sequence[int]
    num_prompt_tokens: int
    max_drafts: int
    sampling: SamplingRow
    salt: str = ""


class Proposer(Protocol):
    """Guesses what comes next. Called between steps, in the engine's thread."""

    def propose(self, contexts: Sequence[DraftContext]) -> list[list[int]]:
        """Guesses for each request the tokens behind its known ones.

        Returns:
            One list per context, of 0 to `max_drafts` token ids.
        """
        ...

    def forget(self, request_id: str) -> None:
        """The request ended or lost its pages; ids that are unknown are ignored."""
        ...

    def close(self) -> None:
        """Lets go of models, pages and threads."""
        ...


class DraftController(Protocol):
    """Decides how many drafts are worth their time, from what became of those before."""

    def num_drafts(self, request_id: str, *, num_requests: int) -> int:
        """Most drafts wanted for the request now; 0 for none.

        Args:
            request_id: A request that awaits its next token.
            num_requests: How many requests run: the more of them, the dearer is each drafted token.
        """
        ...

    def note(self, request_id: str, *, num_drafted: int, num_accepted: int) -> None:
        """A row with `num_drafted` >= 1 drafts returned, of which the first `num_accepted` were right."""
        ...

    def note_step(
        self, *, num_requests: int, num_tokens: int, num_drafts: int, seconds: float, proposer_seconds: float
    ) -> None:
        """A step returned.

        Args:
            num_requests: Rows in it.
            num_tokens: Tokens computed, drafts included.
            num_drafts: Drafted tokens among them.
            seconds: From its submission to its result.
            proposer_seconds: What its drafts took beforehand.
        """
        ...

    def forget(self, request_id: str) -> None:
        """The request ended; ids that are unknown are ignored."""
        ...
