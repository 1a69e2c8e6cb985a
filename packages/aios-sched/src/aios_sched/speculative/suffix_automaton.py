"""A suffix automaton: every substring of some texts, in a few numbers per token. Plain Python.

Blumer et al. 1985, "The smallest automaton recognizing the subwords of a text", built token by token. A state is a set
of substrings that end at the same places; its suffix link leads to the longest of their suffixes that also ends
elsewhere. So the link of the state of the whole text is the longest suffix that has occurred before: what an n-gram
lookup searches for with a fixed n is there at once, at its full length, whatever the length of the text.

Several texts may be entered one after the other; no substring runs across a border.

Most states have one way on, so that one is kept in two arrays and only states that branch have a dictionary. Prose and
code take 140 bytes and 2 µs per token; the worst of texts, random bits, 310 bytes and 4 µs.
"""

from __future__ import annotations

import sys
from array import array
from typing import NamedTuple

ROOT = 0
_NONE = -1
"""In the arrays: no state, no token."""

MAX_COUNTED_LINKS = 32
"""How many suffixes of the text an added token counts for, longest first. All of them would take as many steps as the
text has tokens where it repeats itself; with 32, only short suffixes of such texts are counted too low."""


class Match(NamedTuple):
    """A suffix of some text, found in an automaton.

    Attributes:
        state: The state whose substrings it belongs to.
        length: Its tokens.
    """

    state: int
    length: int


class Continuation(NamedTuple):
    """What followed a substring.

    Attributes:
        token_id: The token.
        state: The substring with that token behind it.
        num_times: How often that occurred.
        num_total: How often the substring occurred with anything behind it.
    """

    token_id: int
    state: int
    num_times: int
    num_total: int


NO_MATCH = Match(ROOT, 0)


