"""Steps that overlap: who is planned ahead of its token, who waits, and what becomes of a row in vain."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from aios_model.errors import ConfigError
from aios_sched.config import SchedulerConfig
from aios_sched.engine import Engine
from aios_sched.output import PENDING_TOKEN
from aios_sched.overlapped_executor import OverlappedExecutor


def rows_of(step):
    return {row.request_id: (row.start, row.token_ids) for row in step.requests}


@pytest.fixture
def make(lab):
    """-> (scheduler, runner) that plan ahead, with requests added."""

    def make(*requests, block_size=4, **options):
        scheduler = lab.make_scheduler(block_size=block_size, schedule_ahead=True, expected_output="none", **options)
        for request in requests:
            scheduler.add(request)
        return scheduler, lab.PageStoreRunner(block_size)

    return make


class FakeDevice:
    """Runs a step when somebody waits for it, as if it had computed meanwhile, and writes down who does what."""

    def __init__(self, runner, *, broken=()):
        self.vocab_size, self.log = runner.vocab_size, []
        self._runner, self._broken, self._queue = runner, set(broken), []

    def launch(self, output):
        self.log.append(f"launch {output.step_id}")
        if -output.step_id in self._broken:
            raise RuntimeError("cannot be launched")
        handle = SimpleNamespace(output=output, outcome=None)
        handle.result = lambda: self._result(handle)
        self._queue.append(handle)
        return handle

    def _result(self, handle):
        self.log.append(f"result {handle.output.step_id}")
        while handle.outcome is None:
            step = self._queue.pop(0)
            step.outcome = self._runner.execute(step.output)
        if handle.output.step_id in self._broken:
            raise RuntimeError("out of order")
        return handle.outcome


@pytest.fixture
def overlap(lab):
    """-> (engine, fake device)."""

    def build(*, broken=(), **options):
        scheduler = lab.make_scheduler(schedule_ahead=True, **options)
        device = FakeDevice(lab.PageStoreRunner(options.get("block_size", 4)), broken=broken)
        return Engine(scheduler, OverlappedExecutor(device)), device

    return build


def finish(engine):
    tokens, reasons = {}, {}
    while engine.has_unfinished:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason:
                reasons[output.request_id] = output.finish_reason
        engine._scheduler.block_manager.check_invariants()
    assert engine.stats().kv_cache_usage == 0
    return tokens, reasons


def test_next_step_is_launched_before_the_result_of_this_one_is_taken(overlap, lab):
    engine, device = overlap()
    request = lab.make_request("a", [1, 2, 3], max_tokens=5)
    engine.add(request)
    tokens, _ = finish(engine)
    assert device.log[:6] == ["launch 0", "launch 1", "result 0", "launch 2", "result 1", "launch 3"]
    assert device.log.count("result 4") == 1
    assert "launch 5" not in device.log, "five tokens take five steps"
    assert tokens["a"] == lab.generate_alone(request, max_model_len=64)[0]


def test_row_ahead_has_a_place_and_no_token(make, lab):
    scheduler, runner = make(lab.make_request("a", [1, 2, 3]), lab.make_request("b", [4] * 7))
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert rows_of(second) == {"a": (3, [PENDING_TOKEN]), "b": (7, [PENDING_TOKEN])}
    assert scheduler.schedule() is None, "one token ahead, and no more"
    [row, _] = second.requests
    assert (row.sampling.position, len(row.sampling.output_token_ids)) == (4, 1)
    scheduler.update(first, runner.execute(first))
    assert set(rows_of(scheduler.schedule())) == {"a", "b"}


def test_nobody_is_planned_ahead_unless_asked(lab):
    scheduler = lab.make_scheduler()
    scheduler.add(lab.make_request("a", [1, 2, 3]))
    scheduler.schedule()
    assert scheduler.schedule() is None


@pytest.mark.parametrize("params", [{"repetition_penalty": 1.1}, {"presence_penalty": 0.5}, {"frequency_penalty": 0.5}])
def test_request_whose_next_draw_needs_its_tokens_waits_for_them(make, lab, params):
    scheduler, runner = make(lab.make_request("a", [1, 2, 3], **params), lab.make_request("b", [4] * 7))
    first = scheduler.schedule()
    assert set(rows_of(scheduler.schedule())) == {"b"}
    scheduler.update(first, runner.execute(first))
    assert rows_of(scheduler.schedule())["a"][1] != [PENDING_TOKEN], "its turn comes with its token"


def test_last_token_is_never_planned_ahead_of(make, lab):
    """Neither that of max_tokens nor that which fills the context."""
    scheduler, _ = make(
        lab.make_request("a", [1, 2, 3], max_tokens=1),
        lab.make_request("b", [4] * 15, max_tokens=None),
        max_model_len=16,
    )
    scheduler.schedule()
    assert scheduler.schedule() is None


def stop_after(lab, prompt, num_tokens):
    """-> a request whose answer ends with its token number `num_tokens`, where nobody can foresee it."""
    tokens, _, _ = lab.generate_alone(lab.make_request("x", prompt, max_tokens=30), max_model_len=64)
    assert tokens[num_tokens - 1] not in tokens[: num_tokens - 1]
    return lab.make_request("a", prompt, max_tokens=30, stop_token_ids=(tokens[num_tokens - 1],))


def test_row_in_vain_is_thrown_away_and_keeps_its_pages_until_then(make, lab):
    request = stop_after(lab, [1, 2, 3, 9], 1)
    scheduler, runner = make(request)
    pages = scheduler.block_manager
    first, second = scheduler.schedule(), scheduler.schedule()
    results = [runner.execute(first), runner.execute(second)]
    [output] = scheduler.update(first, results[0])
    assert (output.finish_reason, len(output.token_ids)) == ("stop", 1)
    assert pages.num_free_blocks == pages.num_blocks - 2, "a step on its way writes to them"
    assert scheduler.has_unfinished
    assert scheduler.update(second, results[1]) == []
    assert pages.num_free_blocks == pages.num_blocks
    assert not scheduler.has_unfinished


def test_page_that_only_a_row_in_vain_filled_is_not_found(make, lab):
    """The stop token would fill the page: its row was computed, but it is not what the request is about."""
    request = stop_after(lab, [1, 2, 3], 1)
    scheduler, runner = make(request)
    steps = [scheduler.schedule(), scheduler.schedule()]
    for step, result in zip(steps, [runner.execute(step) for step in steps], strict=True):
        scheduler.update(step, result)
    assert request.num_tokens == 4
    assert scheduler.block_manager.num_cached_blocks == 0


@pytest.mark.parametrize("reason", ["abort", "timeout"])
def test_request_that_ends_from_outside_while_it_is_ahead_gets_nothing_more(make, lab, reason):
    scheduler, runner = make(lab.make_request("a", [1, 2, 3], deadline=1e12))
    steps = [scheduler.schedule(), scheduler.schedule()]
    ended = scheduler.abort(["a"]) if reason == "abort" else scheduler.expire(1e12)
    assert [output.finish_reason for output in ended] == [reason]
    for step in steps:
        assert scheduler.update(step, runner.execute(step)) == []
    assert scheduler.block_manager.usage == 0
    assert not scheduler.has_unfinished


@pytest.mark.parametrize("broken", [(3,), (-3,), (3, 4), (2, -3)])
def test_step_that_fails_takes_the_one_planned_ahead_of_it_along(overlap, lab, broken):
    """A negative number cannot even be launched. All of them are computed again, and nobody notices."""
    engine, _ = overlap(broken=broken)
    requests = {name: lab.make_request(name, [ord(name) % 40] * 6, max_tokens=12) for name in "abc"}
    for request in requests.values():
        engine.add(request)
    tokens, reasons = finish(engine)
    assert tokens == {name: lab.generate_alone(request, max_model_len=64)[0] for name, request in requests.items()}
    assert set(reasons.values()) == {"length"}
    assert engine.stats().num_failed_steps > 0


@pytest.mark.parametrize("reads_output", [False, True])
def test_page_is_taken_for_a_known_token_only_and_then_without_delay(make, lab, reads_output):
    """Three pages: b holds one, a two and a third to come. It gets that of b, which must not be in flight for ever."""
    a = lab.make_request("a", [1] * 15, max_tokens=10)
    a.reads_output = reads_output  # then it is never ahead, and meets b while that one is
    scheduler, runner = make(a, lab.make_request("b", [2], max_tokens=20), num_blocks=3, block_size=8, watermark=0)
    in_flight, seen = [], []
    while not scheduler.num_preemptions:
        while len(in_flight) < 2 and (step := scheduler.schedule()) is not None:
            in_flight.append((step, runner.execute(step)))
            seen.append(rows_of(step))
        scheduler.update(*in_flight.pop(0))
    [(number, token_ids)] = [(n, step["a"][1]) for n, step in enumerate(seen) if step.get("a", (0,))[0] == 16]
    assert token_ids != [PENDING_TOKEN], "b lost its page for a row that might have been in vain"
    assert number == (4 if reads_output else 2), "a waited while b went on"


def test_seat_changes_hands_though_its_owner_is_always_in_flight(make, lab):
    """Under `fair`, a tenant that fills all seats gives one up to a tenant that comes later."""
    flood = [lab.make_request(f"flood{index}", [index + 1] * 5, tenant="flood", max_tokens=30) for index in range(2)]
    scheduler, runner = make(*flood, max_num_seqs=2, policy="fair")
    in_flight, late = [], lab.make_request("late", [9] * 5, tenant="other", max_tokens=30)
    for number in range(12):
        if number == 4:
            scheduler.add(late)
        while len(in_flight) < 2 and (step := scheduler.schedule()) is not None:
            in_flight.append((step, runner.execute(step)))
        scheduler.update(*in_flight.pop(0))
    assert late.output_token_ids, "it waited behind a request that was never at rest"


def test_pipelines_are_kept_busy_in_another_way():
    with pytest.raises(ConfigError, match="schedule_ahead cannot be used with max_steps_in_flight=2"):
        SchedulerConfig(
            max_num_seqs=1, max_num_batched_tokens=8, max_model_len=8, max_steps_in_flight=2, schedule_ahead=True
        )


def test_step_takes_the_time_since_the_one_before_it(overlap, lab, monkeypatch):
    """It is launched while that one computes, which is not its own time."""
    now, seconds = [100.0], []
    engine, device = overlap()
    monkeypatch.setattr("aios_sched.engine.perf_counter", lambda: now[0])
    monkeypatch.setattr(engine._scheduler, "note_step", lambda output, each: seconds.append(each))
    take = device._result

    def result(handle):
        now[0] += 2.0
        return take(handle)

    device._result = result
    engine.add(lab.make_request("a", [1, 2, 3], max_tokens=5))
    finish(engine)
    assert seconds[1:] == [2.0] * (len(seconds) - 1)
