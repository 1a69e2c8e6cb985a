"""Random operations on scheduler and block manager; `conftest.Driver` checks the invariants after every move."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios_kvcache.block_manager import BlockManager
from aios_sched.output import StepResult
from aios_sched.planner import StepPlanner
from aios_sched.request import RequestStatus
from aios_sched.scheduler import Scheduler


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32), num_moves=st.integers(1, 150))
def test_any_sequence_of_operations_gives_each_request_the_tokens_it_gets_alone(lab, seed, num_moves):
    lab.Driver(seed).run(num_moves)


def test_the_driver_reaches_what_it_claims_to_test(lab):
    """Otherwise the test above could be green because nothing ever happens."""
    drivers = [lab.Driver(seed).run(100) for seed in range(90)]
    assert sum(driver.scheduler.num_preemptions for driver in drivers) > 100
    assert sum(driver.block_manager.stats.hits for driver in drivers) > 500
    assert sum(driver.block_manager.stats.evictions for driver in drivers) > 500
    tiers = [driver.block_manager.tiers.stats for driver in drivers if driver.block_manager.tiers]
    assert sum(stats.num_saves for stats in tiers) > 30
    assert sum(stats.num_fetched for stats in tiers) > 100
    assert sum(stats.num_demoted for stats in tiers) > 200
    assert sum(stats.num_lost for stats in tiers) > 10
    assert sum(driver.max_steps_in_flight > 1 for driver in drivers) > 10
    drafts = [driver.drafting.stats for driver in drivers if driver.drafting]
    assert sum(stats.num_accepted_tokens for stats in drafts) > 1000
    assert sum(stats.num_draft_tokens - stats.num_accepted_tokens for stats in drafts) > 300
    assert sum(driver.num_rows_ahead for driver in drivers) > 300
    assert sum(driver.scheduler.num_preemptions for driver in drivers if driver.num_rows_ahead) > 10
    reasons = [ended[0] for driver in drivers for ended in driver.ended.values()]
    assert min(map(reasons.count, ("stop", "length", "abort"))) > 50
    assert reasons.count("timeout") > 20
    assert "error" not in reasons


def run_many(lab, **planted):
    for seed in range(100):
        lab.Driver(seed, **planted).run(100)


class FreesPagesInFlight(Scheduler):
    def _release_unless_in_flight(self, request):
        if request.request_id in self.block_manager._sequences:
            self.block_manager.free(request.request_id)
        if not request.num_in_flight_tokens:
            self._forget(request)


class PublishesBeforeItIsComputed(Scheduler):
    def _commit(self, plan):
        for request in plan.requests:
            self.block_manager.publish(request.request_id, request.token_ids, request.num_tokens)
        return super()._commit(plan)


class ForgetsToRollBack(Scheduler):
    def rollback(self, output):
        for row in output.requests:
            self._requests[row.request_id].num_computed_tokens += row.num_known_tokens
        super().rollback(output)


class LeaksPagesOfAborted(Scheduler):
    def abort(self, request_ids, **options):
        for request in (self._requests[i] for i in request_ids if i in self._requests):
            if request.status is RequestStatus.RUNNING:
                self.block_manager.fork(request.request_id, f"{request.request_id} leaked")
        return super().abort(request_ids, **options)


class OverlooksLostPages(Scheduler):
    def update(self, output, result):
        return super().update(output, StepResult(sampled=result.sampled))


class KeepsSavedPagesOfTheDead(Scheduler):
    def _forget(self, request):
        self.block_manager.forget_saved = lambda request_id: None
        super()._forget(request)


class SendsMovesUnderNewNumbers(Scheduler):
    def rollback(self, output):
        if (tiers := self.block_manager.tiers) is not None:
            tiers.rollback = lambda first, swaps: tiers._swaps.__setitem__(slice(0, 0), swaps)
        super().rollback(output)


class PublishesRejectedDrafts(Scheduler):
    def _advance(self, request, row, result):
        output = super()._advance(request, row, result)
        if row.num_drafts and request.status is RequestStatus.RUNNING:
            table = self.block_manager.block_table(request.request_id)
            end = min(row.start + len(row.token_ids), len(table) * self.block_manager.block_size)
            # What the row computed, for what it takes to be its tokens.
            tokens = (request.token_ids + row.token_ids)[:end]
            self.block_manager.publish(request.request_id, tokens, end)
        return output


class KeepsPagesOfDrafts(Scheduler):
    def _advance(self, request, row, result):
        truncate, self.block_manager.truncate = self.block_manager.truncate, lambda *_: None
        output = super()._advance(request, row, result)
        self.block_manager.truncate = truncate
        return output


class BelievesOneDraftTooMany(Scheduler):
    def _count_computed(self, request, num_tokens):
        more = num_tokens == 1 and len(request.token_ids) - request.num_computed_tokens > 1
        super()._count_computed(request, num_tokens + more)


class KeepsDraftsThatWereRolledBack(Scheduler):
    def rollback(self, output):
        for row in output.requests:
            request = self._requests[row.request_id]
            request.num_in_flight_tokens -= row.num_drafts
        super().rollback(output)


class UsesStaleDrafts(Scheduler):
    def _commit(self, plan):
        drafts = [request.draft_token_ids for request in plan.requests]
        output = super()._commit(plan)
        for request, kept in zip(plan.requests, drafts, strict=True):
            request.draft_token_ids = kept
        return output


@pytest.mark.parametrize(
    ("bug", "symptom"),
    [
        (PublishesRejectedDrafts, "differs from itself alone|published with other tokens|were taken away"),
        (KeepsPagesOfDrafts, "keeps pages of drafts"),
        (BelievesOneDraftTooMany, "nobody wrote|differs from itself alone|num_computed_tokens"),
        (KeepsDraftsThatWereRolledBack, "miscounted|nothing can run"),
        (UsesStaleDrafts, "are kept"),
        (OverlooksLostPages, "differs from itself alone"),
        (KeepsSavedPagesOfTheDead, "are still kept"),
        (SendsMovesUnderNewNumbers, "differs from itself alone|came before|nobody wrote"),
        (FreesPagesInFlight, "no sequence '.*' is open|pages in flight were taken away"),
        (PublishesBeforeItIsComputed, "pages in flight were taken away|differs from itself alone"),
        (ForgetsToRollBack, "nothing can run|differs from itself alone"),
        (LeaksPagesOfAborted, "pages leaked|nothing can run"),
    ],
)
def test_a_bug_planted_in_the_scheduler_is_caught(lab, bug, symptom):
    with pytest.raises(Exception, match=symptom):
        run_many(lab, scheduler_class=bug)


class PreemptsInFlight(StepPlanner):
    def _preempt_one_behind(self, request):
        victim = self.running[-1]
        if victim is request:
            return False
        self.running.pop()
        self._preempt(victim)
        return True


class NeverPreempts(StepPlanner):
    def _preempt_one_behind(self, request):
        return False


class ForgetsOutputOnPreemption(StepPlanner):
    def _preempt(self, request):
        super()._preempt(request)
        del request.token_ids[len(request.prompt_token_ids) :]


class StartsChunksOneLate(StepPlanner):
    def _take_tokens(self, request, plan):
        super()._take_tokens(request, plan)
        row = plan.rows[-1]
        if row.start and len(row.token_ids) > 1:
            row.start += 1
            del row.token_ids[0]


class SchedulesTokensInFlightAgain(StepPlanner):
    def _plan_step(self, plan):
        for request in self.running:
            request.num_in_flight_tokens = 0
        super()._plan_step(plan)


class IgnoresSeats(StepPlanner):
    def _plan_newcomers(self, plan, **options):
        config = self._config
        self._config = replace(config, max_num_seqs=99, max_num_batched_tokens=99)
        super()._plan_newcomers(plan, **options)
        self._config = config


@pytest.mark.parametrize(
    ("bug", "symptom"),
    [
        (PreemptsInFlight, "differs from itself alone|no sequence '.*' is open|pages in flight were taken away"),
        (NeverPreempts, "nothing can run"),
        (ForgetsOutputOnPreemption, "lost its tokens"),
        (StartsChunksOneLate, "reads a slot that nobody wrote|differs from itself alone"),
        (SchedulesTokensInFlightAgain, "wrong tokens|miscounted what is in flight"),
        (IgnoresSeats, "more requests than seats"),
    ],
)
def test_a_bug_planted_in_the_planner_is_caught(lab, bug, symptom):
    with pytest.raises(Exception, match=symptom):
        run_many(lab, planner_class=bug)


def test_a_row_planned_beyond_the_end_is_caught(lab, monkeypatch):
    monkeypatch.setattr("aios_sched.planner.may_run_ahead", lambda request, *, max_model_len: True)
    with pytest.raises(AssertionError, match=r"planned beyond|planned ahead of what it reads|nobody wrote|wrong place"):
        run_many(lab)


class HandsOutAPageTwice(BlockManager):
    def reserve(self, sequence_id, *, start, end):
        copies = super().reserve(sequence_id, start=start, end=end)
        tables = [sequence.table for sequence in self._sequences.values() if sequence.table]
        if len(tables) > 1:
            tables[0][-1] = tables[1][-1]
        return copies


class ReservesOneSlotLess(BlockManager):
    def reserve(self, sequence_id, *, start, end):
        return super().reserve(sequence_id, start=start, end=max(start, end - 1))


class TakesAHashForAProof(BlockManager):
    def open(self, sequence_id, token_ids, **options):
        cache = self._pool.cache
        cache.find = lambda parent, tokens, salt: cache._blocks.get(cache.hash_of(parent, tokens, salt))
        return super().open(sequence_id, token_ids, **options)


@pytest.mark.parametrize(
    ("bug", "symptom"),
    [
        (HandsOutAPageTwice, "is held 0 times"),
        (ReservesOneSlotLess, "list index out of range"),
        (
            TakesAHashForAProof,
            "differs from itself alone|wrong chain|another salt|holds a page twice|without reserve",
        ),
    ],
)
def test_a_bug_planted_in_the_block_manager_is_caught(lab, bug, symptom):
    with pytest.raises(Exception, match=symptom):
        run_many(lab, block_manager_class=bug)
