"""Who gets drafts, how many, what becomes of them, and that a proposer can do no harm."""

from __future__ import annotations

import logging

import pytest

from aios_model.sampling.rows import SampledToken
from aios_sched.drafting import MAX_FAILURES, Drafting
from aios_sched.engine import Engine
from aios_sched.executor import LocalExecutor
from aios_sched.speculative.fixed import FixedController


class Oracle:
    """Drafts what will come, or what `spoil` makes of it; writes down what it is asked and told."""

    def __init__(self, lab, *, spoil=lambda drafts: drafts):
        self.lab, self.spoil = lab, spoil
        self.asked, self.forgotten, self.closed = [], [], False

    def propose(self, contexts):
        self.asked.append({each.request_id: each.max_drafts for each in contexts})
        return [self.spoil(self.guess(each)) for each in contexts]

    def guess(self, context):
        token_ids = list(context.token_ids)
        for _ in range(context.max_drafts):
            token_ids.append(self.lab.next_token(token_ids, context.sampling.seed))
        return token_ids[len(context.token_ids) :]

    def forget(self, request_id):
        self.forgotten.append(request_id)

    def close(self):
        self.closed = True


class Controller(FixedController):
    def __init__(self, num_drafts):
        super().__init__(num_drafts)
        self.notes, self.steps, self.forgotten = [], [], []

    def note(self, request_id, *, num_drafted, num_accepted):
        self.notes.append((request_id, num_drafted, num_accepted))

    def note_step(self, **counts):
        self.steps.append(counts)

    def forget(self, request_id):
        self.forgotten.append(request_id)


class Recorder:
    """Keeps the steps; fails those that `is_broken` says are broken."""

    def __init__(self, runner, is_broken=lambda output: False):
        self.vocab_size, self.runner, self.is_broken = runner.vocab_size, runner, is_broken
        self.steps = []

    def execute(self, output):
        self.steps.append(output)
        if self.is_broken(output):
            raise ValueError("the model is out of order")
        return self.runner.execute(output)


@pytest.fixture
def build(lab):
    """-> engine, with `oracle`, `controller`, `scheduler` and `runner` to look at."""

    def build(*, num_drafts=4, spoil=lambda drafts: drafts, is_broken=lambda output: False, listeners=(), **options):
        oracle, controller = Oracle(lab, spoil=spoil), Controller(num_drafts)
        runner = Recorder(lab.PageStoreRunner(options.get("block_size", 4)), is_broken)
        scheduler = lab.make_scheduler(**options)
        drafting = Drafting(oracle, controller, vocab_size=runner.vocab_size)
        engine = Engine(scheduler, LocalExecutor(runner), listeners, drafting=drafting)
        engine.oracle, engine.controller, engine.scheduler, engine.runner = oracle, controller, scheduler, runner
        engine.drafting = drafting
        return engine

    return build


def finish(engine):
    """-> the outputs of all requests, checked for balanced books after each step."""
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
        engine.scheduler.block_manager.check_invariants()
        assert len(engine.runner.steps) < 1000
    assert engine.stats().kv_cache_usage == 0
    return outputs


def tokens_of(outputs):
    tokens = {}
    for output in outputs:
        tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


def alone(lab, *requests, max_model_len=64):
    return {each.request_id: lab.generate_alone(each, max_model_len=max_model_len)[0] for each in requests}


def test_right_drafts_bring_several_tokens_in_a_step(build, lab):
    engine = build()
    request = lab.make_request("a", [1, 2, 3], max_tokens=16)
    engine.add(request)
    outputs = finish(engine)
    assert [len(output.token_ids) for output in outputs] == [1, 5, 5, 5]
    assert [len(output.logprobs) for output in outputs] == [1, 5, 5, 5]
    assert tokens_of(outputs) == alone(lab, request)
    assert outputs[-1].finish_reason == "length"
    assert outputs[-1].timing.num_generation_tokens == 16
    stats = engine.stats()
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (3, 12, 12)
    assert (stats.num_steps, stats.generation_tokens, stats.acceptance_rate) == (4, 16, 1.0)
    assert stats.draft_seconds > 0


@pytest.mark.parametrize("num_right", [0, 1, 3])
def test_a_wrong_draft_ends_what_is_accepted(build, lab, num_right):
    engine = build(spoil=lambda drafts: [*drafts[:num_right], *((token + 1) % 50 for token in drafts[num_right:])])
    request = lab.make_request("a", [1, 2, 3], max_tokens=21)
    engine.add(request)
    outputs = finish(engine)
    assert tokens_of(outputs) == alone(lab, request)
    assert {len(output.token_ids) for output in outputs[1:-1]} == {num_right + 1}
    assert all(note[2] == min(num_right, note[1]) for note in engine.controller.notes)


