"""What the scheduler does, one situation at a time. Pages hold 4 tokens unless a test says otherwise."""

from __future__ import annotations

import pytest

from aios_kvcache.block_manager import BlockManager
from aios_kvcache.tiers import PageTiers
from aios_model.errors import ConfigError, InvalidRequestError
from aios_model.sampling.rows import SampledToken
from aios_sched.config import SchedulerConfig
from aios_sched.errors import QueueFullError, SchedulingError
from aios_sched.output import StepResult
from aios_sched.request import RequestStatus


def rows(step):
    return {row.request_id: (row.start, len(row.token_ids)) for row in step.requests}


def alone(lab, request, max_model_len=64):
    return lab.generate_alone(request, max_model_len=max_model_len)[0]


# -- the budget --------------------------------------------------------------------------------------------------------


def test_prompt_is_cut_into_chunks_of_the_budget(lab):
    scheduler, request = lab.make_scheduler(max_num_batched_tokens=8), lab.make_request("a", range(1, 21), max_tokens=2)
    scheduler.add(request)
    tokens, _, steps = lab.run_until_done(scheduler, lab.PageStoreRunner(4))
    assert [rows(step) for step in steps] == [{"a": (0, 8)}, {"a": (8, 8)}, {"a": (16, 4)}, {"a": (20, 1)}]
    assert [step.requests[0].sampling is None for step in steps] == [True, True, False, False]
    assert tokens["a"] == alone(lab, request)


def test_decodes_run_beside_a_long_prompt_and_never_behind_it(lab):
    scheduler, runner = lab.make_scheduler(max_num_batched_tokens=8), lab.PageStoreRunner(4)
    scheduler.add(lab.make_request("short", [1, 2], max_tokens=20))
    scheduler.update(step := scheduler.schedule(), runner.execute(step))
    scheduler.add(lab.make_request("long", range(1, 31)))
    for start in (0, 7, 14):
        step = scheduler.schedule()
        assert rows(step)["short"][1] == 1
        assert rows(step)["long"] == (start, 7)
        scheduler.update(step, runner.execute(step))


def test_long_prompt_of_higher_priority_does_not_hold_up_decodes(lab):
    scheduler, runner = lab.make_scheduler(max_num_batched_tokens=8, policy="priority"), lab.PageStoreRunner(4)
    scheduler.add(lab.make_request("short", [1, 2], max_tokens=20))
    scheduler.update(step := scheduler.schedule(), runner.execute(step))
    scheduler.add(lab.make_request("urgent", range(1, 31), priority=-1))
    for _ in range(3):
        step = scheduler.schedule()
        assert rows(step)["short"][1] == 1
        assert step.num_scheduled_tokens == 8
        scheduler.update(step, runner.execute(step))


def test_prompts_share_a_step_while_the_budget_lasts(lab):
    scheduler = lab.make_scheduler(max_num_batched_tokens=10)
    for request_id, token in (("a", 1), ("b", 2), ("c", 3)):
        scheduler.add(lab.make_request(request_id, [token] * 4))
    assert rows(scheduler.schedule()) == {"a": (0, 4), "b": (0, 4), "c": (0, 2)}


def test_no_more_requests_run_than_there_are_seats(lab):
    scheduler = lab.make_scheduler(max_num_seqs=2)
    for request_id, token in (("a", 1), ("b", 2), ("c", 3)):
        scheduler.add(lab.make_request(request_id, [token] * 4))
    assert list(rows(scheduler.schedule())) == ["a", "b"]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


def test_without_chunking_a_prompt_waits_for_a_step_with_room_for_all_of_it(lab):
    scheduler = lab.make_scheduler(max_num_batched_tokens=16, max_model_len=16, enable_chunked_prefill=False)
    scheduler.add(lab.make_request("a", [1] * 10, max_tokens=2))
    scheduler.add(lab.make_request("b", [2] * 10, max_tokens=2))
    scheduler.add(lab.make_request("c", [3] * 2, max_tokens=2))
    _, _, steps = lab.run_until_done(scheduler, lab.PageStoreRunner(4))
    assert rows(steps[0]) == {"a": (0, 10)}  # c would fit, but b comes before it
    assert rows(steps[1]) == {"a": (10, 1), "b": (0, 10), "c": (0, 2)}


def test_nothing_to_do_is_no_step(lab):
    assert lab.make_scheduler().schedule() is None


# -- pages -------------------------------------------------------------------------------------------------------------


