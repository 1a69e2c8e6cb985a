"""The loop: what comes out, what it costs, and that a request fails alone wherever the fault is."""

from __future__ import annotations

import random
from collections import deque
from types import SimpleNamespace

import pytest

from aios_model.errors import InvalidRequestError
from aios_sched.engine import Engine
from aios_sched.errors import ExecutorLostError, QueueFullError
from aios_sched.executor import LocalExecutor


class FaultyRunner:
    """Fails every step that `is_broken` says is broken, before or after the pages are written."""

    def __init__(self, runner, is_broken):
        self.vocab_size, self.runner, self.is_broken = runner.vocab_size, runner, is_broken
        self.num_calls = 0

    def execute(self, output):
        self.num_calls += 1
        result = self.runner.execute(output)
        if self.is_broken([row.request_id for row in output.requests]):
            raise ValueError("the model is out of order")
        return result


class Log:
    def __init__(self):
        self.steps, self.finished = [], []

    def on_step(self, stats):
        self.steps.append(stats)

    def on_finished(self, timing):
        self.finished.append(timing)


@pytest.fixture
def build(lab):
    """-> (engine, executor), with a runner that fails where `is_broken` says so."""

    def build(*, is_broken=lambda ids: False, max_steps_in_flight=None, listeners=(), **options):
        runner = FaultyRunner(lab.PageStoreRunner(options.get("block_size", 4)), is_broken)
        if max_steps_in_flight is None:
            executor = LocalExecutor(runner)
        else:
            executor = lab.DelayedExecutor(runner, max_steps_in_flight=max_steps_in_flight)
        return Engine(lab.make_scheduler(**options), executor, listeners), executor

    return build


def finish(engine, *, limit=5000):
    """Runs until nothing is left; -> (tokens, finish reasons, errors) by request."""
    tokens, reasons, errors = {}, {}, {}
    while engine.has_unfinished:
        limit -= 1
        assert limit, "it runs in circles"
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason:
                assert output.request_id not in reasons
                reasons[output.request_id] = output.finish_reason
                errors[output.request_id] = output.error
        engine._scheduler.block_manager.check_invariants()
    assert engine.stats().kv_cache_usage == 0
    return tokens, reasons, errors


def add_some(engine, lab, names="abcd", **params):
    requests = {name: lab.make_request(name, [ord(name) % 40] * 6, **params) for name in names}
    for request in requests.values():
        engine.add(request)
    return requests


def alone(lab, requests, max_model_len=64):
    return {name: lab.generate_alone(request, max_model_len=max_model_len)[0] for name, request in requests.items()}


# -- the loop ----------------------------------------------------------------------------------------------------------


def test_step_gives_each_token_once_and_a_reason_at_the_end(build, lab):
    engine, _ = build()
    requests = add_some(engine, lab)
    tokens, reasons, _ = finish(engine)
    assert tokens == alone(lab, requests)
    assert set(reasons.values()) == {"length"}


def test_step_with_nothing_to_do_returns_nothing(build):
    engine, _ = build()
    assert not engine.has_unfinished
    assert engine.step() == []


@pytest.mark.parametrize("max_steps_in_flight", [2, 3])
def test_several_steps_are_in_flight_when_the_executor_takes_them(build, lab, max_steps_in_flight):
    engine, executor = build(max_steps_in_flight=max_steps_in_flight, max_num_batched_tokens=8)
    requests = add_some(engine, lab)
    tokens, _, _ = finish(engine)
    assert executor.most_in_flight == max_steps_in_flight
    assert tokens == alone(lab, requests)


def test_abort_works_while_waiting_running_and_in_flight(build, lab):
    engine, _ = build(max_steps_in_flight=2, max_num_seqs=2, max_num_batched_tokens=8)
    requests = add_some(engine, lab, names="abc")
    engine.step()
    outputs = engine.abort(["c", "a", "nobody"])
    assert [(output.request_id, output.finish_reason) for output in outputs] == [("c", "abort"), ("a", "abort")]
    tokens, _, _ = finish(engine)
    assert tokens == {"b": alone(lab, requests)["b"]}
    assert engine.abort(["a", "b", "c"]) == []