def test_a_stop_token_in_the_middle_of_what_was_accepted_ends_it_there(build, lab):
    request = lab.make_request("a", [1, 2, 3], max_tokens=30)
    tokens = alone(lab, request)["a"]
    place = next(
        place for place in range(6, 30) if tokens[place] not in tokens[:place] and (place - 1) % 5 not in (0, 4)
    )
    request = lab.make_request("a", [1, 2, 3], max_tokens=30, stop_token_ids=(tokens[place],))
    engine = build()
    engine.add(request)
    outputs = finish(engine)
    assert tokens_of(outputs) == {"a": tokens[: place + 1]}
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", tokens[place])
    assert len(outputs[-1].token_ids) < 5


def test_drafts_stay_within_max_tokens_the_context_and_the_budget(build, lab):
    engine = build(num_drafts=9, max_model_len=20, max_num_batched_tokens=8)
    a, b = lab.make_request("a", [1], max_tokens=3), lab.make_request("b", [2] * 5, max_tokens=15)
    engine.add(a)
    engine.add(b)
    assert tokens_of(finish(engine)) == alone(lab, a, b, max_model_len=20)
    assert engine.oracle.asked[0] == {"a": 1, "b": 5}, "two tokens are left of a, one comes anyway; six of the budget"
    for output in engine.runner.steps:
        assert output.num_scheduled_tokens <= 8
        assert all(row.start + len(row.token_ids) < 20 for row in output.requests)
    assert engine.scheduler.num_preemptions == 0


def test_drafts_leave_the_budget_to_prompts_and_newcomers(build, lab):
    engine = build(num_drafts=9, max_num_batched_tokens=10, max_num_seqs=2, max_model_len=60)
    engine.add(lab.make_request("a", [1], max_tokens=40))
    engine.step()
    engine.add(lab.make_request("b", [2] * 30, max_tokens=2))
    for _ in range(3):
        engine.step()
        decode, chunk = engine.runner.steps[-1].requests
        assert (len(decode.token_ids), len(chunk.token_ids)) == (1, 9)
    finish(engine)


def test_nobody_is_preempted_for_a_draft(build, lab):
    """Two requests, and pages for what they are known to need."""
    requests = [lab.make_request(name, [ord(name) % 40] * 6, max_tokens=6) for name in "ab"]
    engine = build(num_drafts=5, num_blocks=6, block_size=2, watermark=0, max_model_len=12, enable_prefix_caching=False)
    for request in requests:
        engine.add(request)
    engine.step()
    engine.step()
    # Each holds three pages; a newest token in a fourth one would have to push the other out.
    assert engine.scheduler.num_preemptions <= 1
    assert tokens_of(finish(engine)).keys() == {"a", "b"}
    plain = lab.make_scheduler(num_blocks=6, block_size=2, watermark=0, max_model_len=12, enable_prefix_caching=False)
    for name in "ab":
        plain.add(lab.make_request(name, [ord(name) % 40] * 6, max_tokens=6))
    lab.run_until_done(plain, lab.PageStoreRunner(2))
    assert engine.scheduler.num_preemptions <= plain.num_preemptions


def test_drafts_take_pages_only_while_each_running_request_could_have_one(build, lab):
    engine = build(num_drafts=6, num_blocks=9, block_size=2, watermark=0, max_model_len=18, enable_prefix_caching=False)
    for name in "abc":
        engine.add(lab.make_request(name, [ord(name) % 40] * 2, max_tokens=8))
    engine.step()
    engine.step()
    manager = engine.scheduler.block_manager
    step = engine.runner.steps[-1]
    held = sum(len(row.block_table) for row in step.requests)
    assert held <= manager.num_blocks - 3
    assert sum(row.num_drafts for row in step.requests) > 0
    finish(engine)


def test_pages_of_rejected_drafts_go_back_at_once(build, lab):
    engine = build(num_drafts=9, block_size=2, spoil=lambda drafts: [(token + 1) % 50 for token in drafts])
    engine.add(lab.make_request("a", [1, 2, 3], max_tokens=20))
    engine.step()
    while engine.has_unfinished:
        engine.step()
        if engine.has_unfinished:
            (request,) = engine.scheduler.running
            table = engine.scheduler.block_manager.block_table("a")
            assert len(table) == -(-request.num_computed_tokens // 2)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda drafts: [50, *drafts],
        lambda drafts: [-1, *drafts],
        lambda drafts: [*drafts, *drafts],
        lambda drafts: [*drafts[:1], 10**9],
        lambda drafts: [],
    ],
    ids=["too large", "negative", "too many", "huge", "none"],
)
def test_what_is_no_token_or_too_much_is_dropped(build, lab, spoil):
    engine = build(spoil=spoil)
    request = lab.make_request("a", [1, 2, 3], max_tokens=13)
    engine.add(request)
    assert tokens_of(finish(engine)) == alone(lab, request)
    for output in engine.runner.steps:
        assert all(0 <= token < 50 for row in output.requests for token in row.token_ids)
        assert all(row.num_drafts <= 4 for row in output.requests)