def test_preempted_request_resumes_with_same_tokens(lab):
    scheduler = lab.make_scheduler(num_blocks=8, enable_prefix_caching=False)
    requests = [lab.make_request(name, [token] * 6, max_tokens=18) for name, token in (("a", 1), ("b", 2))]
    for request in requests:
        scheduler.add(request)
    tokens, _, _ = lab.run_until_done(scheduler, lab.PageStoreRunner(4))
    assert scheduler.num_preemptions > 0
    assert requests[0].num_preemptions == 0, "the older one gives way to nobody"
    assert tokens == {request.request_id: alone(lab, request) for request in requests}


def test_newest_of_the_least_important_gives_way(lab):
    scheduler, runner = lab.make_scheduler(num_blocks=6, watermark=0, policy="priority"), lab.PageStoreRunner(4)
    urgent = lab.make_request("urgent", [3] * 4, priority=-1, max_tokens=12)
    old, new = lab.make_request("old", [1] * 4, max_tokens=12), lab.make_request("new", [2] * 4, max_tokens=12)
    for request in (old, new, urgent):
        scheduler.add(request)
    while not scheduler.num_preemptions:
        step = scheduler.schedule()
        scheduler.update(step, runner.execute(step))
    assert [request.status for request in (urgent, old, new)] == [
        RequestStatus.RUNNING,
        RequestStatus.RUNNING,
        RequestStatus.PREEMPTED,
    ]
    lab.run_until_done(scheduler, runner)
    assert new.output_token_ids == alone(lab, new)


def test_one_page_short_costs_one_victim(lab):
    scheduler, runner = lab.make_scheduler(num_blocks=4, watermark=0), lab.PageStoreRunner(4)
    for name, token in (("a", 1), ("b", 2), ("c", 3), ("d", 4)):
        scheduler.add(lab.make_request(name, [token] * 3, max_tokens=8))
    for _ in range(3):  # a, b, c and d hold all four pages, then a and the others need a fifth
        step = scheduler.schedule()
        scheduler.update(step, runner.execute(step))
    # d gave its page to a, c gave its own to b: nobody stopped who did not have to.
    assert scheduler.num_preemptions == 2
    assert scheduler.num_running == 2
    lab.run_until_done(scheduler, runner)


def test_request_that_lacks_a_page_keeps_those_it_has(lab):
    """It sits out, rather than throw its work away, while more important ones hold the rest."""
    scheduler, runner = lab.make_scheduler(num_blocks=4, watermark=0), lab.PageStoreRunner(4)
    old, new = lab.make_request("old", [1] * 8, max_tokens=8), lab.make_request("new", [2] * 6, max_tokens=4)
    for request in (old, new):
        scheduler.add(request)
    scheduler.update(step := scheduler.schedule(), runner.execute(step))
    while new.num_preemptions == 0 and not new.finish_reason:
        step = scheduler.schedule()
        scheduler.update(step, runner.execute(step))
    lab.run_until_done(scheduler, runner)
    assert old.num_preemptions == 0
    assert new.output_token_ids == alone(lab, new)


def test_newcomer_leaves_the_reserve_to_those_who_run(lab):
    scheduler = lab.make_scheduler(num_blocks=10, watermark=0.3, max_num_batched_tokens=64)
    scheduler.add(lab.make_request("a", [1] * 16))
    scheduler.add(lab.make_request("b", [2] * 16))
    assert list(rows(scheduler.schedule())) == ["a"]  # 4 + 4 of 10 pages would leave 2, and the reserve is 3


def test_reserve_does_not_keep_out_a_request_that_is_alone(lab):
    scheduler = lab.make_scheduler(num_blocks=4, watermark=0.9)
    scheduler.add(lab.make_request("a", [1] * 9, max_tokens=8))
    assert rows(scheduler.schedule()) == {"a": (0, 9)}


def test_contiguous_policy_uses_every_slot(lab):
    """With one page per sequence nobody ever needs a second one, so there is nothing to keep a reserve for."""
    scheduler = lab.make_scheduler(num_blocks=3, block_size=64, max_model_len=64, max_num_seqs=3, watermark=0.5)
    for name, token in (("a", 1), ("b", 2), ("c", 3)):
        scheduler.add(lab.make_request(name, [token] * 5))
    assert len(scheduler.schedule().requests) == 3


