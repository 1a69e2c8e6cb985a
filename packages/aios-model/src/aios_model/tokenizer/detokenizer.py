"""The text of a sequence that is still growing."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aios_model.tokenizer.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Turns token ids into text as they arrive, in constant time per token.

    Everything pushed and then finished, joined, is what `Tokenizer.decode` gives for the prompt and the output together
    less what it gives for the prompt: for any split, and for ids whose bytes are not UTF-8. A character is held back
    until its last byte is there.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        """
        Args:
            tokenizer: Whose vocabulary the ids are from.
            prompt_token_ids: What precedes the output. A leading space is part of the text only after something, and a
                prompt may end in half a character.
            skip_special_tokens: Leave control tokens out of the text.
        """
        self._pieces = tokenizer.pieces
        self._skipped: frozenset[int] = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_first = True
        self._num_stripped_spaces = self._pieces.num_stripped_spaces
        self._enter_context(prompt_token_ids)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text these ids complete; empty while a character is unfinished."""
        pieces, skipped = self._pieces, self._skipped
        if self._is_first or self._num_stripped_spaces:
            return self._utf8.decode(self._open(token_ids))
        return self._utf8.decode(b"".join([pieces[token_id] for token_id in token_ids if token_id not in skipped]))

    def finish(self) -> str:
        """What was held back: U+FFFD if the sequence ended within a character, else nothing."""
        return self._utf8.decode(b"", final=True)

    def _enter_context(self, prompt_token_ids: Sequence[int]) -> None:
        for token_id in prompt_token_ids:
            if not (self._is_first or self._num_stripped_spaces):
                break
            self._open([token_id])
        # UTF-8 synchronises itself: an unfinished character at the end is decided by the last three bytes alone.
        tail = b""
        for token_id in reversed(prompt_token_ids):
            if len(tail) >= 3:
                break
            if token_id not in self._skipped:
                tail = self._pieces[token_id] + tail
        self._utf8.decode(tail)

    def _open(self, token_ids: Sequence[int]) -> bytes:
        """Bytes of tokens at the start of the text, without the leading space that the tokenizer added in encoding."""
        shown = [token_id for token_id in token_ids if token_id not in self._skipped and self._pieces[token_id]]
        if not shown:
            return b""
        opening = self._pieces.first(shown[0]) if self._is_first else self._pieces[shown[0]]
        self._is_first = False
        data = opening + b"".join([self._pieces[token_id] for token_id in shown[1:]])
        while self._num_stripped_spaces and data.startswith(b" "):
            data = data[1:]
            self._num_stripped_spaces -= 1
        if data:
            self._num_stripped_spaces = 0
        return data
