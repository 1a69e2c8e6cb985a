"""A step as plain data: what the scheduler asks for, and what comes back.

Nothing here refers to a request object, a tensor or a page's contents, so a step can be printed, replayed, or sent to
another process. The classes are not frozen only because that triples the time to build one, 64 times per step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aios_kvcache.block import BlockCopy
    from aios_kvcache.swap import Swap
    from aios_model.sampling.rows import SampledToken, SamplingRow, TokenLogprobs
    from aios_sched.request import FinishReason
    from aios_sched.stats import RequestTiming


PENDING_TOKEN = -1
"""Stands for a token that a step on its way is about to sample: the runner has it before anybody else. No model has a
token of this id, so a runner that does not know it fails instead of computing something else."""


@dataclass(slots=True, kw_only=True)
class ScheduledRequest:
    """One request's share of a step.

    Attributes:
        request_id: Whose.
        token_ids: The tokens to compute: known ones, and behind them drafts; [PENDING_TOKEN] for the one that the
            request's newest row samples, in a step that was submitted and has not returned.
        start: Position of the first of them; everything before it is in the pages already.
        block_table: Pages of the request, in order; they cover at least the tokens above. A copy: the table may
            change while the step is on its way.
        sampling: How to draw the token behind the known ones; None for a chunk that does not end what is known.
        num_drafts: How many of the tokens, the last ones, are only guesses. Behind each of them a token is drawn, too,
            and the guesses hold as far as they are what was drawn.
    """

    request_id: str
    token_ids: list[int]
    start: int
    block_table: list[int]
    sampling: SamplingRow | None
    num_drafts: int = 0

    @property
    def num_known_tokens(self) -> int:
        """Tokens that are no drafts."""
        return len(self.token_ids) - self.num_drafts


@dataclass(slots=True, kw_only=True)
class SchedulerOutput:
    """One step.

    Attributes:
        step_id: Counts up.
        requests: The rows, in the order in which the results are applied.
        block_copies: Pages to copy before anything is written.
        num_scheduled_tokens: All tokens of the step; never above the budget.
        finished_request_ids: Requests that will not come again as they were: whatever a runner remembers of them is to
            be dropped, before the step runs.
        swaps: Pages to move between the pool and the tiers below it, in this order, before `block_copies` are made.
        first_swap: Number of the first of them, or of the next there will be. Moves are numbered through all steps, and
            come again under their numbers if their step failed: whoever made them skips them.
    """

    step_id: int
    requests: tuple[ScheduledRequest, ...]
    block_copies: tuple[BlockCopy, ...]
    num_scheduled_tokens: int
    finished_request_ids: tuple[str, ...]
    swaps: tuple[Swap, ...] = ()
    first_swap: int = 0


@dataclass(slots=True, kw_only=True)
class StepResult:
    """What came of a step: a token for every request that was to sample.

    Attributes:
        sampled: The tokens behind the known ones, by request.
        further: Where drafts were right: the tokens drawn behind those, as many as drafts were right.
        lost_swaps: Numbers of the step's moves that could not read their page; what was computed on top is worthless.
    """

    sampled: dict[str, SampledToken]
    further: dict[str, list[SampledToken]] = field(default_factory=dict)
    lost_swaps: tuple[int, ...] = ()


@dataclass(slots=True, kw_only=True)
class TokenOutput:
    """News of one request.

    Attributes:
        request_id: Whose.
        token_ids: New tokens; may be empty in the last output, when it was aborted or failed.
        logprobs: One entry per new token; None where they were not asked for.
        finish_reason: Set in the last output of a request.
        stop_reason: The stop token id that was met, if it was one of `params.stop_token_ids`.
        num_cached_tokens: Prompt tokens that came from the prefix cache.
        error: What went wrong, when finish_reason is "error".
        timing: When it all happened; set in the last output.
    """

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    timing: RequestTiming | None = None

    def extend(self, later: TokenOutput) -> None:
        """Adds the news that came behind these."""
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason
        self.error = later.error
        self.timing = later.timing
