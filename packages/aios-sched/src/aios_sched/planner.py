"""Which tokens run in the next step? The heart of continuous batching.

One token budget, no phases. A step gives every running request that knows its next token a place, then the chunks of
prompts that are being read, then newcomers, until the budget, the seats or the pages are used up. So a long prompt
costs the others at most one step's budget of delay, never its whole length (Sarathi-Serve, arXiv 2403.02310).

Nobody starves. Requests are ordered by importance: the rank that the policy gave them, then arrival. Pages flow only
upwards in that order: who lacks one takes it from the least important, or waits with what it holds. No rank changes
while its request has pages. So the most important request can take from everyone, and alone it fits (`Scheduler.add`
refuses what does not); it finishes, and the next one takes its place. Where a policy has seats change hands, they go
the same way, from the least important one that runs. That every single request becomes the most important one in the
end is up to the policy, and each says why.
"""

from __future__ import annotations

import time
from bisect import insort
from typing import TYPE_CHECKING

from aios_model.sampling.rows import SamplingRow
from aios_sched.admission import Admission
from aios_sched.ahead import may_run_ahead, row_ahead
from aios_sched.errors import SchedulingError
from aios_sched.output import ScheduledRequest
from aios_sched.request import Request, RequestStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from aios_kvcache.block import BlockCopy
    from aios_kvcache.block_manager import BlockManager
    from aios_sched.config import SchedulerConfig
    from aios_sched.policy.base import WaitingQueue


