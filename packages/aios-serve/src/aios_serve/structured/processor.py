"""Keeps the outputs of requests to their form: a logits processor over compiled grammars.

The mask at a position depends on the output before it and on nothing else. Preemption, reruns of failed steps, several
steps in flight and drafted tokens all ask for positions in an order of their own: a request's matcher is moved to where
it is asked, forwards by consuming tokens and backwards by taking them back.

Shapes: R rows, V vocabulary, M words of 32 tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from aios_model.errors import InvalidRequestError
from aios_serve.structured.bitmask import apply_masks, num_mask_words
from aios_serve.structured.errors import ConstraintFailedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import llguidance
    from numpy.typing import NDArray
    from torch import Tensor

    from aios_model.sampling.rows import SamplingRow
    from aios_model.sampling.structured import StructuredOutputsParams
    from aios_serve.structured.store import GrammarStore

MAX_FOLLOWED = 1024
"""Requests whose matchers are kept. One that was dropped is followed anew, from the beginning of its output."""

_ALL = np.uint32(0xFFFFFFFF)


class GrammarProcessor:
    """A `LogitsProcessor` for `structured_outputs`.

    Once an output is complete only tokens that end the request are left: end-of-sequence, and its own stop tokens.
    These are also left where the output may end or go on.

    Args:
        store: Compiles.
        vocab_size: Width of the logits.
    """

    def __init__(self, store: GrammarStore, *, vocab_size: int) -> None:
        self._store = store
        self._vocab_size = vocab_size
        self._followed: OrderedDict[str, _Followed] = OrderedDict()

    def applies_to(self, row: SamplingRow) -> bool:
        """See LogitsProcessor."""
        return row.params.structured_outputs is not None

    def __call__(self, logits_RV: Tensor, rows: Sequence[SamplingRow]) -> None:
        """See LogitsProcessor; the first time, a constraint that was not prepared is compiled.

        Raises:
            ConstraintFailedError: Constraints became too complex to follow; names their requests.
        """
        allowed_RM = np.full((len(rows), num_mask_words(self._vocab_size)), _ALL)
        failed: dict[str, str] = {}
        for row, allowed_M in zip(rows, allowed_RM, strict=True):
            if row.params.structured_outputs is None:
                continue
            try:
                self._fill(row, row.params.structured_outputs, allowed_M)
            except _MatcherError as error:
                failed[row.request_id] = str(error)
                self.forget(row.request_id)
        if failed:
            raise ConstraintFailedError(failed)
        apply_masks(logits_RV, allowed_RM)

    def accepts(self, row: SamplingRow, token_id: int) -> bool:
        """See LogitsProcessor. Where anything is unusual, the mask decides."""
        assert row.params.structured_outputs is not None
        try:
            followed = self._follow(row.request_id, row.params.structured_outputs)
            return not followed.move_to(row.output_token_ids) and followed.accepts(token_id)
        except _MatcherError:
            self.forget(row.request_id)
            return False

    def forget(self, request_id: str) -> None:
        """See LogitsProcessor."""
        self._followed.pop(request_id, None)

    @property
    def num_followed(self) -> int:
        """Requests whose matchers are kept."""
        return len(self._followed)

    def _fill(self, row: SamplingRow, constraint: StructuredOutputsParams, allowed_M: NDArray[np.uint32]) -> None:
        followed = self._follow(row.request_id, constraint)
        beyond = followed.move_to(row.output_token_ids)
        if not beyond:
            # One row after the other: llguidance's own threads made a step slower (docs/en/lab-notes.md).
            followed.fill(allowed_M)
            if followed.may_end:
                _allow(allowed_M, row.stop_token_ids)
        elif followed.may_end and self._store.eos_token_ids.union(row.stop_token_ids).issuperset(beyond):
            # It has ended, and the request has not: with ignore_eos.
            allowed_M[:] = 0
            _allow(allowed_M, self._store.eos_token_ids)
            _allow(allowed_M, row.stop_token_ids)
        # Else drafted tokens have left the grammar. What is drawn behind them is thrown away, for the row before them
        # cannot have drawn them.

    def _follow(self, request_id: str, constraint: StructuredOutputsParams) -> _Followed:
        followed = self._followed.get(request_id)
        if followed is None or (followed.constraint is not constraint and followed.constraint != constraint):
            followed = self._followed[request_id] = _Followed(constraint, self._store)
            if len(self._followed) > MAX_FOLLOWED:
                self._followed.popitem(last=False)
        self._followed.move_to_end(request_id)
        return followed


class _MatcherError(Exception):
    """Why a matcher cannot go on."""


class _Followed:
    """One request's matcher, somewhere in its output."""

    def __init__(self, constraint: StructuredOutputsParams, store: GrammarStore) -> None:
        self.constraint = constraint
        self._store = store
        self._matcher = self._new()
        self._consumed: list[int] = []

    @property
    def may_end(self) -> bool:
        """Whether the output so far is complete."""
        return self._matcher.is_accepting()

    def move_to(self, output_token_ids: Sequence[int]) -> Sequence[int]:
        """Consumes this output, or as much of it as the grammar allows; returns the rest."""
        output = list(output_token_ids)
        common = _common_length(self._consumed, output)
        if common < len(self._consumed):
            self._go_back(common)
        if len(self._consumed) < len(output):
            ahead = output[len(self._consumed) :]
            count = self._matcher.try_consume_tokens(ahead)
            self._consumed += ahead[:count]
            self._check()
        return output[len(self._consumed) :]

    def fill(self, allowed_M: NDArray[np.uint32]) -> None:
        """Writes which tokens may come next."""
        self._matcher.unsafe_compute_mask_ptr(allowed_M.ctypes.data, allowed_M.nbytes)
        self._check()

    def accepts(self, token_id: int) -> bool:
        """Whether this token may come next."""
        return self._matcher.validate_tokens([token_id]) == 1

    def _go_back(self, length: int) -> None:
        if not self._matcher.rollback(len(self._consumed) - length):
            self._matcher = self._new()
            length = 0
        del self._consumed[length:]

    def _new(self) -> llguidance.LLMatcher:
        try:
            return self._store.matcher(self.constraint)
        except InvalidRequestError as error:
            raise _MatcherError(str(error)) from None

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().replace("<non-verbose/>", "").split())
            raise _MatcherError(f"after {len(self._consumed)} tokens: {reason[:400]}")


def _common_length(left: list[int], right: list[int]) -> int:
    """Length of the longest common beginning."""
    if right[: len(left)] == left:
        return len(left)
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def _allow(allowed_M: NDArray[np.uint32], token_ids: Iterable[int]) -> None:
    for token_id in token_ids:
        if 0 <= token_id < 32 * len(allowed_M):
            allowed_M[token_id // 32] |= np.uint32(1 << token_id % 32)