def test_pool_of_exactly_the_needed_size_finishes(lab):
    scheduler = lab.make_scheduler(num_blocks=4, max_model_len=17)
    request = lab.make_request("a", [1] * 9, max_tokens=8)  # 9 + 8 - 1 slots: the last token is never stored
    scheduler.add(request)
    lab.run_until_done(scheduler, lab.PageStoreRunner(4))
    assert request.output_token_ids == alone(lab, request)


# -- the prefix cache --------------------------------------------------------------------------------------------------


def test_second_request_computes_only_what_is_not_cached(lab):
    scheduler, runner = lab.make_scheduler(), lab.PageStoreRunner(4)
    prompt = list(range(1, 15))
    scheduler.add(first := lab.make_request("a", prompt))
    lab.run_until_done(scheduler, runner)
    scheduler.add(second := lab.make_request("b", prompt))
    _, outputs, steps = lab.run_until_done(scheduler, runner)
    assert rows(steps[0]) == {"b": (12, 2)}
    assert first.num_cached_tokens == 0
    assert {output.num_cached_tokens for output in outputs} == {12}
    assert second.output_token_ids == first.output_token_ids == alone(lab, first)


def test_other_salt_finds_nothing(lab):
    scheduler, runner = lab.make_scheduler(), lab.PageStoreRunner(4)
    for name, salt in (("a", "one"), ("b", "two")):
        scheduler.add(request := lab.make_request(name, range(1, 15), cache_salt=salt))
        lab.run_until_done(scheduler, runner)
        assert request.num_cached_tokens == 0


def test_same_new_prompt_many_times_is_computed_once(lab):
    """As the n choices of one request are: the first computes it, the others wait a step and find it."""
    scheduler = lab.make_scheduler(max_num_batched_tokens=64)
    requests = [lab.make_request(f"r{i}", range(1, 18), seed=i) for i in range(4)]
    for request in requests:
        scheduler.add(request)
    _, _, steps = lab.run_until_done(scheduler, lab.PageStoreRunner(4))
    assert rows(steps[0]) == {"r0": (0, 17)}
    assert rows(steps[1]) == {"r0": (17, 1), "r1": (16, 1), "r2": (16, 1), "r3": (16, 1)}
    assert [request.output_token_ids for request in requests] == [alone(lab, request) for request in requests]


def test_choices_of_one_prompt_fork_its_pages_down_to_the_token(lab):
    """The page that is not full is copied for each: they write different tokens behind the same prompt."""
    scheduler = lab.make_scheduler(max_num_batched_tokens=64)
    requests = [lab.make_request(f"r{i}", range(1, 16), seed=i, max_tokens=9) for i in range(4)]
    for request in requests:
        scheduler.add(request)
    _, _, steps = lab.run_until_done(scheduler, lab.PageStoreRunner(4))
    assert rows(steps[0]) == {"r0": (0, 15)}
    assert rows(steps[1]) == {"r0": (15, 1), "r1": (14, 1), "r2": (14, 1), "r3": (14, 1)}
    tables = [row.block_table for row in steps[1].requests]
    assert all(table[:3] == tables[0][:3] for table in tables), "whole pages are shared"
    assert [copy.source for copy in steps[1].block_copies] == [tables[0][3]] * 3
    assert [request.num_cached_tokens for request in requests] == [0, 14, 14, 14]
    assert [request.output_token_ids for request in requests] == [alone(lab, request) for request in requests]


def test_without_a_prefix_cache_nothing_is_forked(lab):
    scheduler = lab.make_scheduler(max_num_batched_tokens=64, enable_prefix_caching=False)
    for name in ("a", "b"):
        scheduler.add(lab.make_request(name, range(1, 16)))
    _, _, steps = lab.run_until_done(scheduler, lab.PageStoreRunner(4))
    assert rows(steps[0]) == {"a": (0, 15), "b": (0, 15)}


def test_pages_on_their_way_from_a_tier_are_not_forked(lab):
    """Were they lost there, the copy of one could not be told from a good page."""
    manager = BlockManager(num_blocks=8, block_size=4, tiers=PageTiers(num_host_pages=8))
    manager.open("a", range(1, 8))
    manager.reserve("a", start=0, end=7)
    assert manager.can_share("a", 7)
    assert manager.save("a", list(range(1, 8)), 7)
    manager.free("a")
    assert manager.open("a", range(1, 9)) == 7
    manager.reserve("a", start=7, end=8)
    assert not manager.can_share("a", 7)
    first, swaps = manager.tiers.take_swaps()
    manager.settle_swaps(first, swaps, [])
    assert manager.can_share("a", 7)