class StepPlanner:
    """Chooses the tokens of a step; admits and preempts for it.

    What is in flight is counted when the scheduler commits a plan, so a plan can be dropped halfway: whoever was
    admitted or preempted for it stays so, and every token is there to be planned again.

    Args:
        config: Limits.
        block_manager: The pages.
        waiting: The policy: those without pages, in the order of admission.
        clock: Tells the time in seconds.

    Attributes:
        running: Those with pages and a seat, the most important first.
        block_copies: Copies of pages that the next step has to make; they outlive a plan that is dropped.
        num_preemptions: Times a running request lost its pages.
        has_drafts: Whether any request has drafts for the next step.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        block_manager: BlockManager,
        waiting: WaitingQueue,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.running: list[Request] = []
        self.block_copies: list[BlockCopy] = []
        self.num_preemptions = 0
        self.has_drafts = False
        self._config = config
        self._block_manager = block_manager
        self._clock = clock
        self._waiting = waiting
        self._admission = Admission(config, block_manager)

    def learn(self, request: Request) -> None:
        """A request came to its own end; admission expects the next ones to be like it."""
        self._admission.learn(request)

    def plan(self) -> StepPlan:
        """The next step; without rows if nothing can run.

        Raises:
            SchedulingError: planning failed at one request, which it names.
        """
        plan = StepPlan(self._config.max_num_batched_tokens, looks_ahead=self._config.schedule_ahead)
        try:
            self._plan_step(plan)
        except Exception as error:
            if plan.current is None:
                raise
            raise SchedulingError(plan.current.request_id, error) from error
        return plan

    def plan_alone(self, request: Request) -> StepPlan:
        """A step of one running request, and as much of it as the budget holds.

        Raises:
            SchedulingError: planning failed.
        """
        plan = StepPlan(self._config.max_num_batched_tokens)
        try:
            if request.num_new_tokens > 0 and self._take_page(request):
                self._take_tokens(request, plan)
        except Exception as error:
            raise SchedulingError(request.request_id, error) from error
        return plan

    def is_still_refused(self, request: Request, budget: int) -> bool:
        """Whether a request that had to wait still has to, with so many tokens left in the step."""
        return self._admission.is_still_refused(request, budget, len(self.running))

    def _plan_step(self, plan: StepPlan) -> None:
        """Drafts come last: they get the tokens and the pages that nobody else has use for."""
        self._free_a_seat(plan)
        num_preemptions = self.num_preemptions
        prefills = self._plan_decodes(plan)
        # Pages that were just taken from someone are not for newcomers.
        plan.admits = num_preemptions == self.num_preemptions
        self._plan_prefills(prefills, plan)
        self._plan_newcomers(plan)
        if self.has_drafts:
            self._plan_drafts(plan)

    def _free_a_seat(self, plan: StepPlan) -> None:
        """Lets the policy give the seat of the least important request to the next one in line."""
        running = self.running
        if len(running) < self._config.max_num_seqs or (running[-1].num_in_flight_tokens and not plan.looks_ahead):
            return
        request, victim = self._waiting.peek(), running[-1]
        if request is None or request.importance() > victim.importance():
            return
        if not self._waiting.may_displace(request, victim):
            return
        if victim.num_in_flight_tokens:
            plan.leaving = victim  # or it would be in flight whenever somebody looks
            return
        del running[-1]
        self._preempt(victim)

    def _plan_decodes(self, plan: StepPlan) -> list[Request]:
        """Gives a place to every request with one token to compute; returns those with more.

        The budget holds one token of each seat, so nobody is left out, unless several steps are to be on their way
        side by side: each then takes its share of the requests and leaves the others to the next. Victims of
        preemption stand behind the request at hand, so removing them does not disturb the iteration.
        """
        prefills = []
        seats = -(-len(self.running) // self._config.max_steps_in_flight)
        for request in self.running:
            num_new = len(request.token_ids) - request.num_computed_tokens - request.num_in_flight_tokens
            if request.has_lost_pages:  # nothing more until it can start over
                continue
            if num_new == 1:
                plan.current = request
                if len(plan.rows) >= seats:
                    continue
                if self._take_page(request):
                    self._take_tokens(request, plan)
                else:
                    plan.looks_ahead = False
            elif num_new > 1:
                prefills.append(request)
            elif plan.looks_ahead and not num_new:  # its next token is still on its way
                plan.current = request
                self._plan_ahead(request, plan)
        return prefills

    def _plan_ahead(self, request: Request, plan: StepPlan) -> None:
        """Gives a place to the token that a step on its way is about to sample.

        Nobody loses pages for a row that may turn out to be in vain: without a page the request waits for its token.
        Nor is anybody behind it planned ahead then: those in flight cannot be preempted, and they would always be.
        """
        if request is plan.leaving or not may_run_ahead(request, max_model_len=self._config.max_model_len):
            return
        request_id, start = request.request_id, len(request.token_ids)
        copies = self._block_manager.reserve(request_id, start=start, end=start + 1)
        if copies is None:
            plan.looks_ahead = False
            return
        self.block_copies += copies
        plan.requests.append(request)
        plan.rows.append(row_ahead(request, self._block_manager.block_table(request_id)))
        plan.budget -= 1

    def _plan_prefills(self, prefills: list[Request], plan: StepPlan) -> None:
        """Continues prompts; they got all their pages when they were admitted. More important newcomers go first."""
        for request in prefills:
            self._plan_newcomers(plan, ahead_of=request)
            if request.status is not RequestStatus.RUNNING:
                continue  # a decode took its pages a moment ago
            plan.current = request
            if request.num_new_tokens > plan.budget and not self._config.enable_chunked_prefill:
                plan.budget = 0  # it goes next: nobody behind it may use what is left
            if not plan.budget:
                return
            self._take_tokens(request, plan)

    def _plan_newcomers(self, plan: StepPlan, *, ahead_of: Request | None = None) -> None:
        """Admits from the queue; strictly in its order, or small requests would keep a large one out for ever."""
        waiting, running, max_num_seqs = self._waiting, self.running, self._config.max_num_seqs
        while plan.admits and plan.budget and len(running) < max_num_seqs and (request := waiting.peek()) is not None:
            if ahead_of is not None and request.importance() > ahead_of.importance():
                return
            plan.current = request
            copies = self._admission.admit(request, running=running, budget=plan.budget)
            if copies is None:
                plan.admits = False
                return
            self.block_copies += copies
            waiting.admit(request)
            request.status = RequestStatus.RUNNING
            if request.first_scheduled_time is None:
                request.first_scheduled_time = self._clock()
            insort(running, request, key=Request.importance)
            self._take_tokens(request, plan)

    def _plan_drafts(self, plan: StepPlan) -> None:
        """Adds drafts to the rows that draw a token, as many as the budget and the free pages hold.

        Nobody gives way to a draft, now or in a step that leaves before this one returns: a page for each running
        request stays free.
        """
        self.has_drafts = False
        for request, row in zip(plan.requests, plan.rows, strict=True):
            drafts = request.draft_token_ids
            if not drafts or row.sampling is None:
                continue
            if not plan.budget:
                return
            plan.current = request
            num_known = len(request.token_ids)
            num_drafts = min(len(drafts), plan.budget, self._num_draft_slots(row))
            if num_drafts:
                self._take_draft_pages(request, row, end=num_known + num_drafts)
                row.token_ids += drafts[:num_drafts]
                row.num_drafts = num_drafts
                plan.budget -= num_drafts

    def _take_draft_pages(self, request: Request, row: ScheduledRequest, *, end: int) -> None:
        """Pages behind those of the row, up to the slot `end`. What those hold is the row's to write already."""
        num_slots = len(row.block_table) * self._block_manager.block_size
        if end <= num_slots:
            return
        copies = self._block_manager.reserve(request.request_id, start=num_slots, end=end)
        assert copies == [], "new pages are nobody else's, and they were counted"
        row.block_table = self._block_manager.block_table(request.request_id)

    def _num_draft_slots(self, row: ScheduledRequest) -> int:
        """Slots behind the row's tokens that drafts may have: those in its pages, and those in pages to spare."""
        manager = self._block_manager
        num_spare = max(0, manager.num_free_blocks - len(self.running))
        return (len(row.block_table) + num_spare) * manager.block_size - row.start - len(row.token_ids)

    def _take_page(self, request: Request) -> bool:
        """Makes the slot of the request's next token writable, at the cost of less important ones if need be.

        Without success the request keeps its pages and sits out this step: only someone more important, who needs
        them more, may take them.
        """
        start = request.num_computed_tokens + request.num_in_flight_tokens
        while True:
            copies = self._block_manager.reserve(request.request_id, start=start, end=start + 1)
            if copies is not None:
                self.block_copies += copies
                return True
            if not self._preempt_one_behind(request):
                return False

    def _preempt_one_behind(self, request: Request) -> bool:
        """Takes its pages from the newest of the least important requests behind `request`; False if there is none.

        One at a time, so that no more are stopped than necessary. Requests in flight are passed over: a step that is
        on its way still reads and writes their pages.
        """
        running = self.running
        for index in range(len(running) - 1, -1, -1):
            victim = running[index]
            if victim is request:
                return False
            if not victim.num_in_flight_tokens:
                del running[index]
                self._preempt(victim)
                return True
        return False

    def _preempt(self, request: Request) -> None:
        """Back to the queue. Its tokens are kept; its keys and values come back from a tier, or are computed again."""
        if not request.has_lost_pages:
            self._block_manager.save(request.request_id, request.token_ids, request.num_computed_tokens)
        self.start_over(request)

    def start_over(self, request: Request) -> None:
        """Back to the queue without pages. One whose pages were lost in a tier does not look for them there again."""
        self._block_manager.free(request.request_id)
        if request.has_lost_pages:
            request.has_lost_pages = request.use_tiers = False
            request.num_cached_tokens = 0
        request.status = RequestStatus.PREEMPTED
        request.draft_token_ids = []
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.push(request)

    def _take_tokens(self, request: Request, plan: StepPlan) -> None:
        """Adds the request's next tokens, as many as it has and the budget holds."""
        request_id, token_ids = request.request_id, request.token_ids
        start = request.num_computed_tokens + request.num_in_flight_tokens
        end = min(len(token_ids), start + plan.budget)
        plan.requests.append(request)
        plan.rows.append(
            ScheduledRequest(
                request_id=request_id,
                token_ids=token_ids[start:end],
                start=start,
                block_table=self._block_manager.block_table(request_id),
                sampling=sampling_row(request) if end == len(token_ids) else None,
            )
        )
        plan.budget -= end - start


class StepPlan:
    """A step in the making.

    Attributes:
        admits: Whether newcomers may come in.
        budget: Tokens that are left.
        current: Who is being planned, and to blame if that fails.
        leaving: Whose seat is to go to somebody else, as soon as no step on its way needs its pages.
        looks_ahead: Whether requests whose next token is on its way may have a place.
        requests: Those that have a place.
        rows: Their shares, in the same order.
    """

    __slots__ = ("admits", "budget", "current", "leaving", "looks_ahead", "requests", "rows")

    def __init__(self, budget: int, *, looks_ahead: bool = False) -> None:
        self.admits = True
        self.budget = budget
        self.current: Request | None = None
        self.leaving: Request | None = None
        self.looks_ahead = looks_ahead
        self.requests: list[Request] = []
        self.rows: list[ScheduledRequest] = []


def sampling_row(request: Request) -> SamplingRow:
    """How to draw the token behind those that are known."""
    return SamplingRow(
        request_id=request.request_id,
        params=request.params,
        seed=request.seed,
        position=len(request.token_ids),
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=request.output_token_ids,
        stop_token_ids=request.stop_token_ids,
    )
