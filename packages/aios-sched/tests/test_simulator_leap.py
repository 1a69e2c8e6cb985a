"""Stretches of decoding taken in one go are the same as their steps one by one: every time and every counter."""

from __future__ import annotations

import math
import random
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios_sched.simulator.arrivals import IndependentRequests, bursts, poisson
from aios_sched.simulator.chat import ChatSessions
from aios_sched.simulator.cost import LinearCost
from aios_sched.simulator.fleet import Fleet
from aios_sched.simulator.leaping_scheduler import LeapingScheduler
from aios_sched.simulator.lengths import LogNormalLengths
from aios_sched.simulator.system import SystemConfig
from aios_sched.simulator.trace import TraceRequest


class Overlapping:
    """Requests of few streams at the same time: their pages are equal, and given back while they decode."""

    def __init__(self, seed, num_requests, *, priorities):
        self._seed, self._num_requests, self._priorities = seed, num_requests, priorities

    def arrivals(self):
        generator, now = random.Random(self._seed), 0.0
        for _ in range(self._num_requests):
            now += generator.choice((0.0, generator.expovariate(5)))
            num_prefix = generator.choice((0, 9))
            yield TraceRequest(
                arrival_s=now,
                num_prompt_tokens=num_prefix + generator.randint(1, 30),
                num_output_tokens=generator.randint(1, 60),
                stream=generator.randrange(3),
                prefix=generator.randrange(2),
                num_prefix_tokens=num_prefix,
                session=f"s{generator.randrange(3)}",
                tenant=generator.choice(("", "other")),
                priority=self._priorities and generator.randint(-5, 5),
            )

    def follow_up(self, request, *, finished_s):
        return None


def draw_case(seed):
    """A trace, a system and a cost model, small enough for pages and seats to run out."""
    generator = random.Random(seed)
    max_model_len = generator.choice((64, 128, 300))
    lengths = {
        "outputs": LogNormalLengths(mean=generator.choice((3, 20, 60)), sigma=1.0, high=max_model_len),
        "max_model_len": max_model_len,
    }
    prompts = LogNormalLengths(mean=generator.choice((4, 20, 50)), sigma=1.0, high=max_model_len)
    times = generator.choice((poisson(math.inf), poisson(2.0), poisson(30.0), bursts(8.0, on_seconds=0.5)))
    num_requests = generator.randint(1, 60)
    kind = generator.randrange(3)
    if kind == 0:
        trace = IndependentRequests(times=times, num_requests=num_requests, seed=seed, prompts=prompts, **lengths)
    elif kind == 1:
        trace = ChatSessions(
            times=times,
            num_requests=num_requests,
            seed=seed,
            questions=prompts,
            num_system_tokens=generator.choice((0, 20)),
            mean_think_s=generator.choice((0.0, 0.3)),
            **lengths,
        )
    policy = generator.choice(("fcfs", "fcfs", "priority", "fair", "prefix"))
    if kind == 2:
        trace = Overlapping(seed, num_requests, priorities=policy == "priority")
    block_size = generator.choice((1, 3, 8, 16))
    seats = generator.choice((1, 3, 8))
    system = SystemConfig(
        num_blocks=-(-max_model_len // block_size) + generator.choice((0, 2, 60)),
        block_size=block_size,
        max_num_seqs=seats,
        max_num_batched_tokens=generator.choice((seats, 32, 300)) if seats < 32 else 300,
        max_model_len=max_model_len,
        max_num_queued=generator.choice((None, 0, 5)),
        enable_prefix_caching=generator.random() < 0.8,
        policy=policy,
        replicas=generator.choice((1, 1, 2, 5)),
        routing=generator.choice(("round-robin", "least-loaded", "session", "prefix-affinity")),
    )
    cost = LinearCost(
        step_s=generator.choice((0.01, 0.25)),
        token_s=generator.choice((0.0, 1e-3)),
        sequence_s=1e-3,
        context_s=generator.choice((0.0, 1e-5)),
        pair_s=generator.choice((0.0, 3e-7)),
    )
    return trace, system, cost


def simulate(seed, *, leap):
    trace, system, cost = draw_case(seed)
    fleet = Fleet(system, cost, leap=leap)
    return fleet, fleet.run(trace)


def everything(fleet, results):
    """All that could differ: figures, times, counters, and the state in which pages and queues are left behind."""
    pages = [replica.scheduler.block_manager for replica in fleet.replicas]
    return {
        "times": {name: list(map(repr, values)) for name, values in results.times.items()},
        "arrivals": list(results.arrivals),
        "meters": {each.name: getattr(results.meters, each.name) for each in fields(results.meters)},
        "summary": {k: v for k, v in results.summary().items() if k != "refusal"},
        "tokens": [
            (each.scheduler.num_prompt_tokens, each.scheduler.num_generation_tokens, each.scheduler._num_steps)
            for each in fleet.replicas
        ],
        "forgettable": [each.scheduler._forgettable_ids for each in fleet.replicas],
        "free": [[block.block_id for block in each._pool.free_queue] for each in pages],
        "contents": [[block.content for block in each._pool.blocks] for each in pages],
    }


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32))
def test_leaping_gives_every_time_and_counter_that_single_steps_give(seed):
    leapt, single = simulate(seed, leap=True), simulate(seed, leap=False)
    assert everything(*leapt) == everything(*single)
    for replica in leapt[0].replicas:
        replica.scheduler.block_manager.check_invariants()
        assert replica.scheduler.block_manager.usage == 0


def test_the_cases_reach_what_they_claim_to_test(monkeypatch):
    """Otherwise the test above could be green because nothing is ever leapt over."""
    lengths, preemptions, hits, refused, blocked = [], 0, 0, 0, 0
    leap = LeapingScheduler.leap

    def noting(self, stretch):
        nonlocal blocked
        lengths.append(stretch.num_steps)
        blocked += stretch.blocked and self.num_waiting > 0
        return leap(self, stretch)

    monkeypatch.setattr(LeapingScheduler, "leap", noting)
    for seed in range(150):
        _, results = simulate(seed, leap=True)
        preemptions += results.num_preemptions
        hits += results.num_cached_tokens
        refused += results.num_refused
    assert len(lengths) > 1000
    assert sum(length > 5 for length in lengths) > 300
    assert min(preemptions, hits, refused, blocked) > 100, (preemptions, hits, refused, blocked)


class ForgetsToPublish(LeapingScheduler):
    def _end(self, publishing, ending, outputs):
        super()._end([], ending, outputs)


class TakesOneStepTooMany(LeapingScheduler):
    def _num_steps_with_pages(self, num_steps):
        return max(super()._num_steps_with_pages(num_steps), min(num_steps, 2))


class IgnoresWhoWaits(LeapingScheduler):
    def _is_blocked(self, *, trust_refusal):
        return True


@pytest.mark.parametrize("planted", [ForgetsToPublish, TakesOneStepTooMany, IgnoresWhoWaits])
def test_a_planted_bug_is_found(monkeypatch, planted):
    monkeypatch.setattr("aios_sched.simulator.system.LeapingScheduler", planted)
    with pytest.raises(AssertionError):
        compare_all(range(150))


def compare_all(seeds):
    for seed in seeds:
        assert everything(*simulate(seed, leap=True)) == everything(*simulate(seed, leap=False))
