"""What changes logits before a token is drawn: allowed ids, bans, biases, an upper layer's masks, penalties.

Every step costs what its tokens cost, not what the vocabulary does: index arrays of all rows are laid end to end and
applied to the flattened logits in one operation each.

Shapes: R rows, V vocabulary, I indices into the flattened [R * V] logits.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from aios_model.sampling.bad_words import BadWordMatcher
from aios_model.sampling.history import TokenCounts
from aios_model.sampling.params import MAX_LOGPROBS
from aios_model.transfers import upload, upload_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from aios_model.sampling.params import SamplingParams
    from aios_model.sampling.rows import SamplingRow

Indices: TypeAlias = NDArray[np.int64]

MAX_REMEMBERED_REQUESTS = 4096
"""Requests whose arrays are kept; bounds memory where `forget` is never called. One that comes back is counted anew."""

_LARGEST_FACTOR = 1e30
"""Repetition penalties saturate here, far beyond what any logit needs, instead of overflowing float32."""


class LogitsProcessor(Protocol):
    """Changes logits from outside, such as a grammar that masks what it does not accept.

    It runs after allowed ids, bans and biases and before penalties, for greedy rows too, and sets what it excludes to
    -inf. It may be called twice for a row in one step (see `LogitsAdjuster.adjust`), so it keeps no count of calls.

    Rows of drafted tokens come several per request, each with the drafts before it as the end of `output_token_ids`. A
    later draft may be one that this very processor excludes: then nothing depends on what it does to the rows behind,
    but it must not raise, and must not take the rejected tokens for part of the output in later steps.
    """

    def applies_to(self, row: SamplingRow) -> bool:
        """Whether this row's logits are to be changed; rows for which nothing applies are never copied."""
        ...

    def __call__(self, logits_RV: Tensor, rows: Sequence[SamplingRow]) -> None:
        """Changes `logits_RV` in place, leaving alone rows to which this processor does not apply."""
        ...


@dataclass(slots=True, kw_only=True)
class _RequestState:
    """What one request needs at every step, built once."""

    params: SamplingParams
    allowed: Indices | None
    bias_ids: Indices | None
    biases: NDArray[np.float64] | None
    bad_words: BadWordMatcher | None
    counts: TokenCounts | None

    @classmethod
    def of(cls, params: SamplingParams) -> _RequestState:
        bias, allowed = params.logit_bias, params.allowed_token_ids
        return cls(
            params=params,
            allowed=None if allowed is None else np.array(allowed, dtype=np.int64),
            bias_ids=None if bias is None else np.array(list(bias), dtype=np.int64),
            biases=None if bias is None else np.array(list(bias.values()), dtype=np.float64),
            bad_words=BadWordMatcher(params.bad_words_token_ids) if params.bad_words_token_ids else None,
            counts=TokenCounts(with_prompt=params.repetition_penalty != 1.0) if params.has_penalties else None,
        )