def test_abort_can_say_that_a_stop_string_was_found(build, lab):
    log = Log()
    engine, _ = build(listeners=[log])
    add_some(engine, lab, names="a")
    engine.step()
    (output,) = engine.abort(["a"], finish_reason="stop")
    assert output.finish_reason == log.finished[0].finish_reason == "stop"


def test_id_can_be_used_again_once_its_request_is_done_with(build, lab):
    engine, _ = build(max_steps_in_flight=2)
    for _ in range(2):
        requests = add_some(engine, lab, names="a")
        tokens, _, _ = finish(engine)
        assert tokens == alone(lab, requests)


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_steps_in_flight", [None, 3])
def test_request_that_breaks_its_step_fails_alone(build, lab, max_steps_in_flight):
    engine, _ = build(
        is_broken=lambda ids: "b" in ids, max_steps_in_flight=max_steps_in_flight, max_num_batched_tokens=10
    )
    requests = add_some(engine, lab)
    tokens, reasons, errors = finish(engine)
    assert errors == {"a": None, "b": "ValueError: the model is out of order", "c": None, "d": None}
    assert reasons["b"] == "error"
    assert {name: tokens[name] for name in "acd"} == {name: alone(lab, requests)[name] for name in "acd"}


def test_request_that_breaks_in_the_middle_of_its_answer_keeps_what_it_had(build, lab):
    requests = {}
    engine, _ = build(is_broken=lambda ids: "b" in ids and len(requests["b"].output_token_ids) == 3)
    requests |= add_some(engine, lab)
    tokens, reasons, _ = finish(engine)
    assert reasons["b"] == "error"
    assert tokens["b"] == alone(lab, requests)["b"][:3]
    assert tokens["d"] == alone(lab, requests)["d"]


def test_fault_that_does_not_repeat_hurts_nobody(build, lab):
    faults = deque([False, False, True, False, False, False, False, True])
    engine, _ = build(is_broken=lambda ids: bool(faults) and faults.popleft())
    requests = add_some(engine, lab)
    tokens, _, _ = finish(engine)
    assert tokens == alone(lab, requests)
    assert engine.stats().num_failed_steps == 2


def test_every_request_fails_when_every_step_does_and_the_engine_goes_on(build, lab):
    down = [True]
    engine, _ = build(is_broken=lambda ids: down[0])
    add_some(engine, lab)
    _, reasons, _ = finish(engine)
    assert set(reasons.values()) == {"error"}
    down[0] = False
    requests = add_some(engine, lab)
    tokens, _, _ = finish(engine)
    assert tokens == alone(lab, requests)


def test_suspect_can_be_aborted_before_its_rerun(build, lab):
    engine, _ = build(is_broken=lambda ids: len(ids) > 2)
    requests = add_some(engine, lab)
    assert engine.step() == []  # the step of all four failed
    engine.abort(["a", "c"])
    tokens, _, _ = finish(engine)
    assert tokens == {name: alone(lab, requests)[name] for name in "bd"}


def test_submission_that_fails_counts_as_a_failed_step(build, lab, monkeypatch):
    engine, executor = build()
    submit, faults = executor.submit, deque([True, False, False, True, True])

    def broken(output):
        if faults and faults.popleft():
            raise OSError("the pipe is closed")
        return submit(output)

    monkeypatch.setattr(executor, "submit", broken)
    requests = add_some(engine, lab, names="ab")
    tokens, reasons, errors = finish(engine)
    # The step failed, a and b ran alone; the next one failed, and so did a alone.
    assert (reasons["a"], errors["a"]) == ("error", "OSError: the pipe is closed")
    assert tokens["b"] == alone(lab, requests)["b"]


@pytest.mark.parametrize("where", ["submit", "result"])
def test_engine_whose_executor_is_lost_says_so_and_blames_nobody(build, lab, monkeypatch, where):
    engine, executor = build()
    add_some(engine, lab, names="ab")
    engine.check()

    def lost(*_):
        raise ExecutorLostError("rank 1 is gone")

    if where == "submit":
        monkeypatch.setattr(executor, "submit", lost)
    else:
        monkeypatch.setattr(executor, "submit", lambda output: SimpleNamespace(result=lost))
    with pytest.raises(ExecutorLostError, match="rank 1 is gone"):
        engine.step()
    monkeypatch.setattr(executor, "check", lost)
    with pytest.raises(ExecutorLostError):
        engine.check()


