"""Where requests go: the books of the router, and what each policy promises, over random histories."""

from __future__ import annotations

import random
from collections import Counter
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aios_sched.routing.base import Choice, RoutedRequest, RoutingName
from aios_sched.routing.least_loaded import LeastLoaded
from aios_sched.routing.prefix_affinity import PrefixAffinity
from aios_sched.routing.round_robin import RoundRobin
from aios_sched.routing.router import EXPECTED_OUTPUT_TOKENS, ROUTING_POLICIES, Router
from aios_sched.routing.session import SessionAffinity

PROMPTS = st.lists(st.integers(0, 2), max_size=24)  # few tokens, so that prefixes are shared
SESSIONS = st.sampled_from(["", "a", "b", "c"])


def request(length=8, *, session="", max_tokens=None, **options):
    return RoutedRequest(prompt_token_ids=range(length), session=session, max_tokens=max_tokens, **options)


def router_of(count, make_policy=LeastLoaded):
    router = Router(make_policy)
    for replica in range(count):
        router.add(replica)
    return router


class RouterMachine(RuleBasedStateMachine):
    """Replicas come and go, requests begin and end; a list of open tickets is the model."""

    @initialize(name=st.sampled_from(sorted(ROUTING_POLICIES)))
    def begin(self, name):
        make = ROUTING_POLICIES[name]
        if make is PrefixAffinity:
            self.policy = None

            def make(loads):
                self.policy = PrefixAffinity(loads, block_size=4, max_blocks=7, slack_tokens=3)
                return self.policy
        else:
            self.policy = None
        self.router = Router(make)
        self.present = set()
        self.open = []  # tickets that count
        self.void = []  # of replicas that left meanwhile

    @rule(replica=st.integers(0, 4))
    def come_or_go(self, replica):
        if replica in self.present:
            self.present.remove(replica)
            self.router.remove(replica)
            self.void += [ticket for ticket in self.open if ticket.replica == replica]
            self.open = [ticket for ticket in self.open if ticket.replica != replica]
        else:
            self.present.add(replica)
            self.router.add(replica)

    @rule(prompt=PROMPTS, session=SESSIONS, max_tokens=st.none() | st.integers(1, 999), choices=st.integers(1, 3))
    def route(self, prompt, session, max_tokens, choices):
        routed = RoutedRequest(
            prompt_token_ids=prompt, session=session, max_tokens=max_tokens, num_choices=choices, cache_salt=session
        )
        ticket = self.router.route(routed)
        if not self.present:
            assert ticket is None
            return
        assert ticket is not None
        assert ticket.replica in self.present
        assert 0 <= ticket.num_cached_tokens <= max(0, len(prompt) - 1)
        self.open.append(ticket)

    @precondition(lambda self: self.open or self.void)
    @rule(data=st.data(), twice=st.booleans())
    def end(self, data, twice):
        ticket = data.draw(st.sampled_from(self.open + self.void))
        for _ in range(1 + twice):
            self.router.finish(ticket)
        self.router.note_first_token(ticket)
        if ticket in self.open:
            self.open.remove(ticket)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def compute_a_prompt(self, data):
        ticket = data.draw(st.sampled_from(self.open))
        self.router.note_first_token(ticket)
        assert ticket.num_prompt_tokens == 0

    @invariant()
    def books_are_right(self):
        loads = self.router.loads
        assert set(loads) == self.present
        for replica in self.present:
            mine = [ticket for ticket in self.open if ticket.replica == replica]
            assert loads[replica].num_requests == len(mine)
            assert loads[replica].num_tokens == sum(each.num_prompt_tokens + each.num_output_tokens for each in mine)
        least = loads.least()
        assert (least is None) == (not self.present)
        if least is not None:
            assert least.rank == min(loads[replica].rank for replica in self.present)
        assert len(loads._heap) <= 4 * len(self.present) + 66
        if self.policy is not None:
            self.policy.check_invariants()


