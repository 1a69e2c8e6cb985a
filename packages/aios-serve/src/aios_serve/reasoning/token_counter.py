"""Counts the tokens that a model spends on its thoughts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aios_serve.reasoning.splitter import ThinkMarkers


class ReasoningTokenCounter:
    """Counts the tokens between the markers of one choice, whether a marker is one token or several.

    It works on bytes: a token may end in the middle of a character. Tokens that hold part of a marker do not count.

    Args:
        markers: What stands around thoughts.
        token_bytes: The bytes of a token.
        is_open: As for `ReasoningSplitter`.
    """

    def __init__(self, markers: ThinkMarkers, token_bytes: Callable[[int], bytes], *, is_open: bool) -> None:
        self._start, self._end = markers.start.encode(), markers.end.encode()
        self._token_bytes = token_bytes
        self._is_open = is_open
        self._is_looking = True  # for a marker at the very beginning
        self._is_over = False
        self._tail = b""
        self._lengths: list[int] = []  # of the tokens at the end of it
        self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of thoughts so far."""
        return self._num_tokens if self._is_open else 0

    def push(self, token_ids: Sequence[int]) -> None:
        """Take the next tokens of the choice."""
        for token_id in token_ids:
            if not self._is_over:
                self._push(self._token_bytes(token_id))

    def _push(self, piece: bytes) -> None:
        self._tail += piece
        self._lengths.append(len(piece))
        self._num_tokens += 1
        if self._is_looking and not self._has_begun():
            return
        end = self._tail.find(self._end)
        if end >= 0:
            self._num_tokens -= self._num_tokens_from(end)
            self._is_over = True
        self._forget()

    def _has_begun(self) -> bool:
        """Whether it is known how the text begins; if thoughts can no longer come, there is nothing more to do."""
        begun = self._tail.lstrip()
        if begun.startswith(self._start):
            self._is_open = True
            self._tail, self._lengths, self._num_tokens = begun[len(self._start) :], [], 0
        elif self._start.startswith(begun):
            return False
        self._is_looking = False
        self._is_over = not self._is_open
        return self._is_open

    def _num_tokens_from(self, start: int) -> int:
        """How many of the last tokens reach behind byte `start` of the tail."""
        behind, count = len(self._tail) - start, 0
        for length in reversed(self._lengths):
            if behind <= 0:
                break
            behind -= length
            count += 1
        return count

    def _forget(self) -> None:
        """Keep of the tail what may still become part of a marker."""
        longest = len(self._end)
        if len(self._tail) > 8 * longest:
            self._tail = self._tail[-longest:]
            self._lengths = self._lengths[-4 * longest :]