def test_resumed_request_finds_its_own_pages(lab):
    scheduler = lab.make_scheduler(num_blocks=8, watermark=0)
    for name, token in (("a", 1), ("b", 2)):
        scheduler.add(request := lab.make_request(name, [token] * 6, max_tokens=18))
    _, _, steps = lab.run_until_done(scheduler, lab.PageStoreRunner(4))
    assert request.num_preemptions > 0
    resumed = [rows(step)["b"] for step in steps if "b" in rows(step)]
    assert any(start > 6 and length > 1 for start, length in resumed), "it started again from the beginning"
    assert request.num_cached_tokens == 0, "its own pages are not a cache hit of its prompt"


# -- several steps in flight -------------------------------------------------------------------------------------------


def test_chunks_of_one_prompt_follow_each_other_in_flight(lab):
    scheduler, runner = lab.make_scheduler(max_num_batched_tokens=8), lab.PageStoreRunner(4)
    scheduler.add(request := lab.make_request("a", range(1, 21)))
    steps = [scheduler.schedule() for _ in range(4)]
    assert [rows(step) for step in steps[:3]] == [{"a": (0, 8)}, {"a": (8, 8)}, {"a": (16, 4)}]
    assert steps[3] is None, "the next token is not known yet"
    for step in steps[:3]:
        scheduler.update(step, runner.execute(step))
    assert rows(scheduler.schedule()) == {"a": (20, 1)}
    assert request.num_computed_tokens == 20


def test_two_groups_of_decodes_alternate_in_flight(lab):
    scheduler, runner = lab.make_scheduler(), lab.PageStoreRunner(4)
    scheduler.add(lab.make_request("a", [1, 2, 3]))
    first = scheduler.schedule()
    scheduler.add(lab.make_request("b", [4, 5, 6]))
    second = scheduler.schedule()
    assert (list(rows(first)), list(rows(second))) == (["a"], ["b"])
    scheduler.update(first, runner.execute(first))
    assert list(rows(scheduler.schedule())) == ["a"]


def test_request_aborted_in_flight_keeps_its_pages_until_its_last_step_returns(lab):
    scheduler, runner = lab.make_scheduler(max_num_batched_tokens=8), lab.PageStoreRunner(4)
    pages = scheduler.block_manager
    scheduler.add(lab.make_request("a", range(1, 21)))
    steps = [scheduler.schedule(), scheduler.schedule()]
    (output,) = scheduler.abort(["a"])
    assert output.finish_reason == "abort"
    assert scheduler.num_running == 0
    assert scheduler.has_unfinished
    assert scheduler.schedule() is None
    for step, num_held in zip(steps, (5, 0), strict=True):
        assert scheduler.update(step, runner.execute(step)) == []
        assert pages.num_blocks - pages.num_free_blocks == num_held
    assert not scheduler.has_unfinished


def test_request_in_flight_is_not_preempted(lab):
    scheduler, runner = lab.make_scheduler(num_blocks=2, watermark=0), lab.PageStoreRunner(4)
    old, new = lab.make_request("old", [1] * 4, max_tokens=4), lab.make_request("new", [2] * 4, max_tokens=4)
    scheduler.add(old)
    first = scheduler.schedule()
    scheduler.add(new)
    second = scheduler.schedule()
    scheduler.update(first, runner.execute(first))
    assert scheduler.schedule() is None, "old needs a page, and the only other one is being written"
    assert new.status is RequestStatus.RUNNING
    scheduler.update(second, runner.execute(second))
    step = scheduler.schedule()
    assert list(rows(step)) == ["old"]
    assert new.status is RequestStatus.PREEMPTED
    scheduler.update(step, runner.execute(step))
    lab.run_until_done(scheduler, runner)
    assert (old.output_token_ids, new.output_token_ids) == (alone(lab, old), alone(lab, new))


# -- faults ------------------------------------------------------------------------------------------------------------


def test_step_rolled_back_is_planned_again_as_it_was(lab):
    scheduler, runner = lab.make_scheduler(max_num_batched_tokens=16), lab.PageStoreRunner(4)
    for name, token in (("a", 1), ("b", 2)):
        scheduler.add(lab.make_request(name, [token] * 10))
    scheduler.update(step := scheduler.schedule(), runner.execute(step))
    steps = [scheduler.schedule(), scheduler.schedule()]
    for step in reversed(steps):
        if step is not None:
            scheduler.rollback(step)
    again = scheduler.schedule()
    assert again.requests == steps[0].requests
    assert set(again.finished_request_ids) == {"a", "b"}, "runners forget what the failed step left behind"