TestRouterMachine = RouterMachine.TestCase
TestRouterMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_options_know_every_policy():
    assert get_args(RoutingName) == tuple(ROUTING_POLICIES)


@pytest.mark.parametrize("name", ROUTING_POLICIES)
def test_without_a_replica_there_is_no_choice(name):
    router = Router(ROUTING_POLICIES[name])
    assert router.route(request(session="a")) is None
    router.add(3)
    assert router.route(request(session="a")).replica == 3
    router.remove(3)
    assert router.route(request(session="a")) is None


def test_round_robin_gives_each_its_turn():
    router = router_of(3, RoundRobin)
    assert [router.route(request()).replica for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    router.remove(1)
    assert Counter(router.route(request()).replica for _ in range(100)) == {0: 50, 2: 50}


def test_least_loaded_counts_tokens_before_requests():
    router = router_of(2)
    long = router.route(request(1000))
    assert long.replica == 0
    assert [router.route(request(100, max_tokens=10)).replica for _ in range(5)] == [1] * 5
    router.finish(long)
    assert router.route(request()).replica == 0


def test_equals_take_turns():
    router = router_of(4)
    for _ in range(3):  # each request ends before the next one comes
        replicas = []
        for _ in range(4):
            ticket = router.route(request())
            replicas.append(ticket.replica)
            router.finish(ticket)
        assert sorted(replicas) == [0, 1, 2, 3]


def test_an_output_is_expected_to_be_no_longer_than_usual():
    router = router_of(1)
    assert router.route(request(5, max_tokens=7, num_choices=3)).num_output_tokens == 21
    assert router.route(request(5, max_tokens=10**6)).num_output_tokens == EXPECTED_OUTPUT_TOKENS
    assert router.route(request(5)).num_output_tokens == EXPECTED_OUTPUT_TOKENS


@given(st.lists(st.text(min_size=1), min_size=1, max_size=30, unique=True), st.integers(2, 8), st.data())
def test_a_replica_that_leaves_moves_its_own_sessions_only(sessions, count, data):
    router = router_of(count, SessionAffinity)
    homes = {session: router.route(request(session=session)).replica for session in sessions}
    gone = data.draw(st.integers(0, count - 1))
    router.remove(gone)
    moved = {session: router.route(request(session=session)).replica for session in sessions}
    assert all(moved[session] == home for session, home in homes.items() if home != gone)
    assert gone not in moved.values()
    router.add(gone)  # whether a session was seen meanwhile or not, it comes home
    assert {session: router.route(request(session=session)).replica for session in sessions} == homes


@given(st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1), st.lists(st.integers(0, 3), max_size=200))
def test_what_is_remembered_of_sessions_changes_nothing(sessions, changes):
    """Against a router that remembers one session only, through comings and goings."""
    routers = [router_of(4, SessionAffinity), router_of(4, lambda loads: SessionAffinity(loads, max_sessions=1))]
    present = set(range(4))
    for number, replica in enumerate(changes):
        for router in routers:
            (router.remove if replica in present else router.add)(replica)
        present ^= {replica}
        session = sessions[number % len(sessions)]
        homes = [router.route(request(session=session)) for router in routers]
        assert len({home and home.replica for home in homes}) == 1


def test_sessions_spread_evenly_and_the_same_everywhere():
    router = router_of(8, SessionAffinity)
    homes = Counter(router.route(request(session=f"user {number}")).replica for number in range(8000))
    assert min(homes.values()) > 850
    assert max(homes.values()) < 1150
    assert [router.route(request(session=f"user {number}")).replica for number in range(6)] == [2, 4, 2, 0, 2, 1]


def test_without_a_session_the_least_loaded_gets_it():
    router = router_of(2, SessionAffinity)
    busy = router.route(request(1000, session="a")).replica
    assert router.route(request()).replica == 1 - busy


