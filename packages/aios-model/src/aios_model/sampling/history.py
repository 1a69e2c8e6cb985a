"""How often each token has occurred in a request, kept from step to step for the penalties.

Only tokens that have occurred take space: at most the sequence's own length, whatever the vocabulary. The arrays live
in host memory, where counting one token takes under a microsecond; a step sends what it needs to the device at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_TAIL = 128
"""How many of the last counted tokens are compared on each step; a rewound and regrown output differs there."""


class TokenCounts:
    """Occurrences of tokens in one request, brought up to date incrementally.

    Entry i of the three arrays belongs to one token. `sync` accepts any history: an output that grew costs as much as
    it grew, one that was rewound is taken back, and so is an end that differs, such as drafts that were rejected.
    Another prompt, or an output that differs further back, is counted anew.

    Args:
        with_prompt: Whether prompt tokens are entered too (repetition penalty), or only the output's.
    """

    def __init__(self, *, with_prompt: bool) -> None:
        self._with_prompt = with_prompt
        self._prompt: Sequence[int] | None = None
        self._output: list[int] = []
        self._entry_of: dict[int, int] = {}
        self._allocate(0)

    def __len__(self) -> int:
        return len(self._entry_of)

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """[len(self)], in order of first occurrence, prompt first."""
        return self._token_ids[: len(self)]

    @property
    def output_counts(self) -> NDArray[np.int32]:
        """[len(self)], occurrences in the output."""
        return self._output_counts[: len(self)]

    @property
    def in_prompt(self) -> NDArray[np.bool_]:
        """[len(self)], whether the token occurs in the prompt; False throughout without `with_prompt`."""
        return self._in_prompt[: len(self)]

    def sync(self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int]) -> None:
        """Makes the counts those of this prompt and output."""
        if not self._has_prompt(prompt_token_ids):
            self._restart(prompt_token_ids)
        self._rewind(len(output_token_ids))
        self._drop_what_differs(output_token_ids)
        for token in output_token_ids[len(self._output) :]:
            self._count(token)

    def _has_prompt(self, prompt_token_ids: Sequence[int]) -> bool:
        if self._prompt is prompt_token_ids:
            return True
        return self._prompt is not None and list(self._prompt) == list(prompt_token_ids)

    def _drop_what_differs(self, output_token_ids: Sequence[int]) -> None:
        """Takes back the tokens from the first on that the output does not have, if it is one of the last."""
        counted = len(self._output)
        start = max(0, counted - _TAIL)
        tail, wanted = self._output[start:], list(output_token_ids[start:counted])
        if tail == wanted:
            return
        num_equal = next(place for place, pair in enumerate(zip(tail, wanted, strict=True)) if pair[0] != pair[1])
        # Drafts are fewer than half of the tail. Where more than that differs, who knows what does before it.
        is_end = not start or num_equal >= _TAIL // 2
        self._rewind(start + num_equal if is_end else 0)

    def _rewind(self, num_tokens: int) -> None:
        """Takes back the newest tokens, and the entries that they were the first to need."""
        while len(self._output) > num_tokens:
            token = self._output.pop()
            entry = self._entry_of[token]
            self._output_counts[entry] -= 1
            if not self._output_counts[entry] and not self._in_prompt[entry] and entry == len(self) - 1:
                del self._entry_of[token]

    def _restart(self, prompt_token_ids: Sequence[int]) -> None:
        self._prompt = prompt_token_ids
        self._output = []
        in_prompt = np.unique(np.asarray(prompt_token_ids if self._with_prompt else (), dtype=np.int64))
        self._entry_of = {token: entry for entry, token in enumerate(in_prompt.tolist())}
        self._allocate(len(in_prompt))
        self._token_ids[: len(in_prompt)] = in_prompt
        self._in_prompt[: len(in_prompt)] = True

    def _count(self, token: int) -> None:
        self._output.append(token)
        entry = self._entry_of.setdefault(token, len(self._entry_of))
        if entry == len(self._token_ids):
            self._grow()
        self._token_ids[entry] = token
        self._output_counts[entry] += 1

    def _allocate(self, num_entries: int) -> None:
        capacity = num_entries + 64
        self._token_ids = np.zeros(capacity, dtype=np.int64)
        self._output_counts = np.zeros(capacity, dtype=np.int32)
        self._in_prompt = np.zeros(capacity, dtype=np.bool_)

    def _grow(self) -> None:
        self._token_ids = np.concatenate([self._token_ids, np.zeros_like(self._token_ids)])
        self._output_counts = np.concatenate([self._output_counts, np.zeros_like(self._output_counts)])
        self._in_prompt = np.concatenate([self._in_prompt, np.zeros_like(self._in_prompt)])
