"""What recent requests said, for requests that will say it again: suffix automata by salt, bounded. Plain Python.

An automaton cannot forget a text, so each salt has two: the younger grows to half of what the salt may keep, then it
becomes the older one, and what was the older one is gone.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING

from aios_sched.speculative.suffix_automaton import NO_MATCH, Match, SuffixAutomaton

if TYPE_CHECKING:
    from collections.abc import Sequence

_LONGEST_SEARCH = 32
"""Tokens with which a search starts where texts were added; a match that is longer grows from there."""


class RecentTexts:
    """Texts of requests that ended, each to be found under its own salt only.

    Texts are entered a few tokens at a time (`enter`): a long one would hold up a step by milliseconds.

    Args:
        max_tokens: Tokens to keep; the salts used least recently go first. A token takes about 140 bytes.
        max_tokens_per_salt: Of these, what one salt may keep.
    """

    def __init__(self, *, max_tokens: int, max_tokens_per_salt: int) -> None:
        self._max_tokens = max_tokens
        self._max_generation = max(1, min(max_tokens, max_tokens_per_salt) // 2)
        self._generations: OrderedDict[str, deque[SuffixAutomaton]] = OrderedDict()  # the salt used last is last
        self._waiting: deque[tuple[str, Sequence[int]]] = deque()
        self._num_entered = 0  # tokens of the first text that waits

    @property
    def num_tokens(self) -> int:
        """Tokens that can be found."""
        return sum(automaton.num_tokens for pair in self._generations.values() for automaton in pair)

    @property
    def num_bytes(self) -> int:
        """Memory of the automata."""
        return sum(automaton.num_bytes for pair in self._generations.values() for automaton in pair)

    def add(self, salt: str, token_ids: Sequence[int]) -> None:
        """Keeps a text to be entered; of a very long one the end, and of too many texts the newest."""
        if token_ids:
            self._waiting.append((salt, token_ids[-self._max_generation :]))
        while len(self._waiting) > 1 and sum(len(text) for _, text in self._waiting) > self._max_tokens:
            self._waiting.popleft()
            self._num_entered = 0

    def enter(self, max_tokens: int) -> int:
        """Enters up to that many tokens of the texts that wait; returns how many it were."""
        entered = 0
        while self._waiting and entered < max_tokens:
            salt, text = self._waiting[0]
            part = text[self._num_entered : self._num_entered + max_tokens - entered]
            self._enter(salt, part, new_text=0 if self._num_entered else len(text))
            entered += len(part)
            self._num_entered += len(part)
            if self._num_entered == len(text):
                self._waiting.popleft()
                self._num_entered = 0
        return entered

    def generations(self, salt: str) -> Sequence[SuffixAutomaton]:
        """The automata of a salt, younger first."""
        pair = self._generations.get(salt)
        if pair is None:
            return ()
        self._generations.move_to_end(salt)
        return pair

    def _enter(self, salt: str, part: Sequence[int], *, new_text: int) -> None:
        """`new_text` is the length of the text that `part` begins; 0 if it goes on."""
        pair = self._generations.setdefault(salt, deque([SuffixAutomaton()], maxlen=2))
        self._generations.move_to_end(salt)
        if new_text and pair[0].num_tokens + new_text > self._max_generation:
            pair.appendleft(SuffixAutomaton())
        elif new_text:
            pair[0].end_text()
        for token_id in part:
            pair[0].extend(token_id)
        while len(self._generations) > 1 and self.num_tokens > self._max_tokens:
            self._generations.popitem(last=False)


class Cursor:
    """Where a growing text stands in an automaton of other texts."""

    def __init__(self) -> None:
        self._automaton: SuffixAutomaton | None = None
        self._num_tokens = 0
        self._end = 0
        self._match = NO_MATCH

    def find(self, automaton: SuffixAutomaton, token_ids: Sequence[int]) -> Match:
        """The longest suffix of `token_ids` that occurs there, or its last 32 tokens where texts were added since."""
        if self._automaton is not automaton or self._num_tokens != automaton.num_tokens or self._end > len(token_ids):
            self._automaton, self._num_tokens = automaton, automaton.num_tokens
            self._match = NO_MATCH
            self._end = max(0, len(token_ids) - _LONGEST_SEARCH)
        elif len(token_ids) - self._end > _LONGEST_SEARCH:
            self._match = NO_MATCH
            self._end = len(token_ids) - _LONGEST_SEARCH
        for token_id in token_ids[self._end :]:
            self._match = automaton.advance(self._match, token_id)
        self._end = len(token_ids)
        return self._match