def test_a_request_starts_over_if_the_step_that_copied_a_page_for_it_is_rolled_back(lab):
    """The page it was copied from may be somebody else's by then; the copy must not be made again."""
    scheduler, runner = lab.make_scheduler(max_num_batched_tokens=64), lab.PageStoreRunner(4)
    leader, fork = (lab.make_request(name, [1] * 7, seed=seed) for seed, name in enumerate(("leader", "fork")))
    scheduler.add(leader)
    scheduler.update(step := scheduler.schedule(), runner.execute(step))
    scheduler.add(fork)
    step = scheduler.schedule()
    [copy] = step.block_copies
    scheduler.abort(["leader"])
    runner.execute(step)
    scheduler.rollback(step)  # which frees the page that was copied
    assert fork.status is RequestStatus.PREEMPTED
    scheduler.add(other := lab.make_request("other", [2] * 7))
    again = scheduler.schedule()
    assert copy not in again.block_copies
    scheduler.update(again, runner.execute(again))
    lab.run_until_done(scheduler, runner)
    assert fork.output_token_ids == alone(lab, fork)
    assert other.output_token_ids == alone(lab, other)


def test_planning_that_fails_at_one_request_names_it_and_loses_nothing(lab, monkeypatch):
    scheduler, runner = lab.make_scheduler(), lab.PageStoreRunner(4)
    requests = [lab.make_request(name, [token] * 5) for name, token in (("a", 1), ("bad", 2), ("c", 3))]
    for request in requests:
        scheduler.add(request)
    scheduler.update(step := scheduler.schedule(), runner.execute(step))
    reserve = scheduler.block_manager.reserve

    def broken(sequence_id, **slots):
        if sequence_id == "bad":
            raise RuntimeError("no such page")
        return reserve(sequence_id, **slots)

    monkeypatch.setattr(scheduler.block_manager, "reserve", broken)
    with pytest.raises(SchedulingError, match="no such page") as caught:
        scheduler.schedule()
    assert caught.value.request_id == "bad"
    (output,) = scheduler.fail("bad", str(caught.value))
    assert (output.finish_reason, output.error) == (
        "error",
        "scheduling request 'bad' failed: RuntimeError: no such page",
    )
    lab.run_until_done(scheduler, runner)
    assert [requests[0].output_token_ids, requests[2].output_token_ids] == [
        alone(lab, requests[0]),
        alone(lab, requests[2]),
    ]


def test_request_whose_token_is_missing_from_the_result_fails_alone(lab):
    scheduler = lab.make_scheduler()
    for name, token in (("a", 1), ("b", 2)):
        scheduler.add(lab.make_request(name, [token] * 5))
    step = scheduler.schedule()
    outputs = scheduler.update(step, StepResult(sampled={"b": SampledToken(token_id=9)}))
    assert [(output.request_id, output.finish_reason) for output in outputs] == [("a", "error"), ("b", None)]
    assert "no token" in outputs[0].error
    scheduler.block_manager.check_invariants()


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "param", "message"),
    [
        (0, 1, "prompt", "the prompt is empty"),
        (64, 1, "prompt", "64 tokens, but the context holds 64.*shorten it to 63"),
        (60, 5, "max_tokens", "60 tokens plus max_tokens=5 makes 65.*64; lower max_tokens to 4"),
        (
            10,
            40,
            "max_tokens",
            r"10 tokens and up to 40 .* 13 pages of 4 tokens, but the whole pool has 10 \(40 tokens\)",
        ),
    ],
)
def test_request_that_cannot_finish_is_refused_with_the_arithmetic(lab, num_prompt_tokens, max_tokens, param, message):
    scheduler = lab.make_scheduler(num_blocks=10)
    with pytest.raises(InvalidRequestError, match=message) as caught:
        scheduler.add(lab.make_request("a", [1] * num_prompt_tokens, max_tokens=max_tokens))
    assert caught.value.param == param
    assert not scheduler.has_unfinished


def test_without_max_tokens_it_goes_as_far_as_the_context(lab):
    scheduler = lab.make_scheduler(max_model_len=20)
    scheduler.add(request := lab.make_request("a", [1] * 5, max_tokens=None))
    lab.run_until_done(scheduler, lab.PageStoreRunner(4))
    assert (request.num_tokens, request.finish_reason) == (20, "length")