def test_a_proposer_that_keeps_failing_is_not_asked_again(build, lab, caplog):
    def fail(drafts):
        raise RuntimeError("no idea")

    engine = build(spoil=fail)
    request = lab.make_request("a", [1, 2, 3], max_tokens=12)
    engine.add(request)
    with caplog.at_level(logging.ERROR):
        assert tokens_of(finish(engine)) == alone(lab, request)
    assert len(engine.oracle.asked) == MAX_FAILURES
    assert [record.message for record in caplog.records] == [
        "Drafting failed; this step goes without",
        "Drafting failed; this step goes without",
        "Drafting failed; from now on without",
    ]


def test_a_proposer_that_answers_for_too_few_counts_as_failed(build, lab, monkeypatch):
    engine = build()
    monkeypatch.setattr(engine.oracle, "propose", lambda contexts: [])
    request = lab.make_request("a", [1, 2, 3], max_tokens=5)
    engine.add(request)
    assert tokens_of(finish(engine)) == alone(lab, request)
    assert engine.stats().num_draft_tokens == 0


def test_requests_that_ended_are_forgotten_and_a_reused_id_is_somebody_new(build, lab):
    engine = build()
    for name in "ab":
        engine.add(lab.make_request(name, [ord(name) % 40] * 3, max_tokens=30))
    for _ in range(3):
        engine.step()
    engine.abort(["a"])
    engine.add(lab.make_request("a", [9, 9], max_tokens=2))
    engine.step()
    assert engine.oracle.forgotten == engine.controller.forgotten == ["a"]
    finish(engine)
    assert engine.oracle.forgotten == ["a", "b"], "the second one had no drafts: one of its two tokens comes anyway"
    assert sorted(engine.controller.forgotten) == ["a", "a", "b"]


def test_a_preempted_request_is_forgotten_by_the_proposer_only(build, lab):
    engine = build(num_blocks=8, block_size=2, max_model_len=16, watermark=0, enable_prefix_caching=False, num_drafts=1)
    requests = [lab.make_request(name, [ord(name) % 40] * 4, max_tokens=12) for name in "ab"]
    for request in requests:
        engine.add(request)
    while not engine.scheduler.num_preemptions:
        engine.step()
    engine.step()
    assert engine.oracle.forgotten == ["b"]
    assert engine.controller.forgotten == []
    assert not requests[1].draft_token_ids
    finish(engine)
    assert sorted(engine.controller.forgotten) == ["a", "b"]


def test_a_step_that_fails_with_drafts_is_run_again_without(build, lab):
    engine = build(is_broken=lambda output: any(row.num_drafts for row in output.requests))
    requests = [lab.make_request(name, [ord(name) % 40] * 3, max_tokens=6) for name in "ab"]
    for request in requests:
        engine.add(request)
    outputs = finish(engine)
    assert tokens_of(outputs) == alone(lab, *requests)
    assert all(output.error is None for output in outputs)
    assert engine.stats().num_failed_steps > 0
    assert engine.stats().num_draft_tokens == 0, "nobody checked them"


def test_a_runner_that_takes_a_wrong_draft_fails_that_request_only(build, lab, monkeypatch):
    engine = build()
    a, b = (lab.make_request(name, [ord(name) % 40] * 3, max_tokens=9) for name in "ab")
    engine.add(a)
    engine.add(b)
    engine.step()
    execute = engine.runner.execute

    def careless(output):
        result = execute(output)
        if "a" in result.further:
            result.sampled["a"] = SampledToken(token_id=(result.sampled["a"].token_id + 1) % 50)
        return result

    monkeypatch.setattr(engine.runner, "execute", careless)
    outputs = finish(engine)
    (failed,) = (output for output in outputs if output.error)
    assert failed.request_id == "a"
    assert "for the drafts" in failed.error
    assert tokens_of([*outputs])["b"] == alone(lab, b)["b"][1:]


def test_listeners_and_the_controller_hear_of_drafts(build, lab):
    steps = []

    class Listener:
        def on_step(self, stats):
            steps.append((stats.num_requests, stats.num_tokens, stats.num_drafts, stats.num_sampled))

        def on_finished(self, timing):
            pass

    engine = build(listeners=[Listener()], num_drafts=2)
    engine.add(lab.make_request("a", [1, 2, 3], max_tokens=6))
    finish(engine)
    assert steps == [(1, 3, 0, 1), (1, 3, 2, 3), (1, 2, 1, 2)]
    assert engine.controller.notes == [("a", 2, 2), ("a", 1, 1)]
    counts = [(step["num_requests"], step["num_tokens"], step["num_drafts"]) for step in engine.controller.steps]
    assert counts == [(1, 3, 0), (1, 3, 2), (1, 2, 1)]
    assert [step["proposer_seconds"] > 0 for step in engine.controller.steps] == [False, True, True]
    assert all(step["seconds"] > 0 for step in engine.controller.steps)


def test_closing_closes_the_proposer(build):
    engine = build()
    engine.drafting.close()
    assert engine.oracle.closed