class LogitsAdjuster:
    """Applies a batch's bans, biases, processors and penalties, remembering per request what it can reuse."""

    def __init__(self, *, vocab_size: int, processors: Sequence[LogitsProcessor] = ()) -> None:
        self._vocab_size = vocab_size
        self._processors = tuple(processors)
        self._states: OrderedDict[str, _RequestState] = OrderedDict()

    def applies_to(self, row: SamplingRow) -> bool:
        """Whether the row's logits change in this step."""
        return (
            row.params.changes_logits
            or len(row.output_token_ids) < row.params.min_tokens
            or (bool(self._processors) and any(processor.applies_to(row) for processor in self._processors))
        )

    def may_ban(self, row: SamplingRow) -> bool:
        """Whether bad words or min_tokens may exclude tokens in this step, so that nothing could be left."""
        return bool(row.params.bad_words_token_ids) or len(row.output_token_ids) < row.params.min_tokens

    def adjust(self, logits_RV: Tensor, rows: Sequence[SamplingRow], *, with_bans: bool = True) -> None:
        """Changes logits in place, in vLLM's order.

        1. allowed_token_ids: everything else becomes -inf.
        2. bad_words, 3. min_tokens (stop tokens): become -inf. Left out with `with_bans=False`.
        4. logit_bias is added.
        5. Logits processors.
        6. repetition_penalty, then frequency_penalty and presence_penalty.

        Args:
            logits_RV: Contiguous float32 or float64 [R, V].
            rows: The R rows.
            with_bans: False for rows of which the bans have left nothing.
        """
        states = [self._state(row) for row in rows]
        self._keep_allowed(logits_RV, states)
        if with_bans:
            self._ban(logits_RV, rows, states)
        self._add_biases(logits_RV, states)
        for processor in self._processors:
            if any(processor.applies_to(row) for row in rows):
                processor(logits_RV, rows)
        self._penalise(logits_RV, rows, states)

    def forget(self, request_id: str) -> None:
        """Drops what is remembered of a request; unknown ids are ignored."""
        self._states.pop(request_id, None)

    @property
    def num_remembered(self) -> int:
        """Requests of which something is remembered."""
        return len(self._states)

    def _state(self, row: SamplingRow) -> _RequestState:
        state = self._states.get(row.request_id)
        if state is None or (state.params is not row.params and state.params != row.params):
            # A token id beyond the vocabulary would be an index into the next row, another request's.
            row.params.validate_for(vocab_size=self._vocab_size, max_logprobs=MAX_LOGPROBS)
            state = self._states[row.request_id] = _RequestState.of(row.params)
            if len(self._states) > MAX_REMEMBERED_REQUESTS:
                self._states.popitem(last=False)
        self._states.move_to_end(row.request_id)
        return state

    def _keep_allowed(self, logits_RV: Tensor, states: Sequence[_RequestState]) -> None:
        parts = [(index, state.allowed) for index, state in enumerate(states) if state.allowed is not None]
        if not parts:
            return
        flat, indices_I = logits_RV.view(-1), self._flat_indices(parts, logits_RV.device)
        allowed_I = flat[indices_I]
        index_P = upload([index for index, _ in parts], dtype=torch.int64, device=logits_RV.device)
        logits_RV.index_fill_(0, index_P, -torch.inf)
        flat[indices_I] = allowed_I

    def _ban(self, logits_RV: Tensor, rows: Sequence[SamplingRow], states: Sequence[_RequestState]) -> None:
        parts: list[tuple[int, Indices]] = []
        for index, (row, state) in enumerate(zip(rows, states, strict=True)):
            banned = state.bad_words.banned(row.output_token_ids) if state.bad_words else []
            if len(row.output_token_ids) < row.params.min_tokens:
                # An end-of-sequence id outside the output width cannot be drawn anyway.
                banned += [token for token in row.stop_token_ids if 0 <= token < self._vocab_size]
            if banned:
                parts.append((index, np.array(banned, dtype=np.int64)))
        if parts:
            logits_RV.view(-1)[self._flat_indices(parts, logits_RV.device)] = -torch.inf

    def _add_biases(self, logits_RV: Tensor, states: Sequence[_RequestState]) -> None:
        parts = [(index, state.bias_ids) for index, state in enumerate(states) if state.bias_ids is not None]
        if parts:
            biases = np.concatenate([state.biases for state in states if state.biases is not None])
            logits_RV.view(-1)[self._flat_indices(parts, logits_RV.device)] += _to_tensor(biases, logits_RV)

    def _penalise(self, logits_RV: Tensor, rows: Sequence[SamplingRow], states: Sequence[_RequestState]) -> None:
        """With count c of a token in the output: l = l / r or l * r, then l - frequency * c - presence * (c > 0)."""
        parts, factors, amounts = [], [], []
        for index, (row, state) in enumerate(zip(rows, states, strict=True)):
            if (counts := state.counts) is None:
                continue
            # Worked out here and now: two rows of one request (drafted tokens) share the counts at different lengths.
            counts.sync(row.prompt_token_ids, row.output_token_ids)
            params, in_output = row.params, counts.output_counts > 0
            parts.append((index, counts.token_ids))
            factors.append(np.where(in_output | counts.in_prompt, params.repetition_penalty, 1.0))
            amounts.append(params.frequency_penalty * counts.output_counts + params.presence_penalty * in_output)
        if not parts:
            return
        indices_I = self._flat_indices(parts, logits_RV.device)
        factors_I = _to_tensor(np.concatenate(factors).clip(1.0 / _LARGEST_FACTOR, _LARGEST_FACTOR), logits_RV)
        penalised_I = logits_RV.view(-1)[indices_I]
        penalised_I = torch.where(penalised_I > 0, penalised_I / factors_I, penalised_I * factors_I)
        logits_RV.view(-1)[indices_I] = penalised_I - _to_tensor(np.concatenate(amounts), logits_RV)

    def _flat_indices(self, parts: Sequence[tuple[int, Indices]], device: torch.device) -> Tensor:
        """Indices of (row, token ids) pairs into the flattened logits, int64 [I]."""
        token_ids = np.concatenate([part for _, part in parts])
        starts = np.repeat([index * self._vocab_size for index, _ in parts], [len(part) for _, part in parts])
        return upload_tensor(torch.from_numpy(token_ids + starts), device)


def _to_tensor(values: NDArray[np.float64], like: Tensor) -> Tensor:
    return upload_tensor(torch.from_numpy(values).to(like.dtype), like.device)
