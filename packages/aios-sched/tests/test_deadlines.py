"""Requests that run out of time."""

from __future__ import annotations

import time

import pytest

from aios_model.errors import InvalidRequestError
from aios_sched.engine import Engine
from aios_sched.executor import LocalExecutor


def test_request_past_its_deadline_ends_and_frees_its_pages(lab):
    scheduler, runner = lab.make_scheduler(max_num_seqs=1), lab.PageStoreRunner(4)
    now = time.monotonic()
    for name, seconds in (("running", 100), ("waiting", 50), ("patient", None)):
        deadline = None if seconds is None else now + seconds
        scheduler.add(lab.make_request(name, [1] * 9, deadline=deadline, max_tokens=20))
    for _ in range(3):
        step = scheduler.schedule()
        scheduler.update(step, runner.execute(step))
    assert scheduler.expire(now + 49) == []
    [output] = scheduler.expire(now + 50)
    assert (output.request_id, output.finish_reason, output.timing.num_generation_tokens) == ("waiting", "timeout", 0)
    [output] = scheduler.expire(now + 1000)
    assert (output.request_id, output.finish_reason, output.timing.num_generation_tokens) == ("running", "timeout", 3)
    assert scheduler.block_manager.num_free_blocks == scheduler.block_manager.num_blocks
    tokens, _, _ = lab.run_until_done(scheduler, runner)
    assert len(tokens["patient"]) == 20


def test_request_in_flight_keeps_its_pages_past_its_deadline_until_the_step_returns(lab):
    scheduler, runner = lab.make_scheduler(), lab.PageStoreRunner(4)
    deadline = time.monotonic() + 100
    scheduler.add(lab.make_request("late", [1] * 9, deadline=deadline))
    step = scheduler.schedule()
    assert [output.finish_reason for output in scheduler.expire(deadline)] == ["timeout"]
    assert scheduler.block_manager.num_free_blocks < scheduler.block_manager.num_blocks
    assert scheduler.update(step, runner.execute(step)) == []
    assert scheduler.block_manager.num_free_blocks == scheduler.block_manager.num_blocks
    assert not scheduler.has_unfinished


def test_deadline_of_an_earlier_request_does_not_end_a_later_one_with_its_id(lab):
    scheduler = lab.make_scheduler()
    deadline = time.monotonic() + 100
    scheduler.add(lab.make_request("again", [1], deadline=deadline))
    scheduler.abort(["again"])
    scheduler.add(lab.make_request("again", [1], deadline=deadline + 100))
    assert scheduler.expire(deadline + 1) == []
    assert len(scheduler.expire(deadline + 100)) == 1


def test_deadline_in_the_past_is_refused(lab):
    scheduler = lab.make_scheduler()
    with pytest.raises(InvalidRequestError, match=r"the deadline passed \d+ s ago") as caught:
        scheduler.add(lab.make_request("late", [1], deadline=time.monotonic() - 60))
    assert caught.value.param == "deadline"
    assert not scheduler.has_unfinished


def test_engine_ends_a_request_that_waits_past_its_deadline(lab):
    engine = Engine(lab.make_scheduler(max_num_seqs=1), LocalExecutor(lab.PageStoreRunner(4)))
    engine.add(lab.make_request("first", [1] * 4, max_tokens=3))
    engine.add(lab.make_request("late", [2] * 4, deadline=time.monotonic() + 0.01))
    time.sleep(0.02)
    outputs = engine.step()
    assert {output.request_id: output.finish_reason for output in outputs} == {"late": "timeout", "first": None}
    assert engine.stats().num_waiting == 0


def test_engine_whose_only_request_expired_has_nothing_to_do(lab):
    engine = Engine(lab.make_scheduler(), LocalExecutor(lab.PageStoreRunner(4)))
    engine.add(lab.make_request("late", [2] * 4, deadline=time.monotonic() + 0.01))
    time.sleep(0.02)
    assert [output.finish_reason for output in engine.step()] == ["timeout"]
    assert not engine.has_unfinished
    assert engine.step() == []
