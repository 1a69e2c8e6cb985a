"""Words a request must not complete: from text to token sequences, and which tokens they ban at a given point."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from aios_model.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aios_model.sampling.params import SamplingParams


class Encoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ...


class BadWordMatcher:
    """Finds the tokens that would complete a banned sequence.

    As in vLLM only the last token of a sequence is banned, and only where the tokens before it are the last of the
    *output*. Sequences are filed under the token they wait for, so that a step looks at few of them.
    """

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        self._always: list[int] = []
        self._after: dict[int, list[tuple[list[int], int]]] = {}
        for sequence in sequences:
            *prefix, last = sequence
            if prefix:
                self._after.setdefault(prefix[-1], []).append((prefix, last))
            else:
                self._always.append(last)

    def banned(self, output_token_ids: Sequence[int]) -> list[int]:
        """Ids that must not come next after `output_token_ids`."""
        waiting = self._after.get(output_token_ids[-1], ()) if output_token_ids else ()
        return self._always + [last for prefix, last in waiting if list(output_token_ids[-len(prefix) :]) == prefix]


def resolve_bad_words(params: SamplingParams, tokenizer: Encoder) -> SamplingParams:
    """Adds the token sequences of `params.bad_words` to `params.bad_words_token_ids`.

    Each word is encoded bare and with a leading space, since most tokenizers spell it differently at the start of a
    text and inside it. vLLM drops the spaced form where it has another number of tokens than the bare one, and so
    misses " word" as one token beside "wo" + "rd"; here both forms are banned.

    Args:
        params: Returned as they are if they ban no words.
        tokenizer: Encodes without special tokens.

    Raises:
        InvalidRequestError: A word has no tokens.
    """
    if not params.bad_words:
        return params
    sequences: list[list[int]] = []
    for word in params.bad_words:
        bare = tokenizer.encode(word.lstrip(), add_special_tokens=False)
        if not bare:
            raise InvalidRequestError(f"bad_words: {word!r} has no tokens, so it cannot be banned", param="bad_words")
        spaced = tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
        sequences += [bare, spaced] if spaced else [bare]
    return params.with_bad_words_token_ids(sequences)