def test_request_that_cannot_be_planned_fails_alone(build, lab, monkeypatch):
    engine, _ = build()
    pages = engine._scheduler.block_manager
    open_ = pages.open

    def broken(sequence_id, token_ids, **options):
        if sequence_id == "b":
            raise TypeError("unhashable")
        return open_(sequence_id, token_ids, **options)

    monkeypatch.setattr(pages, "open", broken)
    requests = add_some(engine, lab)
    tokens, _, errors = finish(engine)
    assert "TypeError: unhashable" in errors["b"]
    assert {name: tokens[name] for name in "acd"} == {name: alone(lab, requests)[name] for name in "acd"}


def test_request_whose_pages_cannot_be_published_fails_alone(build, lab, monkeypatch):
    engine, _ = build()
    pages = engine._scheduler.block_manager
    publish = pages.publish

    def broken(sequence_id, *args):
        if sequence_id == "b":
            raise TypeError("unhashable")
        publish(sequence_id, *args)

    monkeypatch.setattr(pages, "publish", broken)
    requests = add_some(engine, lab)
    _, reasons, errors = finish(engine)
    assert errors["b"] == "TypeError: unhashable"
    assert [reasons[name] for name in "acd"] == ["length"] * 3
    assert requests["a"].output_token_ids == alone(lab, requests)["a"]


def test_listener_that_raises_is_logged_and_otherwise_ignored(build, lab, caplog):
    class Bad(Log):
        def on_step(self, stats):
            raise RuntimeError("no disk")

    good = Log()
    engine, _ = build(listeners=[Bad(), good])
    requests = add_some(engine, lab, names="a")
    tokens, _, _ = finish(engine)
    assert tokens == alone(lab, requests)
    assert "statistics may be incomplete" in caplog.text
    assert len(good.steps) == 8


@pytest.mark.parametrize("seed", range(60))
def test_random_faults_and_aborts_under_memory_pressure(build, lab, seed):
    """Some requests break every step they are in; others break steps now and then, but never alone."""
    rng = random.Random(seed)
    poisoned = set()

    def is_broken(ids):
        return not poisoned.isdisjoint(ids) or (len(ids) > 1 and rng.random() < 0.1)

    engine, _ = build(
        is_broken=is_broken,
        max_steps_in_flight=rng.choice([1, 2, 3]),
        num_blocks=rng.choice([8, 10, 20]),
        max_model_len=30,
        max_num_seqs=rng.choice([2, 5]),
        max_num_batched_tokens=rng.choice([5, 7, 30]),
        watermark=0,
    )
    requests, tokens, ended = {}, {}, {}
    while len(requests) < 25 or engine.has_unfinished:
        assert engine.stats().num_steps < 5000, "it runs in circles"
        if len(requests) < 25 and rng.random() < 0.3:
            name = f"r{len(requests)}"
            prompt = [rng.randrange(3) for _ in range(rng.randint(1, 20))]
            request = lab.make_request(name, prompt, max_tokens=rng.randint(1, 10))
            if rng.random() < 0.15:
                poisoned.add(name)
            requests[name], tokens[name] = request, []
            engine.add(request)
        outputs = engine.abort([rng.choice(list(requests))]) if requests and rng.random() < 0.03 else []
        for output in outputs + engine.step():
            assert output.request_id not in ended
            tokens[output.request_id] += output.token_ids
            if output.finish_reason:
                ended[output.request_id] = output.finish_reason
        engine._scheduler.block_manager.check_invariants()
    assert engine.stats().kv_cache_usage == 0
    for name, request in requests.items():
        if name in poisoned:
            assert ended[name] in ("error", "abort")
            assert tokens[name] == []
        elif ended[name] != "abort":
            assert (tokens[name], ended[name]) == lab.generate_alone(request, max_model_len=30)[:2]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 50, 2**63, 1.0, "1", None, float("nan")])