def test_id_in_use_is_refused(lab):
    scheduler = lab.make_scheduler()
    scheduler.add(lab.make_request("a", [1]))
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        scheduler.add(lab.make_request("a", [1]))


def test_abort_takes_exact_ids_only(lab):
    scheduler = lab.make_scheduler()
    scheduler.add(lab.make_request("a", [1]))
    scheduler.add(lab.make_request("ab", [2]))
    assert [output.request_id for output in scheduler.abort(["a", "a", "b"])] == ["a"]
    assert scheduler.num_waiting == 1


def test_queue_is_bounded_beyond_the_free_seats(lab):
    scheduler = lab.make_scheduler(max_num_seqs=2, max_num_queued=1)
    for name, token in (("a", 1), ("b", 2), ("c", 3)):
        scheduler.add(lab.make_request(name, [token]))
    with pytest.raises(QueueFullError, match="1 requests wait already, and at most 1 may"):
        scheduler.add(lab.make_request("d", [4]))
    scheduler.abort(["b"])
    scheduler.add(lab.make_request("d", [4]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"max_num_batched_tokens": 3}, "max_num_batched_tokens=3 is below max_num_seqs=4"),
        ({"enable_chunked_prefill": False}, "max_num_batched_tokens=8 is below max_model_len=16"),
        ({"max_num_queued": -1}, "max_num_queued=-1"),
        ({"watermark": 1.0}, "watermark=1.0"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SchedulerConfig(**{"max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 16, **options})


# -- several steps side by side ----------------------------------------------------------------------------------------


def test_steps_that_run_side_by_side_share_the_requests(lab):
    scheduler, runner = lab.make_scheduler(max_steps_in_flight=2), lab.PageStoreRunner(4)
    requests = {name: lab.make_request(name, [ord(name)] * 3, max_tokens=6) for name in "abcde"}
    for request in requests.values():
        scheduler.add(request)
    tokens = {name: [] for name in requests}

    def apply(step):
        for output in scheduler.update(step, runner.execute(step)):
            tokens[output.request_id] += output.token_ids

    apply(scheduler.schedule())  # the prompts
    first, second = scheduler.schedule(), scheduler.schedule()
    assert [sorted(rows(step)) for step in (first, second)] == [["a", "b", "c"], ["d", "e"]]
    assert scheduler.schedule() is None
    apply(first)
    third = scheduler.schedule()
    assert sorted(rows(third)) == ["a", "b", "c"]
    apply(second)
    apply(third)
    while (step := scheduler.schedule()) is not None:
        assert len(step.requests) <= 3
        apply(step)
    assert tokens == {name: alone(lab, request) for name, request in requests.items()}


# -- seats -------------------------------------------------------------------------------------------------------------


def test_under_fair_a_newcomer_takes_a_seat_of_a_flood(lab):
    scheduler, runner = lab.make_scheduler(max_num_seqs=4, policy="fair"), lab.PageStoreRunner(4)
    flood = [lab.make_request(f"f{number}", [number + 1] * 6, tenant="flood", max_tokens=20) for number in range(9)]
    for request in flood:
        scheduler.add(request)
    for _ in range(3):
        step = scheduler.schedule()
        scheduler.update(step, runner.execute(step))
    late = lab.make_request("late", [40] * 6, tenant="late", max_tokens=5)
    scheduler.add(late)
    step = scheduler.schedule()
    assert "late" in rows(step)
    assert [request.status for request in flood[:4]] == [*[RequestStatus.RUNNING] * 3, RequestStatus.PREEMPTED]
    scheduler.update(step, runner.execute(step))
    lab.run_until_done(scheduler, runner)
    assert all(request.output_token_ids == alone(lab, request) for request in [*flood, late])


def test_a_more_important_newcomer_is_read_before_a_long_prompt_that_is_being_read(lab):
    scheduler, runner = lab.make_scheduler(max_num_batched_tokens=8, policy="priority"), lab.PageStoreRunner(4)
    scheduler.add(lab.make_request("long", range(1, 31), priority=1))
    scheduler.update(step := scheduler.schedule(), runner.execute(step))
    scheduler.add(lab.make_request("urgent", [3] * 5, priority=-1))
    assert rows(scheduler.schedule()) == {"urgent": (0, 5), "long": (8, 3)}
