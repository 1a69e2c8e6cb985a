"""Drafts from text that repeats: the longest suffix that has occurred before, and what followed it most often.

SuffixDecoding (Oliaro et al. 2024, arXiv 2411.04975) on suffix automata instead of trees: over the request's own text,
prompt and output, and over outputs of recent requests of the same salt. A lookup finds the longest match of any
length, and costs no more for a long text than for a short one. Plain Python.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from aios_model.errors import ConfigError
from aios_sched.speculative.suffix_automaton import Match, SuffixAutomaton
from aios_sched.speculative.suffix_store import Cursor, RecentTexts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_sched.speculative.base import DraftContext

_MOST_REMEMBERED = 1024
"""Requests of which it is kept how much of their output was stored: one that lost its pages goes on, and ends again."""


class SuffixProposer:
    """Proposes what followed the longest match; see `base.Proposer`.

    Of a match of m tokens, a token that followed it in c of n cases is believed to come again with c / (n + 1/m):
    the longer a match, the more a single occurrence says. Drafts end where all of them together are believed less than
    `min_probability`. After a single occurrence that is after m * (1 / min_probability - 1) of them.

    Args:
        min_match: Shortest match, in tokens.
        min_probability: Above 0, at most 1; see above.
        max_request_tokens: Of a request's text, the most to keep; beyond it, the older half is forgotten. A token takes
            about 140 bytes while the request runs.
        max_store_tokens: Tokens of recent outputs to keep, for all salts together; 0 keeps none.
        max_tokens_per_salt: The same for each salt.
        max_new_tokens: Tokens to read in one call, beyond the few that every request gains in a step: they take 2 µs
            each, and a long prompt shall not hold up other requests. Until all is read, its request gets no drafts.

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(
        self,
        *,
        min_match: int = 2,
        min_probability: float = 0.25,
        max_request_tokens: int = 32_768,
        max_store_tokens: int = 262_144,
        max_tokens_per_salt: int = 65_536,
        max_new_tokens: int = 512,
    ) -> None:
        for name, value, low in (
            ("min_match", min_match, 1),
            ("max_request_tokens", max_request_tokens, 2 * _STEP_TOKENS),
            ("max_store_tokens", max_store_tokens, 0),
            ("max_tokens_per_salt", max_tokens_per_salt, 0),
            ("max_new_tokens", max_new_tokens, 1),
        ):
            if value < low:
                raise ConfigError(f"{name} must be at least {low}, not {value}")
        if not 0.0 < min_probability <= 1.0:
            raise ConfigError(f"min_probability must be above 0 and at most 1, not {min_probability}")
        self._min_match = min_match
        self._min_probability = min_probability
        self._max_request_tokens = max_request_tokens
        self._max_new_tokens = max_new_tokens
        keeps_texts = max_store_tokens > 0 and max_tokens_per_salt > 0
        self._store: RecentTexts | None = None
        if keeps_texts:
            self._store = RecentTexts(max_tokens=max_store_tokens, max_tokens_per_salt=max_tokens_per_salt)
        self._texts: dict[str, _RequestText] = {}
        self._num_stored: OrderedDict[str, int] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Memory of all texts; counts everything, so not for every step."""
        own = sum(text.automaton.num_bytes for text in self._texts.values())
        return own if self._store is None else own + self._store.num_bytes

    def propose(self, contexts: Sequence[DraftContext]) -> list[list[int]]:
        """See `base.Proposer`; 2 µs per token that is new and 1 to 2 per draft: 33 µs
        where eight drafts are made and seven were right, 5 where nothing matches."""
        budget = self._max_new_tokens
        if self._store is not None:
            budget -= self._store.enter(budget)
        drafts: list[list[int]] = []
        for context in contexts:
            text = self._text_of(context)
            budget -= text.read(max(0, budget))
            drafts.append(self._draft(text, context) if text.is_complete else [])
        return drafts

    def forget(self, request_id: str) -> None:
        """Moves what the request said to the recent texts."""
        text = self._texts.pop(request_id, None)
        if text is None or self._store is None:
            return
        output = text.token_ids[text.num_prompt_tokens :]
        num_stored = min(self._num_stored.pop(request_id, 0), len(output))
        self._store.add(text.salt, output[num_stored:])
        self._num_stored[request_id] = len(output)
        if len(self._num_stored) > _MOST_REMEMBERED:
            self._num_stored.popitem(last=False)

    def close(self) -> None:
        """Forgets everything."""
        self._texts.clear()
        self._num_stored.clear()
        self._store = None

    def _text_of(self, context: DraftContext) -> _RequestText:
        text = self._texts.get(context.request_id)
        if text is None or not text.belongs_to(context):
            text = self._texts[context.request_id] = _RequestText(context, max_tokens=self._max_request_tokens)
        return text

    def _draft(self, text: _RequestText, context: DraftContext) -> list[int]:
        """Of what each automaton suggests, that of which most is believed to be right."""
        best = self._follow(text.automaton, text.automaton.longest_repeat(), context.max_drafts)
        if self._store is not None:
            for automaton, cursor in zip(self._store.generations(text.salt), text.cursors, strict=False):
                guess = self._follow(automaton, cursor.find(automaton, text.token_ids), context.max_drafts)
                best = max(best, guess, key=lambda guess: guess.expected)  # of equals its own text, then the newer
        return best.drafts

    def _follow(self, automaton: SuffixAutomaton, match: Match | None, max_drafts: int) -> _Guess:
        drafts: list[int] = []
        probability, expected = 1.0, 0.0
        while match is not None and match.length >= self._min_match and len(drafts) < max_drafts:
            step = automaton.likeliest(match.state)
            if step is None:  # the end of a text: the drafts go on as they would behind a shorter suffix of it
                match = automaton.shorten(match)
                continue
            probability *= step.num_times / (step.num_total + 1.0 / match.length)
            if probability < self._min_probability:
                break
            drafts.append(step.token_id)
            expected += probability
            match = Match(step.state, match.length + 1)
        return _Guess(drafts, expected)


_STEP_TOKENS = 64
"""Tokens that a request may gain in a step without being counted as new: more than are ever drafted."""


class _Guess(NamedTuple):
    drafts: list[int]
    expected: float  # how many of the drafts are believed to be right


class _RequestText:
    """A request's own text, read as far as there was time for it."""

    def __init__(self, context: DraftContext, *, max_tokens: int) -> None:
        self.token_ids = context.token_ids  # the live list
        self.num_prompt_tokens = context.num_prompt_tokens
        self.salt = context.salt
        self.automaton = SuffixAutomaton()
        self.cursors = (Cursor(), Cursor())
        self._max_tokens = max_tokens
        self._num_read = max(0, len(context.token_ids) - max_tokens // 2)

    @property
    def is_complete(self) -> bool:
        """Whether all known tokens are read: drafts follow the last one."""
        return self._num_read == len(self.token_ids)

    def belongs_to(self, context: DraftContext) -> bool:
        """Whether what was read is how the context's tokens begin."""
        if self.token_ids is not context.token_ids:
            if self.token_ids[: self._num_read] != context.token_ids[: self._num_read]:
                return False
            self.token_ids = context.token_ids
        return self._num_read <= len(self.token_ids)

    def read(self, max_tokens: int) -> int:
        """Reads on; returns how many tokens that takes from the budget `max_tokens` of the call."""
        if self.automaton.num_tokens > self._max_tokens:
            self.automaton = SuffixAutomaton()
            self._num_read = len(self.token_ids) - self._max_tokens // 2
        missing = len(self.token_ids) - self._num_read
        part = self.token_ids[self._num_read : self._num_read + max(max_tokens, _STEP_TOKENS)]
        for token_id in part:
            self.automaton.extend(token_id)
        self._num_read += len(part)
        return 0 if missing <= _STEP_TOKENS else len(part)