def affinity(count, **options):
    options = {"block_size": 4, "slack_tokens": 8} | options
    return router_of(count, lambda loads: PrefixAffinity(loads, **options))


def ids(router, prompt, **options):
    """Routed and finished at once, so that no load is left."""
    ticket = router.route(RoutedRequest(prompt_token_ids=prompt, **options))
    router.finish(ticket)
    return Choice(ticket.replica, ticket.num_cached_tokens)


@given(st.lists(st.tuples(PROMPTS, st.sampled_from(["", "salt"])), max_size=40), st.integers(1, 5))
def test_idle_replicas_get_the_prompts_of_which_they_know_most(prompts, count):
    router, seen = affinity(count), {replica: set() for replica in range(count)}
    for prompt, salt in prompts:
        prefixes = [(salt, tuple(prompt[:end])) for end in range(4, len(prompt), 4)]
        shared = {
            replica: max((len(tokens) for _, tokens in seen[replica].intersection(prefixes)), default=0)
            for replica in range(count)
        }
        choice = ids(router, prompt, cache_salt=salt)
        assert choice.num_cached_tokens == max(shared.values()) == shared[choice.replica]
        seen[choice.replica].update(prefixes)


def test_an_overloaded_replica_is_left_alone_until_waiting_costs_less_than_computing():
    router = affinity(2)
    prompt = list(range(41))
    first = router.route(RoutedRequest(prompt_token_ids=prompt, max_tokens=1))  # 42 tokens outstanding
    again = router.route(RoutedRequest(prompt_token_ids=prompt, max_tokens=1))  # 42 <= 0 + 40 saved + 8 of slack
    assert (again.replica, again.num_cached_tokens) == (first.replica, 40)
    other = router.route(RoutedRequest(prompt_token_ids=prompt, max_tokens=7))  # 44 <= 48
    assert other.replica == first.replica
    fourth = router.route(RoutedRequest(prompt_token_ids=prompt, max_tokens=1))  # 52 > 48
    assert (fourth.replica, fourth.num_cached_tokens) == (1 - first.replica, 0)
    fifth = router.route(RoutedRequest(prompt_token_ids=prompt, max_tokens=1))  # both know it now: the less loaded one
    assert (fifth.replica, fifth.num_cached_tokens) == (1 - first.replica, 40)


def test_a_short_shared_beginning_does_not_pile_everything_on_one_replica():
    """Every chat begins with the same words of the template."""
    router, rng = affinity(2, block_size=16, slack_tokens=64), random.Random(7)
    template = list(range(40))
    counts = Counter(
        router.route(RoutedRequest(prompt_token_ids=template + rng.choices(range(100, 999), k=30))).replica
        for _ in range(40)
    )
    assert min(counts.values()) >= 15


def test_popular_prefix_is_shared_out_among_its_holders():
    router = affinity(5)
    prompt = list(range(400))
    open_tickets = [router.route(RoutedRequest(prompt_token_ids=prompt, max_tokens=300)) for _ in range(100)]
    counts = Counter(ticket.replica for ticket in open_tickets)
    assert set(counts) == set(range(5))
    assert max(counts.values()) <= 2 * min(counts.values())


def test_what_was_least_recently_used_is_forgotten_last_blocks_first():
    router = affinity(1, max_blocks=4)
    ids(router, [1] * 13)  # three blocks
    ids(router, [2] * 9)  # two more: the last of the three goes
    assert ids(router, [1] * 13).num_cached_tokens == 8


def test_a_replica_that_comes_back_has_nothing_cached():
    router = affinity(1)
    ids(router, [1] * 13)
    assert ids(router, [1] * 13).num_cached_tokens == 12
    router.remove(0)
    router.add(0)
    assert ids(router, [1] * 13).num_cached_tokens == 0


def test_only_the_beginning_of_a_very_long_prompt_is_looked_at():
    router = affinity(1, max_prompt_blocks=2)
    ids(router, range(100))
    assert ids(router, range(100)).num_cached_tokens == 8