def test_prompt_with_an_id_the_model_does_not_have_is_refused(build, lab, bad):
    engine, _ = build()
    with pytest.raises(InvalidRequestError, match=r"prompt token 2 is .*; the model knows the ids 0 to 49") as caught:
        engine.add(lab.make_request("a", [1, 2, bad]))
    assert caught.value.param == "prompt"
    assert not engine.has_unfinished


@pytest.mark.parametrize(
    "params",
    [
        {"stop_token_ids": (50,)},
        {"logit_bias": {50: 1.0}},
        {"allowed_token_ids": (1, 50)},
        {"bad_words_token_ids": ((1, 50),)},
    ],
)
def test_parameter_with_an_id_the_model_does_not_have_is_refused(build, lab, params):
    engine, _ = build()
    with pytest.raises(InvalidRequestError, match="50"):
        engine.add(lab.make_request("a", [1], **params))
    assert not engine.has_unfinished


def test_lengths_and_queue_are_checked_at_the_door(build, lab):
    engine, _ = build(max_num_seqs=1, max_num_queued=0)
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        engine.add(lab.make_request("a", []))
    engine.add(lab.make_request("a", [1]))
    with pytest.raises(QueueFullError):
        engine.add(lab.make_request("b", [1]))
    finish(engine)
    engine.add(lab.make_request("b", [1]))


# -- statistics --------------------------------------------------------------------------------------------------------


def test_stats_count_what_happened(build, lab):
    engine, _ = build(num_blocks=8, watermark=0, max_num_batched_tokens=16)
    add_some(engine, lab, names="ab", max_tokens=18)
    add_some(engine, lab, names="c", max_tokens=2)
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (3, 0, 6 / 8)
    assert (stats.prompt_tokens, stats.generation_tokens) == (12, 2)
    finish(engine)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0)
    assert (stats.prompt_tokens, stats.generation_tokens) == (18, 38)
    assert stats.num_preemptions > 0
    assert stats.prefix_cache_queries >= 18
    assert stats.num_steps >= 18
    assert 0 < stats.scheduler_share < 1
    assert 0 < stats.schedule_seconds < stats.step_seconds


def test_listener_is_told_of_every_step_and_every_request(build, lab):
    log = Log()
    engine, _ = build(listeners=[log], max_num_batched_tokens=8)
    add_some(engine, lab, names="ab", max_tokens=3)
    finish(engine)
    assert [step.num_tokens for step in log.steps] == [8, 5, 2, 1]
    assert sum(step.num_sampled for step in log.steps) == 6
    assert all(step.seconds > 0 for step in log.steps)
    assert sorted(timing.request_id for timing in log.finished) == ["a", "b"]


def test_timing_adds_up(build, lab):
    engine, _ = build()
    engine.add(lab.make_request("a", [1] * 6, max_tokens=4, arrival_time=None))
    while engine.has_unfinished:
        outputs = engine.step()
    timing = outputs[-1].timing
    assert timing.arrival_time < timing.first_scheduled_time < timing.first_token_time < timing.finished_time
    parts = timing.queue_seconds + timing.prefill_seconds + timing.decode_seconds
    assert parts == pytest.approx(timing.total_seconds)
    assert timing.first_token_seconds == pytest.approx(timing.queue_seconds + timing.prefill_seconds)
    assert (timing.num_prompt_tokens, timing.num_generation_tokens, timing.finish_reason) == (6, 4, "length")


def test_timing_of_a_request_that_never_ran_says_so(build, lab):
    engine, _ = build()
    engine.add(lab.make_request("a", [1]))
    (output,) = engine.abort(["a"])
    timing = output.timing
    assert timing.first_scheduled_time is timing.first_token_time is None
    assert timing.prefill_seconds is timing.decode_seconds is timing.first_token_seconds is None
    assert timing.queue_seconds == timing.total_seconds


def test_runner_is_told_whom_to_forget(build, lab):
    engine, executor = build()
    add_some(engine, lab, names="a", max_tokens=2)
    finish(engine)
    add_some(engine, lab, names="b", max_tokens=2)
    finish(engine)
    assert executor._runner.runner.forgotten == ["a"]
