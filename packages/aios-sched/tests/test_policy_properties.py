"""What policies promise of a whole scheduler, whatever arrives: the same tokens, an end, a fair share."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios_sched.policy.fair import FairQueue
from aios_sched.policy.priority import MIN_PRIORITY, PriorityQueue

QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair", "prefix"])
@settings(QUICK, max_examples=80)
@given(seed=st.integers(0, 2**32), num_moves=st.integers(1, 120))
def test_tokens_are_those_of_each_request_alone_under_every_policy(lab, policy, seed, num_moves):
    lab.Driver(seed, policy=policy).run(num_moves)


# -- priority: nobody starves ------------------------------------------------------------------------------------------


class Siege:
    """A request of low priority, and an endless stream of more important ones that is more than the engine can do."""

    def __init__(self, lab, seed, *, aging_seconds, priority):
        self.lab, self.random = lab, random.Random(seed)
        self.num_seats = self.random.choice([1, 2, 4])
        self.most_tokens = 6
        self.scheduler = lab.make_scheduler(
            num_blocks=4 + self.random.choice([0, 0, 2, 20]),
            max_num_seqs=self.num_seats,
            max_model_len=16,
            max_num_batched_tokens=8,
            policy=PriorityQueue(aging_seconds=aging_seconds),
        )
        self.runner = lab.PageStoreRunner(4)
        self.count = self.steps = 0
        for _ in range(self.num_seats + self.random.randint(0, 5)):
            self.add(MIN_PRIORITY)
        self.victim = self.add(priority)

    def add(self, priority):
        rng = self.random
        prompt = [rng.randrange(1, 50) for _ in range(rng.randint(1, 10))]
        request = self.lab.make_request(
            f"r{self.count}",
            prompt,
            priority=priority,
            arrival_time=float(self.steps),  # a step takes a second
            max_tokens=rng.randint(1, self.most_tokens),
        )
        self.scheduler.add(request)
        self.count += 1
        return request

    def run(self, num_steps):
        """Goes on until the victim has finished, or so many steps."""
        while self.victim.finish_reason is None and self.steps < num_steps:
            for _ in range(self.random.randint(2, 3)):
                self.add(self.random.choice([MIN_PRIORITY, self.random.randint(MIN_PRIORITY, self.victim.priority)]))
            step = self.scheduler.schedule()
            self.scheduler.update(step, self.runner.execute(step))
            self.steps += 1
        return self.victim.finish_reason is not None


@QUICK
@given(seed=st.integers(0, 2**32), aging=st.sampled_from([0.1, 0.25, 0.5]), priority=st.integers(-99, 0))
def test_under_priority_a_request_finishes_however_much_is_more_important(lab, seed, aging, priority):
    """Whoever comes more than (priority - MIN_PRIORITY) * aging seconds later waits behind it.

    So at most three requests a second before that, and those there from the start, are ahead of it. The most important
    one that runs gets a token or a chunk in every step; it can lose them again only to one that is admitted later.
    """
    siege = Siege(lab, seed, aging_seconds=aging, priority=priority)
    horizon = (priority - MIN_PRIORITY) * aging + 1
    most_ahead = siege.count + 3 * horizon + siege.num_seats
    steps_of_one = 2 + siege.most_tokens + 1
    assert siege.run(num_steps=horizon + 2 * most_ahead * steps_of_one)


def test_without_aging_the_same_siege_starves_it(lab):
    """Otherwise the test above could be green because nothing ever besieges anybody."""
    sieges = [Siege(lab, seed, aging_seconds=1e9, priority=0) for seed in range(20)]
    assert sum(siege.run(num_steps=600) for siege in sieges) == 0


# -- fair: the difference is bounded -----------------------------------------------------------------------------------


class Backlog:
    """Tenants that have requests waiting all the time, of lengths that differ from tenant to tenant."""

    def __init__(self, lab, seed, *, weights=None, policy=None, burst=0.0):
        self.lab, self.random = lab, random.Random(seed)
        self.weights = weights or {"a": 1.0, "b": 1.0}
        self.num_seats = self.random.choice([2, 3, 6])
        self.longest_prompt, self.most_tokens = 12, 12
        self.policy = FairQueue(self.weights, burst=burst) if policy is None else policy
        self.scheduler = lab.make_scheduler(
            num_blocks=self.random.choice([6, 10, 100]),
            max_num_seqs=self.num_seats,
            max_model_len=24,
            max_num_batched_tokens=16,
            enable_prefix_caching=False,
            policy=self.policy,
        )
        self.runner = lab.PageStoreRunner(4)
        self.lengths = {name: (self.random.randint(1, 12), self.random.randint(1, 12)) for name in self.weights}
        self.backlogs = {name: self.random.choice([8, 40]) for name in self.weights}
        self.requests = {name: [] for name in self.weights}

    def add(self, tenant):
        prompt_length, num_tokens = self.lengths[tenant]
        request = self.lab.make_request(
            f"{tenant}{len(self.requests[tenant])}",
            [self.random.randrange(1, 50) for _ in range(prompt_length)],
            max_tokens=num_tokens,
            tenant=tenant,
        )
        self.requests[tenant].append(request)
        self.scheduler.add(request)

    def step(self):
        for tenant, requests in self.requests.items():
            backlog = self.backlogs[tenant]
            for _ in range(backlog - sum(request.first_scheduled_time is None for request in requests[-backlog:])):
                self.add(tenant)
        step = self.scheduler.schedule()
        self.scheduler.update(step, self.runner.execute(step))

    def service(self, tenant):
        """What it got, counted from its requests."""
        begun = [request for request in self.requests[tenant] if request.first_scheduled_time is not None]
        tokens = sum(len(request.prompt_token_ids) + 2 * len(request.output_token_ids) for request in begun)
        return tokens / self.weights[tenant]

    @property
    def spread(self):
        served = [self.service(tenant) for tenant in self.weights]
        return max(served) - min(served)

    @property
    def bound(self):
        most = self.longest_prompt + 2 * self.num_seats * self.most_tokens
        return most / min(self.weights.values())


@QUICK
@given(
    seed=st.integers(0, 2**32),
    weights=st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=2),
)
def test_under_fair_no_tenant_gets_further_ahead_than_one_batch(lab, seed, weights):
    backlog = Backlog(lab, seed, weights=weights)
    for _ in range(120):
        backlog.step()
        assert backlog.spread <= backlog.bound
        for tenant in weights:
            assert backlog.policy.counters[tenant] == pytest.approx(backlog.service(tenant))


def test_under_fcfs_the_same_backlog_exceeds_the_bound(lab):
    """Otherwise the bound could be so wide that everything keeps it."""
    spreads = []
    for seed in range(10):
        backlog = Backlog(lab, seed, policy=lab.make_policy("fcfs", block_manager=None))
        backlog.backlogs = {"a": 80, "b": 8}
        for _ in range(1000):
            backlog.step()
        spreads.append(backlog.spread / backlog.bound)
    assert max(spreads) > 2


@QUICK
@given(seed=st.integers(0, 2**32))
def test_under_fair_every_request_of_a_flood_finishes_in_the_smallest_pool(lab, seed):
    backlog = Backlog(lab, seed)
    for _ in range(100):
        backlog.step()
    lab.run_until_done(backlog.scheduler, backlog.runner, limit=3000)
    assert all(request.finish_reason == "length" for requests in backlog.requests.values() for request in requests)
