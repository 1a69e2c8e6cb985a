"""Rows for drafted tokens: the row behind a known token, and one behind each draft as if it had been drawn.

Plain Python: the histories share the request's own output instead of copying it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from aios_model.sampling.rows import SamplingRow

if TYPE_CHECKING:
    from collections.abc import Iterator


def rows_with_drafts(row: SamplingRow, draft_token_ids: Sequence[int]) -> list[SamplingRow]:
    """The rows that draw the token behind what is known and the tokens behind each draft.

    Args:
        row: Draws the token behind what is known; returned as the first one.
        draft_token_ids: K guesses of what is drawn, one after the other.

    Returns:
        K + 1 rows. Row j has its own position, and sees the first j drafts as the end of the output. What it draws is
        what the request would draw there if those drafts are right, and means nothing otherwise.
    """
    return [row, *(_row_behind(row, draft_token_ids[:count]) for count in range(1, len(draft_token_ids) + 1))]


class DraftedTokens(Sequence[int]):
    """An output with drafts behind it, without a copy of the output.

    Args:
        output_token_ids: What it begins with, as long as it is now; the list may grow later.
        draft_token_ids: What follows.
    """

    __slots__ = ("_drafts", "_num_output", "_output")

    def __init__(self, output_token_ids: Sequence[int], draft_token_ids: Sequence[int]) -> None:
        self._output = output_token_ids
        self._num_output = len(output_token_ids)
        self._drafts = draft_token_ids

    def __len__(self) -> int:
        return self._num_output + len(self._drafts)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return self._slice(*index.indices(len(self)))
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"index {index} is outside of {len(self)} tokens")
        return self._output[place] if place < self._num_output else self._drafts[place - self._num_output]

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])

    def _slice(self, start: int, stop: int, step: int) -> list[int]:
        if step != 1:
            return [self[place] for place in range(start, stop, step)]
        border = self._num_output
        head = self._output[start : min(stop, border)]
        return [*head, *self._drafts[max(start - border, 0) : max(stop - border, 0)]]


def _row_behind(row: SamplingRow, draft_token_ids: Sequence[int]) -> SamplingRow:
    return SamplingRow(
        request_id=row.request_id,
        params=row.params,
        seed=row.seed,
        position=row.position + len(draft_token_ids),
        prompt_token_ids=row.prompt_token_ids,
        output_token_ids=DraftedTokens(row.output_token_ids, draft_token_ids),
        stop_token_ids=row.stop_token_ids,
    )
