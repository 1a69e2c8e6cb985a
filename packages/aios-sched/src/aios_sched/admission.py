"""May the next one come in? The question asked of the request at the front of the queue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aios_sched.output_estimate import OutputEstimator, peak_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_kvcache.block import BlockCopy
    from aios_kvcache.block_manager import BlockManager
    from aios_sched.config import SchedulerConfig
    from aios_sched.request import Request


class Admission:
    """Gives pages to requests that have none, or makes them wait.

    Besides its pages there must be room for what those that run and this one are expected to grow by, so that it is
    not admitted only to be preempted a few steps later. Whoever waits for that waits for others that run, and those
    finish; with nobody running there is nothing to wait for.

    A request gets the pages of all its known tokens at once, though its prompt may be computed in many chunks: were
    they given chunk by chunk, two half-read prompts could each hold what the other one lacks.

    Args:
        config: The scheduler's.
        block_manager: The pool.
    """

    def __init__(self, config: SchedulerConfig, block_manager: BlockManager) -> None:
        self._chunked = config.enable_chunked_prefill
        self._block_manager = block_manager
        self._block_size = block_manager.block_size
        # A page that holds a whole sequence never needs a second one: the contiguous policy needs no reserve.
        paged = block_manager.block_size < config.max_model_len
        self._watermark = max(1, int(block_manager.num_blocks * config.watermark)) if paged and config.watermark else 0
        self._expectation = config.expected_output if paged else "none"
        self._estimator = OutputEstimator()
        self._refusal: _Refusal | None = None

    def learn(self, request: Request) -> None:
        """A request came to its own end: the next ones are expected to be like it."""
        self._estimator.observe(request)

    def admit(self, request: Request, *, running: Sequence[Request], budget: int) -> list[BlockCopy] | None:
        """Opens the request's block table with what the prefix cache has, and takes pages for the rest.

        Args:
            request: One that waits.
            running: Those that run. Without any, there is nothing to wait for and no reserve to keep.
            budget: Tokens that the step has left.

        Returns:
            Pages to copy before the request runs; None if it has to wait, and then nothing has changed.
        """
        if running and self.is_still_refused(request, budget, len(running)):
            return None
        manager, request_id = self._block_manager, request.request_id
        num_free_blocks = manager.num_free_blocks
        num_cached = self._open(request, running)
        copies = None
        try:
            self._refusal = self._reason_to_wait(request, num_cached, num_free_blocks, running, budget)
            if self._refusal is None:
                copies = manager.reserve(request_id, start=num_cached, end=request.num_tokens)
        finally:
            if copies is None:
                manager.free(request_id)
        if copies is not None:
            request.num_computed_tokens = num_cached
            if not request.num_preemptions:
                request.num_cached_tokens = num_cached
        return copies

    def is_still_refused(self, request: Request, budget: int, num_running: int) -> bool:
        """Whether a request that `admit` refused need not be looked at yet: there is no more room than there was.

        Spares a blocked request from being hashed again in every step.
        """
        refusal = self._refusal
        if refusal is None or refusal.request is not request:
            return False
        if num_running < refusal.num_running:  # somebody left: what is expected has changed
            return False
        return self._block_manager.num_free_blocks < refusal.num_free_blocks or budget < refusal.budget

    def _open(self, request: Request, running: Sequence[Request]) -> int:
        """Starts the request's block table with the most that can be had; returns how many tokens that are."""
        manager, request_id = self._block_manager, request.request_id
        num_cached = manager.open(request_id, request.token_ids, salt=request.cache_salt, use_tiers=request.use_tiers)
        # All but the newest of its tokens: the logits behind that one are wanted.
        num_shared = min(len(request.prompt_token_ids), request.num_tokens - 1)
        if num_shared > num_cached and (twin := self._find_twin(request, num_shared, running)) is not None:
            manager.free(request_id)
            manager.fork(twin.request_id, request_id, num_tokens=num_shared, num_queried=request.num_tokens)
            return num_shared
        return num_cached

    def _find_twin(self, request: Request, num_shared: int, running: Sequence[Request]) -> Request | None:
        """Somebody with the very same prompt who has computed it: one of the n choices of the same request, mostly.

        The prefix cache would serve whole pages of it; forked, a page that is not full is shared too, and the last.
        """
        if not self._block_manager.enable_prefix_caching:  # then nobody is to notice what others asked
            return None
        for other in running:
            if (
                other.num_computed_tokens >= num_shared
                and other.prompt_token_ids == request.prompt_token_ids
                and other.cache_salt == request.cache_salt
                and not other.has_lost_pages
                and self._block_manager.can_share(other.request_id, num_shared)
            ):
                return other
        return None

    def _reason_to_wait(
        self, request: Request, num_cached: int, num_free_blocks: int, running: Sequence[Request], budget: int
    ) -> _Refusal | None:
        if not running:
            return None
        num_rest = request.num_tokens - num_cached
        if num_rest > budget and not self._chunked:
            return _Refusal(request=request, budget=num_rest)
        manager = self._block_manager
        num_missing = -(-request.num_tokens // self._block_size) - len(manager.block_table(request.request_id))
        if num_missing + self._watermark > manager.num_free_blocks:
            return _Refusal(request=request, num_free_blocks=num_free_blocks + 1)
        if self._expectation != "none" and not self._will_fit(request, num_missing, running):
            return _Refusal(request=request, num_free_blocks=num_free_blocks + 1, num_running=len(running))
        if self._is_being_computed(request, num_cached, running):
            return _Refusal(request=request)
        return None

    def _will_fit(self, request: Request, num_missing: int, running: Sequence[Request]) -> bool:
        """Whether the pool will hold all that run, and this request, when they need the most pages together."""
        if self._expectation == "estimated" and not self._estimator.knows_anything:
            return True
        size, manager = self._block_size, self._block_manager
        lengths = [(len(other.token_ids), self._num_remaining(other)) for other in (*running, request)]
        num_used = manager.num_blocks - manager.num_free_blocks + num_missing
        # Pages that several hold count once; of those that are left, as many share as do now.
        num_shared = max(0, sum(-(-num_tokens // size) for num_tokens, _ in lengths) - num_used)
        shared, half_a_page = num_shared / (len(lengths) - 1), (size - 1) / (2 * size)
        limit = manager.num_blocks - self._watermark
        return all(
            num_tokens / size + num_left * half_a_page - (num_left - 1) * shared <= limit
            for num_left, num_tokens in peak_tokens(lengths)
        )

    def _num_remaining(self, request: Request) -> int:
        if self._expectation == "estimated":
            return self._estimator.remaining(request)
        assert request.max_tokens is not None, "the scheduler resolves it"
        return request.max_tokens - len(request.output_token_ids)

    def _is_being_computed(self, request: Request, num_cached: int, running: Sequence[Request]) -> bool:
        """Whether somebody is computing the very page that this request needs next.

        Then it pays to wait: of many requests with the same new prompt (the n choices of one, say), the first computes
        it and the others find it in the cache a step later.
        """
        end = num_cached + self._block_size
        # The cache never serves a request's last token, so the page that holds it is not worth waiting for.
        if not self._block_manager.enable_prefix_caching or request.num_tokens <= end:
            return False
        tokens = request.token_ids[num_cached:end]
        return any(
            other.num_computed_tokens < end <= other.num_tokens
            and other.token_ids[num_cached:end] == tokens
            and other.cache_salt == request.cache_salt
            and other.token_ids[:num_cached] == request.token_ids[:num_cached]
            for other in running
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Refusal:
    """What must be there before it is worth looking at a request again: so many free pages, so much budget.

    Fewer than `num_running` requests that run are a reason, too.
    """

    request: Request
    num_free_blocks: int = 0
    budget: int = 0
    num_running: int = 0
