"""Drafts from the request's own text: what followed the last words when they stood there before.

Prompt lookup decoding (Saxena 2023) and the copy part of LLMA (Yang et al. 2023, arXiv 2304.04487): summaries, edits of
code and answers from documents repeat long runs of their prompt. Costs no model and no memory but an index.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_sched.speculative.base import DraftContext


class NgramProposer:
    """Looks for the longest earlier occurrence of the last tokens, the latest one of equally long ones.

    Args:
        max_ngram: Most tokens that have to match.
        min_ngram: Fewest; with no such match nothing is drafted.
    """

    def __init__(self, *, max_ngram: int, min_ngram: int) -> None:
        assert 1 <= min_ngram <= max_ngram
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._indices: dict[str, _NgramIndex] = {}

    def propose(self, contexts: Sequence[DraftContext]) -> list[list[int]]:
        """See Proposer. Each request costs what its new tokens cost, whatever the length of its text."""
        proposals = []
        for context in contexts:
            index = self._indices.get(context.request_id)
            if index is None:
                index = self._indices[context.request_id] = _NgramIndex(self._sizes)
            proposals.append(index.continuation(context.token_ids, context.max_drafts))
        return proposals

    def forget(self, request_id: str) -> None:
        """See Proposer."""
        self._indices.pop(request_id, None)

    def close(self) -> None:
        """See Proposer."""
        self._indices.clear()

    @property
    def num_indexed_requests(self) -> int:
        """Requests whose text is indexed."""
        return len(self._indices)


class _NgramIndex:
    """Where each n-gram of one text was last followed by something: about 130 bytes for each token and size.

    Args:
        sizes: Numbers of tokens, the largest first.
    """

    def __init__(self, sizes: range) -> None:
        self._sizes = sizes
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in sizes]
        self._num_indexed = 0  # n-grams that end at or before this token are known

    def continuation(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """What followed the longest earlier occurrence of the end of `token_ids`; empty without one.

        Where less follows than is wanted, the match reaches up to the end: the text repeats itself, and goes on so.
        """
        self._extend(token_ids)
        length = len(token_ids)
        for size, ends in zip(self._sizes, self._ends, strict=True):
            if size >= length:
                continue
            end = ends.get(tuple(token_ids[length - size :]))
            if end is not None:
                period = token_ids[end : end + num_tokens]
                return [period[place % len(period)] for place in range(num_tokens)]
        return []

    def _extend(self, token_ids: Sequence[int]) -> None:
        """Indexes n-grams that end before the last token; those that end with it have no continuation yet."""
        for end in range(self._num_indexed + 1, len(token_ids)):
            for size, ends in zip(self._sizes, self._ends, strict=True):
                if size <= end:
                    ends[tuple(token_ids[end - size : end])] = end
        self._num_indexed = max(self._num_indexed, len(token_ids) - 1)
