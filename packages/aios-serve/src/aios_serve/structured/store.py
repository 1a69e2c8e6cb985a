"""Compiled constraints, in the process that samples."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING

from aios_serve.structured.grammar import new_matcher

if TYPE_CHECKING:
    from collections.abc import Callable

    import llguidance

    from aios_model.sampling.structured import StructuredOutputsParams
    from aios_serve.structured.vocabulary import Vocabulary

MAX_GRAMMARS = 64


class GrammarStore:
    """Compiles each constraint once and hands out copies; remembers the last 64. Thread-safe.

    Args:
        read_vocabulary: The model's vocabulary; called when the first constraint comes.
    """

    def __init__(self, read_vocabulary: Callable[[], Vocabulary]) -> None:
        self._read_vocabulary = read_vocabulary
        self._lock = threading.Lock()
        self._compiling = threading.Lock()
        self._grammars: OrderedDict[StructuredOutputsParams, llguidance.LLMatcher] = OrderedDict()

    def prepare(self, constraint: StructuredOutputsParams) -> Future[None] | None:
        """Compiles a constraint in a thread, without holding up whoever asks; None if that was done before.

        The future holds the GrammarError if it cannot be compiled.
        """
        with self._lock:
            if constraint in self._grammars:
                return None
        return self._thread.submit(self._prepare, constraint)

    def matcher(self, constraint: StructuredOutputsParams) -> llguidance.LLMatcher:
        """A matcher at the beginning of its text, the caller's own; compiles the constraint if need be.

        Raises:
            GrammarError: It cannot be compiled.
        """
        return self._compiled(constraint).deep_copy()

    @property
    def num_grammars(self) -> int:
        """Compiled constraints that are kept."""
        return len(self._grammars)

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a sequence."""
        return frozenset(self._vocabulary.eos_token_ids)

    def _prepare(self, constraint: StructuredOutputsParams) -> None:
        self._compiled(constraint)

    def _compiled(self, constraint: StructuredOutputsParams) -> llguidance.LLMatcher:
        known = self._known(constraint)
        if known is not None:
            return known
        with self._compiling:  # one at a time: the engine has better uses for its cores
            known = self._known(constraint)
            if known is not None:  # it was being compiled already
                return known
            matcher = new_matcher(constraint, self._tokenizer)
        with self._lock:
            self._grammars[constraint] = matcher
            if len(self._grammars) > MAX_GRAMMARS:
                self._grammars.popitem(last=False)
        return matcher

    def _known(self, constraint: StructuredOutputsParams) -> llguidance.LLMatcher | None:
        with self._lock:
            if constraint in self._grammars:
                self._grammars.move_to_end(constraint)
            return self._grammars.get(constraint)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return self._read_vocabulary()

    @cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        return self._vocabulary.build()

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="aios-grammar")