class SuffixAutomaton:
    """All substrings of the texts entered, with how often they occurred and what came next.

    Args:
        max_counted_links: See `MAX_COUNTED_LINKS`.
    """

    def __init__(self, *, max_counted_links: int = MAX_COUNTED_LINKS) -> None:
        self._max_counted_links = max_counted_links
        self._num_tokens = 0
        self._last = ROOT
        # Of each state: its longest substring, its suffix link, its occurrences, the end of the newest of them, and
        # its only or first way on; `_branches` has all ways on of the states with more than one.
        self._length = array("i", [0])
        self._link = array("i", [_NONE])
        self._count = array("i", [0])
        self._newest_end = array("i", [0])
        self._token = array("i", [_NONE])
        self._target = array("i", [_NONE])
        self._branches: dict[int, dict[int, int]] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens entered, of all texts."""
        return self._num_tokens

    @property
    def num_states(self) -> int:
        """States, at most twice the tokens."""
        return len(self._length)

    @property
    def num_bytes(self) -> int:
        """Memory that it takes; counts every dictionary, so not for every step."""
        arrays = (self._length, self._link, self._count, self._newest_end, self._token, self._target)
        branches = sum(map(sys.getsizeof, self._branches.values()))
        # The keys and values of the dictionaries: small numbers are shared by all of Python, others take 28 bytes.
        numbers = sum(2 * len(branch) for branch in self._branches.values()) * 28
        return sum(map(sys.getsizeof, arrays)) + sys.getsizeof(self._branches) + branches + numbers

    # -- Writing ---------------------------------------------------------------------------------

    def extend(self, token_id: int) -> None:
        """Adds a token to the current text; on average a few microseconds, whatever its length."""
        self._num_tokens += 1
        known = self._step(self._last, token_id)
        # Only a second text can find its own continuation there already.
        self._last = self._append(token_id) if known == _NONE else self._split(self._last, token_id, known)
        self._count_suffixes(self._last)

    def end_text(self) -> None:
        """The next token begins another text."""
        self._last = ROOT

    def _append(self, token_id: int) -> int:
        """The usual case: the text has not occurred before. Gives every suffix that lacks it a way on to it."""
        link = self._link
        new = self._new_state(self._length[self._last] + 1)
        state = self._last
        while state != _NONE:
            known = self._step(state, token_id)
            if known != _NONE:
                link[new] = self._split(state, token_id, known)
                return new
            self._set_step(state, token_id, new)
            state = link[state]
        link[new] = ROOT
        return new

    def _split(self, state: int, token_id: int, known: int) -> int:
        """The state of exactly the substrings of `state` with the token behind them.

        `known`, where the way on leads, may also hold longer ones, which occurred elsewhere only; then it is cut in
        two.
        """
        length = self._length[state] + 1
        if self._length[known] == length:
            return known
        part = self._new_state(length)
        for field in (self._link, self._count, self._newest_end, self._token, self._target):
            field[part] = field[known]
        if known in self._branches:
            self._branches[part] = self._branches[known].copy()
        self._link[known] = part
        while state != _NONE and self._step(state, token_id) == known:
            self._set_step(state, token_id, part)
            state = self._link[state]
        return part

    def _new_state(self, length: int) -> int:
        self._length.append(length)
        self._link.append(_NONE)
        self._count.append(0)
        self._newest_end.append(0)
        self._token.append(_NONE)
        self._target.append(_NONE)
        return len(self._length) - 1

    def _set_step(self, state: int, token_id: int, target: int) -> None:
        branch = self._branches.get(state)
        if branch is not None:
            branch[token_id] = target
        if self._token[state] in (_NONE, token_id):
            self._token[state] = token_id
            self._target[state] = target
        elif branch is None:
            self._branches[state] = {self._token[state]: self._target[state], token_id: target}

    def _count_suffixes(self, state: int) -> None:
        link, count, newest_end, end = self._link, self._count, self._newest_end, self._num_tokens
        for _ in range(self._max_counted_links):
            if state <= ROOT:
                break
            count[state] += 1
            newest_end[state] = end
            state = link[state]

    # -- Reading ---------------------------------------------------------------------------------

    def longest_repeat(self) -> Match:
        """The longest suffix of the current text that also ends elsewhere: `NO_MATCH` if none does."""
        if self._last == ROOT:
            return NO_MATCH
        # A state that ends at several places has occurred before, as a whole: the text repeats an earlier one.
        state = self._last if self._count[self._last] > 1 else self._link[self._last]
        return Match(state, self._length[state])

    def advance(self, match: Match, token_id: int) -> Match:
        """The longest suffix of a matched text and one more token that occurs here."""
        state, length = match
        while True:
            target = self._step(state, token_id)
            if target != _NONE:
                return Match(target, length + 1)
            if state == ROOT:
                return NO_MATCH
            state = self._link[state]
            length = self._length[state]

    def shorten(self, match: Match) -> Match | None:
        """The next shorter suffix that occurs at further places; None if that is empty."""
        state = self._link[match.state] if match.state != ROOT else ROOT
        return None if state == ROOT else Match(state, self._length[state])

    def count(self, state: int) -> int:
        """How often the substrings of a state occurred."""
        return self._count[state]

    def likeliest(self, state: int) -> Continuation | None:
        """What followed most often, and of equals most recently; None where nothing did."""
        branch = self._branches.get(state)
        if branch is None:
            target = self._target[state]
            return None if target == _NONE else self._continuation(self._token[state], target, self._count[target])
        count, newest_end = self._count, self._newest_end
        token_id, target = max(branch.items(), key=lambda step: (count[step[1]], newest_end[step[1]]))
        return self._continuation(token_id, target, sum([count[other] for other in branch.values()]))

    def _continuation(self, token_id: int, target: int, total: int) -> Continuation:
        # A suffix that counted for too few tokens (see MAX_COUNTED_LINKS) has occurred at least once.
        return Continuation(token_id, target, max(1, self._count[target]), max(1, total))

    def _step(self, state: int, token_id: int) -> int:
        if self._token[state] == token_id:
            return self._target[state]
        branch = self._branches.get(state)
        return _NONE if branch is None else branch.get(token_id, _NONE)
