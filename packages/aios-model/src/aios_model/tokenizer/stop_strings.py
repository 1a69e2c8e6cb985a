"""Finds stop strings in streamed text."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from aios_model.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class StopScan:
    """Outcome of one `StopStringMatcher.push`.

    Attributes:
        text: Safe to emit now: no stop string can begin in it.
        matched: The stop string that ended the text, None while it goes on.
    """

    text: str
    matched: str | None = None


class StopStringMatcher:
    """Ends a stream at the first stop string, wherever the token borders lie.

    First means the one whose last character comes first in the text, and of several ending there the longest, which
    starts first. That needs no look-ahead and does not depend on how the text was cut; vLLM looks after every token in
    the order of the list, which gives the same unless one token completes several. The matched string is cut off unless
    `include_in_output`; what follows it is dropped.

    The text held back is always the longest end of it that begins some stop string, so the shortest possible. It is an
    Aho-Corasick automaton (CACM 18(6), 1975): linear in the text whatever the strings.

    Raises:
        InvalidRequestError: A stop string is empty.
    """

    def __init__(self, stop: Sequence[str], *, include_in_output: bool = False) -> None:
        if not all(stop):
            raise InvalidRequestError("stop strings must not be empty", param="stop")
        self._include_in_output = include_in_output
        self._automaton = _Automaton(stop)
        self._state = _ROOT
        self._matched: str | None = None

    def push(self, text: str) -> StopScan:
        """Takes more text; gives what of the text so far is certain to be shown and was not given before."""
        if self._matched is not None:
            return StopScan("", self._matched)
        automaton, state = self._automaton, self._state
        if state == _ROOT and automaton.first_characters.isdisjoint(text):
            return StopScan(text)
        word, num_held = automaton.words[state], automaton.depths[state]
        for position, character in enumerate(text, start=1):
            state = automaton.step(state, character)
            matched = automaton.matches[state]
            if matched is not None:
                self._matched, self._state = matched, _ROOT
                num_shown = num_held + position - (0 if self._include_in_output else len(matched))
                return StopScan(_join(word, num_held, text, num_shown), matched)
        self._state = state
        return StopScan(_join(word, num_held, text, num_held + len(text) - automaton.depths[state]))

    def finish(self) -> str:
        """What was held back, now that no more text comes; empty after a match."""
        state, self._state = self._state, _ROOT
        return self._automaton.words[state][: self._automaton.depths[state]]


def _join(word: str, num_held: int, text: str, end: int) -> str:
    """The first `end` characters of `word[:num_held] + text`, copying only those."""
    return word[:end] if end <= num_held else word[:num_held] + text[: end - num_held]


_ROOT = 0


class _Automaton:
    """States are the prefixes of the stop strings; the state after some text is its longest end among them.

    Attributes:
        words: Some stop string that begins with each state's prefix.
        depths: Length of each state's prefix.
        matches: The longest stop string that ends each state's prefix, None where none does.
        first_characters: Characters that leave the root.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [_ROOT]
        self.words = [""]
        self.depths = [0]
        self.matches: list[str | None] = [None]
        for word in words:
            self._insert(word)
        self.first_characters = frozenset(self._next[_ROOT])
        self._link()

    def step(self, state: int, character: str) -> int:
        following = self._next
        while character not in following[state]:
            if state == _ROOT:
                return _ROOT
            state = self._fallback[state]
        return following[state][character]

    def _insert(self, word: str) -> None:
        state = _ROOT
        for depth, character in enumerate(word, start=1):
            child = self._next[state].get(character)
            if child is None:
                child = self._next[state][character] = len(self._next)
                self._next.append({})
                self._fallback.append(_ROOT)
                self.words.append(word)
                self.depths.append(depth)
                self.matches.append(None)
            state = child
        self.matches[state] = word

    def _link(self) -> None:
        """Breadth first, so that a shorter prefix is always linked before it is followed."""
        queue = deque(self._next[_ROOT].values())
        while queue:
            state = queue.popleft()
            for character, child in self._next[state].items():
                queue.append(child)
                fallback = self.step(self._fallback[state], character)
                self._fallback[child] = fallback
                if self.matches[child] is None:
                    self.matches[child] = self.matches[fallback]
