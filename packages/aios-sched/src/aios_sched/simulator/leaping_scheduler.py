"""The scheduler, able to take many steps in one go where nothing can happen between them.

While every running request only decodes, nobody can be admitted and no page is lacking, a step does the same to each of
them: one more token. `foresee` says for how many steps this will go on, `leap` takes them. What touches pages happens
in the very order in which single steps would do it, so block tables, the queue of free pages and the prefix cache are
afterwards what they would have been; a property-based test compares everything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aios_model.sampling.rows import SampledToken
from aios_sched.policy.fcfs import FCFSQueue
from aios_sched.policy.priority import PriorityQueue
from aios_sched.scheduler import Scheduler
from aios_sched.simulator.trace import PLAIN_TOKEN

if TYPE_CHECKING:
    from collections.abc import Collection

    from aios_sched.output import TokenOutput
    from aios_sched.request import Request

MAX_STEPS = 1024
"""Most steps of one stretch: bounds the lists that are made for it."""

SAMPLED = SampledToken(token_id=PLAIN_TOKEN)

_FIXED_ORDERS = (FCFSQueue, PriorityQueue)
"""Policies under which who is next depends on nothing but who waits, and nobody loses a seat to a newcomer."""


@dataclass(slots=True, kw_only=True)
class Stretch:
    """Steps in which the same requests each compute one token.

    Attributes:
        num_steps: How many; in the last one somebody may finish.
        num_sequences: Requests.
        num_context: Tokens of context of the first step.
        num_pages: Pages in the block tables before the first step; those that are shared count repeatedly.
        blocked: Nobody can be admitted before it ends, whoever arrives.
    """

    num_steps: int
    num_sequences: int
    num_context: int
    num_pages: int
    blocked: bool


@dataclass(slots=True, kw_only=True)
class Leap:
    """What came of a stretch.

    Attributes:
        outputs: The last outputs of those that finished in the last step.
        num_pages: Pages in the block tables, in each step.
        num_used: Pages of the pool that are in use, in each step.
    """

    outputs: list[TokenOutput] = field(default_factory=list)
    num_pages: list[int] = field(default_factory=list)
    num_used: list[int] = field(default_factory=list)


class LeapingScheduler(Scheduler):
    """A Scheduler that can also take a stretch of decode steps at once, with every token PLAIN_TOKEN."""

    @property
    def policy_watches(self) -> bool:
        """Whether the policy may decide by how far running requests have got, or give their seats to others."""
        return type(self._waiting) not in _FIXED_ORDERS

    def foresee(self, *, trust_refusal: bool = True) -> Stretch | None:
        """The steps from now on between which nothing will happen; None if the next one has to be planned.

        Args:
            trust_refusal: That no page comes free before a request finishes. Requests that compute the very same
                tokens at the same time give pages back when they notice.
        """
        running, config = self._planner.running, self.config
        if not running or config.max_steps_in_flight > 1 or self._planner.block_copies:
            return None
        if self.block_manager.tiers is not None:  # pages come and go beside the steps
            return None
        blocked = self._is_blocked(trust_refusal=trust_refusal)
        if len(self._waiting) and not blocked:
            return None
        size, max_model_len = self.block_manager.block_size, config.max_model_len
        num_steps, num_context, num_pages = MAX_STEPS, 0, 0
        for request in running:
            num_tokens, num_outputs = len(request.token_ids), len(request.output_token_ids)
            if num_tokens - request.num_computed_tokens != 1 or request.num_in_flight_tokens or not num_outputs:
                return None
            assert request.max_tokens is not None
            left = min(request.max_tokens - num_outputs, max_model_len - num_tokens)
            if left < num_steps:
                num_steps = left
            num_context += num_tokens
            num_pages += (num_tokens + size - 2) // size
        num_steps = self._num_steps_with_pages(num_steps)
        if not num_steps:
            return None
        return Stretch(
            num_steps=num_steps,
            num_sequences=len(running),
            num_context=num_context,
            num_pages=num_pages,
            blocked=blocked,
        )

    def leap(self, stretch: Stretch) -> Leap:
        """Takes the first `stretch.num_steps` steps of what `foresee` returned."""
        count, result = stretch.num_steps, Leap()
        by_phase, ending = self._advance_all(count)
        manager, size, num_pages = self.block_manager, self.block_manager.block_size, stretch.num_pages
        self._forgettable_ids.clear()  # the first of these steps would have told its runner
        self._num_steps += count
        for step in range(count):
            for request in by_phase[(step - 1) % size]:
                start = request.num_computed_tokens - count + step
                copies = manager.reserve(request.request_id, start=start, end=start + 1)
                assert copies == [], "a stretch ran out of pages"
                num_pages += 1
            result.num_pages.append(num_pages)
            result.num_used.append(manager.num_blocks - manager.num_free_blocks)
            if ending and step == count - 1:
                self._end(by_phase[step % size], ending, result.outputs)
            else:
                for request in by_phase[step % size]:
                    num_computed = request.num_computed_tokens - count + step + 1
                    manager.publish(request.request_id, request.token_ids, num_computed)
        return result

    def runs_any(self, request_ids: Collection[str]) -> bool:
        """Whether any of these is running."""
        return bool(request_ids) and any(request.request_id in request_ids for request in self._planner.running)

    def answered_ids(self) -> list[str]:
        """Ids of the open requests that have got a token."""
        return [request_id for request_id, request in self._requests.items() if request.output_token_ids]

    def _is_blocked(self, *, trust_refusal: bool) -> bool:
        """Whether nobody can be admitted before a request finishes, now or later."""
        running, waiting = self._planner.running, self._waiting
        if self.policy_watches:
            return False
        if len(running) >= self.config.max_num_seqs:
            return True
        # Under other policies a newcomer may come to stand before the one that was refused.
        head = waiting.peek() if trust_refusal and type(waiting) is FCFSQueue else None
        budget = self.config.max_num_batched_tokens - len(running)
        return head is not None and self._planner.is_still_refused(head, budget)

    def _num_steps_with_pages(self, num_steps: int) -> int:
        """Of so many steps, those for which there are pages."""
        running, size = self._planner.running, self.block_manager.block_size
        num_free = self.block_manager.num_free_blocks
        if len(running) * (num_steps // size + 1) <= num_free:
            return num_steps
        phases = [request.num_computed_tokens % size for request in running]
        low, high = 0, num_steps
        while low < high:
            middle = (low + high + 1) // 2
            # With m slots filled, of the pages 0, 1, … those up to (m + steps - 1) // size are needed.
            needed = sum((phase + middle - 1) // size - (phase - 1) // size for phase in phases)
            low, high = (middle, high) if needed <= num_free else (low, middle - 1)
        return low

    def _advance_all(self, count: int) -> tuple[list[list[Request]], list[Request]]:
        """Counts `count` tokens for everybody; returns who fills a page in which step, and who will finish.

        The last token of those that finish is left for `_end`.
        """
        size, max_model_len = self.block_manager.block_size, self.config.max_model_len
        by_phase: list[list[Request]] = [[] for _ in range(size)]
        tokens, last = [PLAIN_TOKEN] * count, size - 1
        ending, watches = [], self.policy_watches
        for request in self._planner.running:
            by_phase[last - request.num_computed_tokens % size].append(request)
            request.num_computed_tokens += count
            request.token_ids += tokens
            output = request.output_token_ids
            output += tokens
            if len(output) == request.max_tokens or len(request.token_ids) >= max_model_len:
                del output[-1], request.token_ids[-1]
                ending.append(request)
            if watches:
                self._waiting.charge(request, count - (bool(ending) and ending[-1] is request))
        self.num_generation_tokens += count * len(self._planner.running) - len(ending)
        return by_phase, ending

    def _end(self, publishing: list[Request], ending: list[Request], outputs: list[TokenOutput]) -> None:
        """The last step's results: pages are published and given back in the order of the running requests."""
        ends = set(map(id, ending))
        publishes = set(map(id, publishing))
        for request in self._planner.running:
            if id(request) in publishes:
                self.block_manager.publish(request.request_id, request.token_ids, request.num_computed_tokens)
            if id(request) in ends:
                outputs.append(self._append(request, SAMPLED))
        self._sweep()
