"""What goes into the sampler and what comes out, as plain data: schedulers build these without importing torch.

What is made for every row of every step is not frozen only because that doubles the time to build it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_model.sampling.params import SamplingParams


@dataclass(slots=True, kw_only=True)
class SamplingRow:
    """One row of logits to draw from.

    Attributes:
        request_id: Key of what the sampler remembers between steps (counts of tokens, index arrays).
        params: How to draw.
        seed: int64; with `position`, the only source of randomness.
        position: Position in the sequence of the token being drawn (prompt length for the first one).
        prompt_token_ids: Not copied, never changed.
        output_token_ids: Tokens generated so far; the caller's live list, not copied.
        stop_token_ids: End-of-sequence ids and `params.stop_token_ids`: not drawn before `params.min_tokens`.
    """

    request_id: str
    params: SamplingParams
    seed: int
    position: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    stop_token_ids: frozenset[int] | tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log probabilities at one position, of the model's own distribution: before bans, penalties and temperature.

    Attributes:
        token_id: The token that was chosen.
        logprob: Its natural log probability.
        rank: 1 for the likeliest token; of equal logits the lower id ranks first.
        top: The likeliest (token id, logprob) pairs, best first, as many as `params.logprobs`.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True, kw_only=True)
class SampledToken:
    """The token drawn for one row; `logprobs` only where the request asked for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None
