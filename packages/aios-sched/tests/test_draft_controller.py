"""The adaptive controller on simulated engines: never slower, near the best fixed number, awake when texts change."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from aios_model.errors import ConfigError
from aios_sched.speculative.acceptance import Acceptance
from aios_sched.speculative.controller import AdaptiveController
from aios_sched.speculative.cost_curve import CostCurve

# Milliseconds of a step by its tokens: measured on two CPU cores; a GPU; a model for which every token costs the same.
CPU = {1: 29, 16: 33, 64: 94, 1024: 1440}
GPU = {1: 10, 64: 11, 256: 14, 1024: 40}
LINEAR = {1: 10, 1024: 10_240}
NOISE = 0.1


def line(table):
    sizes = sorted(table)

    def seconds(size):
        left, right = next(pair for pair in pairwise(sizes) if size <= pair[1])
        return (table[left] + (table[right] - table[left]) * (size - left) / (right - left)) / 1000

    return seconds


def lookup(depth):
    return 0.0001


def draft_model(depth):
    return 0.006 + 0.008 * depth


class Simulation:
    """An engine that runs `num_requests` at a time, `length` tokens each."""

    def __init__(self, step, proposer, right, *, num_requests, seed=0, length=200, **options):
        self.step, self.proposer, self.right = step, proposer, right
        self.num_requests, self.length = num_requests, length
        self.random = random.Random(seed)
        self.controller = AdaptiveController(max_drafts=8, **options)
        self.names = list(range(num_requests))
        self.tokens = dict.fromkeys(self.names, 0)
        self.slowness = 1.0

    def run(self, num_steps):
        """Tokens per second, relative to the same without drafts."""
        plain = spent = 0.0
        for at in range(num_steps):
            new, seconds = self._step(at)
            spent += seconds
            plain += new * self.step(self.num_requests) * self.slowness / self.num_requests
        return plain / spent

    def _step(self, at):
        controller, count = self.controller, self.num_requests
        wanted = {name: controller.num_drafts(str(name), num_requests=count) for name in self.names}
        num_drafts = sum(wanted.values())
        proposing = self.slowness * self.proposer(max(wanted.values())) if num_drafts else 0.0
        noise = self.random.lognormvariate(-(NOISE**2) / 2, NOISE)
        seconds = self.slowness * self.step(count + num_drafts) * noise
        new = sum(self._accept(name, drafts, at) for name, drafts in wanted.items())
        controller.note_step(
            num_requests=count,
            num_tokens=count + num_drafts,
            num_drafts=num_drafts,
            seconds=seconds,
            proposer_seconds=proposing,
        )
        return new, seconds + proposing

    def _accept(self, name, drafts, at):
        first, following = self.right(name, at)
        accepted = 0
        while accepted < drafts and self.random.random() < (following if accepted else first):
            accepted += 1
        if drafts:
            self.controller.note(str(name), num_drafted=drafts, num_accepted=accepted)
        self.tokens[name] += 1 + accepted
        if self.tokens[name] >= self.length:
            self.controller.forget(str(name))
            self.names[self.names.index(name)] = fresh = max(self.names) + 1
            self.tokens[fresh] = 0
        return 1 + accepted


def best_fixed(step, proposer, first, following, num_requests):
    """The best that one number of drafts for all steps and requests gives, by the same measure."""
    plain, best = step(num_requests) / num_requests, 1.0
    for drafts in range(1, 9):
        new = num_requests * (1 + sum(first * following**place for place in range(drafts)))
        best = max(best, plain * new / (step(num_requests * (1 + drafts)) + proposer(drafts)))
    return best


MACHINES = [("cpu", CPU), ("gpu", GPU), ("linear", LINEAR)]
PROPOSERS = [("lookup", lookup), ("draft model", draft_model)]
RIGHT = [(0.0, 0.0), (0.3, 0.3), (0.3, 0.95), (0.8, 0.8), (0.95, 0.95)]


@pytest.mark.parametrize("num_requests", [1, 4, 16, 64])
@pytest.mark.parametrize("proposer", [each for _, each in PROPOSERS], ids=[name for name, _ in PROPOSERS])
@pytest.mark.parametrize("table", [each for _, each in MACHINES], ids=[name for name, _ in MACHINES])
def test_never_slower_and_near_the_best_fixed_number(table, proposer, num_requests):
    step, num_steps = line(table), 1600 // num_requests + 300
    for first, following in RIGHT:
        right = (first, following)
        reached = Simulation(step, proposer, lambda name, at, right=right: right, num_requests=num_requests).run(
            num_steps
        )
        best = best_fixed(step, proposer, first, following, num_requests)
        assert reached >= 0.97, (right, reached)
        assert math.log(reached) >= 0.5 * math.log(best) - 0.03, (right, reached, best)


@pytest.mark.parametrize("num_requests", [1, 8, 64])
@pytest.mark.parametrize("proposer", [each for _, each in PROPOSERS], ids=[name for name, _ in PROPOSERS])
def test_never_slower_where_texts_change(proposer, num_requests):
    def right(name, at):
        return (0.9, 0.9) if at // 100 % 2 else (0.0, 0.0)

    reached = Simulation(line(CPU), proposer, right, num_requests=num_requests, length=10**6).run(800)
    assert reached >= 0.97
    if proposer is lookup and num_requests <= 8:
        assert reached > 1.3


def test_easy_requests_get_drafts_and_hard_ones_do_not():
    simulation = Simulation(
        line(CPU), lookup, lambda name, at: (0.9, 0.9) if name % 2 else (0.0, 0.0), num_requests=4, length=10**6
    )
    assert simulation.run(300) > 1.4
    wanted = [simulation.controller.num_drafts(str(name), num_requests=4) for name in range(4)]
    assert wanted[1] >= 3
    assert wanted[3] >= 3
    assert wanted[0] <= 1
    assert wanted[2] <= 1


def test_drafts_come_back_when_a_text_becomes_easy():
    now = [(0.0, 0.0)]
    simulation = Simulation(line(CPU), lookup, lambda name, at: now[0], num_requests=1, length=10**6)
    assert simulation.run(400) > 0.97
    now[0] = (0.95, 0.95)
    simulation.run(100)
    assert simulation.run(50) > 3.0


def test_slower_machine_changes_nothing():
    """Decisions rest on ratios: half the speed in the middle of it all is no reason to stop."""
    simulation = Simulation(line(CPU), lookup, lambda name, at: (0.8, 0.8), num_requests=1, length=10**6)
    simulation.run(200)
    simulation.slowness = 2.0
    assert simulation.run(200) > 2.5


def test_many_requests_leave_no_room_for_drafts():
    simulation = Simulation(line(CPU), lookup, lambda name, at: (0.5, 0.5), num_requests=64)
    simulation.run(200)
    drafts = [decision.num_drafts for decision in list(simulation.controller.trace)[-100:]]
    assert sum(drafts) / len(drafts) < 6


def test_same_times_give_the_same_decisions():
    def trace():
        simulation = Simulation(line(CPU), draft_model, lambda name, at: (0.7, 0.7), num_requests=3, trace_length=150)
        simulation.run(200)
        return list(simulation.controller.trace)

    assert trace() == trace()
    assert [decision.step for decision in trace()] == list(range(51, 201))


def test_probing_stays_within_its_share():
    num_steps = 4000
    simulation = Simulation(line(CPU), draft_model, lambda name, at: (0.0, 0.0), num_requests=1, length=10**6)
    simulation.run(num_steps)
    lost = sum(each.proposer_seconds for each in simulation.controller.trace if each.kind == "probe")
    assert 0 < lost < 0.0085 * num_steps * line(CPU)(1)


def test_a_decision_not_to_draft_is_kept_for_some_steps():
    simulation = Simulation(line(CPU), draft_model, lambda name, at: (0.0, 0.0), num_requests=3, length=10**6)
    simulation.run(1000)
    controller = simulation.controller
    assert len(controller.trace) < 1000 / 4, "every step was thought about"
    while not controller._rest:
        simulation._step(0)
    assert controller.num_drafts("0", num_requests=3) == 0
    assert controller._rest, "nothing has changed"
    controller.num_drafts("0", num_requests=4)
    assert not controller._rest, "more requests run"
    while not controller._rest:
        simulation._step(0)
    controller.num_drafts("somebody new", num_requests=3)
    assert not controller._rest, "it may have drafts"


def test_first_steps_and_prompts_run_without_drafts():
    controller = AdaptiveController(max_drafts=4)
    assert controller.num_drafts("r", num_requests=1) == 0
    step = {"num_requests": 2, "num_drafts": 0, "proposer_seconds": 0.0}
    for _ in range(5):  # a chunk of a prompt says nothing about steps of two tokens
        controller.note_step(num_tokens=300, seconds=0.3, **step)
        assert controller.num_drafts("r", num_requests=1) == 0
    controller.forget("r")
    controller.forget("unknown")


@pytest.mark.parametrize(
    "options", [{"max_drafts": 0}, {"max_drafts": 1, "probe_share": 0.1}, {"max_drafts": 1, "loss_share": -0.1}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError):
        AdaptiveController(**options)


def test_acceptance_follows_its_own_drafts_and_begins_with_those_of_others():
    common = Acceptance()
    for _ in range(300):
        Acceptance(common).note(num_drafted=4, num_accepted=1)
    assert common.first > 0.95
    assert common.following < 0.05
    request = Acceptance(common)
    assert request.first == pytest.approx(common.first)
    for _ in range(20):
        request.note(num_drafted=4, num_accepted=0)
    assert request.first < 0.25
    assert request.survival(8, least=0.3) == []


def test_cost_curve_finds_the_costs_and_is_never_falling():
    curve, draw, truth = CostCurve(slope=0.003), random.Random(1), line(CPU)
    for _ in range(3000):
        size = draw.choice([1, 2, 3, 5, 8, 16, 24, 64, 100])
        curve.note(size, truth(size) * draw.lognormvariate(0, NOISE))
    for size in (1, 4, 12, 20, 64, 80, 130):
        assert curve.seconds(size) == pytest.approx(truth(size), rel=0.12)
        assert curve.hopeful(size) < curve.seconds(size)
    seconds = [curve.seconds(size) for size in range(1, 300)]
    assert seconds == sorted(seconds)
