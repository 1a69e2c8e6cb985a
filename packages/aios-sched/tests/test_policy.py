"""What each policy promises, on the queue alone; `test_policy_properties.py` has the promises that need a scheduler."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aios_kvcache.block_manager import BlockManager
from aios_model.errors import ConfigError, InvalidRequestError
from aios_sched.policy.fair import FairQueue
from aios_sched.policy.fcfs import FCFSQueue
from aios_sched.policy.prefix import PrefixQueue
from aios_sched.policy.priority import MAX_PRIORITY, MIN_PRIORITY, PriorityQueue
from aios_sched.policy.registry import make_policy
from aios_sched.request import RequestStatus

POLICIES = ("fcfs", "priority", "fair", "prefix")


def drain(queue):
    found = []
    while (request := queue.peek()) is not None:
        found.append(request.request_id)
        admit(queue, request)
    return found


def admit(queue, request):
    queue.admit(request)
    request.status = RequestStatus.RUNNING


def preempt(queue, request):
    request.status = RequestStatus.PREEMPTED
    request.num_preemptions += 1
    queue.push(request)


class Arrivals:
    """Makes requests, numbered as the scheduler would."""

    def __init__(self, lab, queue):
        self.lab, self.queue, self.count = lab, queue, 0

    def push(self, name=None, *, prompt=(1,), **options):
        request = self.lab.make_request(name or f"r{self.count}", prompt, **options)
        request.arrival_order = self.count
        self.count += 1
        self.queue.push(request)
        return request


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
@given(data=st.data())
def test_queue_holds_exactly_those_that_wait(lab, name, data):
    """Any order of pushes, admissions, preemptions and departures, from the middle too."""
    queue = make_policy(name, block_manager=BlockManager(num_blocks=8, block_size=2))
    arrivals, waiting, running = Arrivals(lab, queue), {}, {}
    for _ in range(data.draw(st.integers(1, 60))):
        move = data.draw(st.sampled_from(["push", "push", "admit", "preempt", "remove", "leave", "charge"]))
        if move == "push":
            request = arrivals.push(tenant=data.draw(st.sampled_from("abc")), arrival_time=float(arrivals.count))
            waiting[request.request_id] = request
        elif move == "admit" and waiting:
            request = queue.peek()
            running[request.request_id] = waiting.pop(request.request_id)
            admit(queue, request)
        elif move == "remove" and waiting:
            queue.remove(waiting.pop(data.draw(st.sampled_from(sorted(waiting)))))
        elif running and move in ("preempt", "leave", "charge"):
            name_of_one = data.draw(st.sampled_from(sorted(running)))
            if move == "charge":
                queue.charge(running[name_of_one], 1)
            elif move == "leave":
                queue.remove(running.pop(name_of_one))
            else:
                preempt(queue, running[name_of_one])
                waiting[name_of_one] = running.pop(name_of_one)
        assert len(queue) == len(waiting)
        assert (queue.peek() is None) == (not waiting)
        assert queue.peek() is queue.peek()
        assert not waiting or queue.peek().request_id in waiting
    assert sorted(drain(queue)) == sorted(waiting)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "priority"])
def test_priority_is_refused_where_it_has_no_effect(lab, name):
    queue = make_policy(name, block_manager=BlockManager(num_blocks=8, block_size=2))
    with pytest.raises(InvalidRequestError, match="--scheduling-policy priority") as caught:
        queue.push(lab.make_request("a", [1], priority=3))
    assert caught.value.param == "priority"
    assert len(queue) == 0


# -- first come, first served ------------------------------------------------------------------------------------------


def test_first_come_first_served_and_preempted_ones_come_first_in_their_order(lab):
    queue = FCFSQueue()
    arrivals = Arrivals(lab, queue)
    first = [arrivals.push() for _ in range(3)]
    for request in first:
        admit(queue, request)
    later = [arrivals.push() for _ in range(2)]
    for request in (first[1], first[2], first[0]):
        preempt(queue, request)
    assert drain(queue) == [request.request_id for request in first + later]


def test_a_long_queue_of_aborted_requests_is_not_kept(lab):
    queue = FCFSQueue()
    arrivals = Arrivals(lab, queue)
    arrivals.push()
    for _ in range(1000):
        queue.remove(arrivals.push())
    assert len(queue._heap) < 50
    assert drain(queue) == ["r0"]


def test_an_id_that_is_used_again_is_another_request(lab):
    queue = FCFSQueue()
    arrivals = Arrivals(lab, queue)
    queue.remove(arrivals.push("again"))
    arrivals.push("b")
    arrivals.push("again")
    assert drain(queue) == ["b", "again"]


# -- priority ----------------------------------------------------------------------------------------------------------


@given(
    requests=st.lists(st.tuples(st.integers(MIN_PRIORITY, MAX_PRIORITY), st.integers(0, 3000)), max_size=30),
    aging=st.sampled_from([0.5, 1.0, 10.0]),
    now=st.integers(3000, 10_000),
)
def test_order_is_by_priority_less_age(lab, requests, aging, now):
    queue = PriorityQueue(aging_seconds=aging)
    arrivals = Arrivals(lab, queue)
    requests.sort(key=lambda request: request[1])
    for priority, arrived in requests:
        arrivals.push(priority=priority, arrival_time=float(arrived))
    # Sorting is stable: of two that are equally important, the one that came first.
    expected = sorted(range(len(requests)), key=lambda i: requests[i][0] - (now - requests[i][1]) / aging)
    assert drain(queue) == [f"r{index}" for index in expected]


def test_preempted_request_keeps_its_place_among_priorities(lab):
    queue = PriorityQueue(aging_seconds=10)
    arrivals = Arrivals(lab, queue)
    low = arrivals.push("low", priority=5, arrival_time=0.0)
    admit(queue, low)
    arrivals.push("lower", priority=6, arrival_time=1.0)
    arrivals.push("urgent", priority=0, arrival_time=2.0)
    preempt(queue, low)
    assert drain(queue) == ["urgent", "low", "lower"]


@pytest.mark.parametrize("priority", [MIN_PRIORITY - 1, MAX_PRIORITY + 1, 2**62])
def test_priority_out_of_range_is_refused(lab, priority):
    with pytest.raises(InvalidRequestError, match=r"does not exist: the most important is -100") as caught:
        PriorityQueue().push(lab.make_request("a", [1], priority=priority))
    assert caught.value.param == "priority"


@pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan])
def test_aging_must_be_positive(seconds):
    with pytest.raises(ConfigError, match="aging_seconds"):
        PriorityQueue(aging_seconds=seconds)


# -- fair --------------------------------------------------------------------------------------------------------------


def test_tenant_that_was_served_least_comes_first(lab):
    queue = FairQueue()
    arrivals = Arrivals(lab, queue)
    for tenant in "aaabb":
        arrivals.push(prompt=[1] * 10, tenant=tenant)
    # a and b take turns, for every admission is charged; then only a is left.
    assert drain(queue) == ["r0", "r3", "r1", "r4", "r2"]
    assert queue.counters == {"a": 30, "b": 20}


def test_generated_tokens_count_twice_and_weights_divide(lab):
    queue = FairQueue({"a": 1, "b": 4})
    arrivals = Arrivals(lab, queue)
    for request in [arrivals.push(prompt=[1] * 10, tenant=tenant) for tenant in "ab"]:
        admit(queue, request)
        queue.charge(request, 5)
    assert queue.counters == {"a": 10 + 2 * 5, "b": (10 + 2 * 5) / 4}


def test_cached_prompt_tokens_and_preemption_cost_nothing(lab):
    queue = FairQueue()
    request = Arrivals(lab, queue).push(prompt=[1] * 10, tenant="a")
    request.num_computed_tokens = 8
    admit(queue, request)
    assert queue.counters == {"a": 2}
    preempt(queue, request)
    request.num_computed_tokens = 0
    admit(queue, request)
    assert queue.counters == {"a": 2}


def test_a_returning_tenant_has_saved_nothing_up(lab):
    queue = FairQueue(burst=0)
    arrivals = Arrivals(lab, queue)
    for _ in range(100):
        arrivals.push(prompt=[1] * 10, tenant="busy")
    for _ in range(50):
        admit(queue, queue.peek())
    for number in range(5):
        arrivals.push(f"late {number}", prompt=[1] * 10, tenant="late")
    assert queue.counters == {"busy": 500, "late": 500}
    order = drain(queue)[:10]
    assert [index for index, name in enumerate(order) if name.startswith("late")] == [1, 3, 5, 7, 9]


def test_a_returning_tenant_may_have_a_burst(lab):
    queue = FairQueue(burst=25)
    arrivals = Arrivals(lab, queue)
    for _ in range(20):
        arrivals.push(prompt=[1] * 10, tenant="busy")
    for _ in range(10):
        admit(queue, queue.peek())
    for number in range(5):
        arrivals.push(f"late {number}", prompt=[1] * 10, tenant="late")
    assert queue.counters == {"busy": 100, "late": 75}
    order = [name[:4] for name in drain(queue)]
    assert order[:4] == ["late", "late", "late", "r10"]  # three within the burst, then they take turns


@given(loads=st.tuples(st.integers(0, 9), st.integers(0, 9)), weights=st.tuples(st.sampled_from([1, 2]), st.just(1)))
def test_a_seat_changes_hands_only_towards_equal_shares_and_never_back(lab, loads, weights):
    queue = FairQueue(dict(zip("ab", weights, strict=True)))
    arrivals = Arrivals(lab, queue)
    running = {name: [arrivals.push(tenant=name) for _ in range(load)] for name, load in zip("ab", loads, strict=True)}
    for request in [*running["a"], *running["b"]]:
        admit(queue, request)
    newcomer = arrivals.push(tenant="a")
    if not running["b"]:
        return
    loads_after = [(loads[0] + 1) / weights[0], (loads[1] - 1) / weights[1]]
    displaced = queue.may_displace(newcomer, running["b"][-1])
    assert displaced == (loads_after[0] <= loads_after[1])
    if displaced:
        admit(queue, newcomer)
        preempt(queue, running["b"][-1])
        assert not queue.may_displace(running["b"][-1], newcomer)


def test_within_a_tenant_preempted_requests_come_first_in_order_of_arrival(lab):
    queue = FairQueue()
    arrivals = Arrivals(lab, queue)
    first = [arrivals.push(tenant="a") for _ in range(3)]
    for request in first:
        admit(queue, request)
    assert [request.rank for request in first] == [0, 1, 2]
    arrivals.push(tenant="a")
    for request in (first[2], first[1]):
        preempt(queue, request)
    assert drain(queue) == ["r1", "r2", "r3"]
    assert [request.rank for request in first] == [0, 1, 2]


def test_unknown_tenant_is_refused_once_tenants_are_listed(lab):
    queue = FairQueue({"a": 2})
    queue.push(lab.make_request("x", [1], tenant="default"))
    with pytest.raises(InvalidRequestError, match=r"tenant 'b' does not exist; known are a, default") as caught:
        queue.push(lab.make_request("y", [1], tenant="b"))
    assert caught.value.param == "tenant"
    FairQueue().push(lab.make_request("y", [1], tenant="b"))


@pytest.mark.parametrize("weight", [0, -1, math.inf, math.nan])
def test_weights_must_be_positive(weight):
    with pytest.raises(ConfigError, match="'a'"):
        FairQueue({"a": weight})


def test_tenants_that_left_without_debts_are_forgotten(lab):
    queue = FairQueue()
    arrivals = Arrivals(lab, queue)
    for number in range(5000):
        request = arrivals.push(prompt=[1] * 3, tenant=f"t{number}")
        admit(queue, request)
        queue.remove(request)
    assert len(queue.counters) < 2000


# -- longest prefix first ----------------------------------------------------------------------------------------------


def test_longest_cached_prefix_comes_first_and_equals_in_order_of_arrival(lab):
    cached = {"r0": 0, "r1": 4, "r2": 8, "r3": 8, "r4": 0}
    queue = PrefixQueue(lambda request: cached[request.request_id])
    arrivals = Arrivals(lab, queue)
    for _ in cached:
        arrivals.push()
    assert drain(queue) == ["r2", "r3", "r1", "r0", "r4"]


def test_it_looks_at_no_more_than_it_may_and_once_per_admission(lab):
    asked = []
    queue = PrefixQueue(lambda request: asked.append(request.request_id) or 0, look_ahead=4)
    arrivals = Arrivals(lab, queue)
    for _ in range(100):
        arrivals.push()
    for _ in range(10):
        queue.peek()
    assert asked == ["r0", "r1", "r2", "r3"]


def test_preempted_request_goes_before_cached_ones(lab):
    queue = PrefixQueue(lambda request: request.arrival_order)
    arrivals = Arrivals(lab, queue)
    first = arrivals.push()
    admit(queue, first)
    arrivals.push()
    assert queue.peek().request_id == "r1"
    preempt(queue, first)
    assert drain(queue) == ["r0", "r1"]


@given(seed=st.integers(0, 2**32), look_ahead=st.integers(1, 8), max_overtakes=st.integers(0, 8))
def test_nobody_is_overtaken_for_ever_by_cached_prompts(lab, seed, look_ahead, max_overtakes):
    """However much newcomers find in the cache: with n before it, after (n + 1) * (max_overtakes + 1) admissions."""
    rng = random.Random(seed)
    queue = PrefixQueue(
        lambda request: request.arrival_order if request.request_id != "victim" else -1,
        look_ahead=look_ahead,
        max_overtakes=max_overtakes,
    )
    arrivals = Arrivals(lab, queue)
    num_before = rng.randint(0, 10)
    for _ in range(num_before):
        arrivals.push()
    arrivals.push("victim")
    for _ in range((num_before + 1) * (max_overtakes + 1)):
        for _ in range(rng.randint(0, 3)):
            arrivals.push()
        request = queue.peek()
        admit(queue, request)
        if request.request_id == "victim":
            return
    raise AssertionError("it is still waiting")


def test_pages_count_as_cached_as_open_would_find_them(lab):
    pages = BlockManager(num_blocks=16, block_size=4)
    tokens = list(range(13))
    pages.open("a", tokens)
    pages.reserve("a", start=0, end=13)
    pages.publish("a", tokens, 13)
    for num_tokens in range(1, 14):
        before = pages.num_free_blocks
        for salt in ("", "other"):
            counted = pages.count_cached_tokens(tokens[:num_tokens], salt=salt)
            assert counted == pages.open("b", tokens[:num_tokens], salt=salt)
            pages.free("b")
        assert pages.num_free_blocks == before
    assert pages.count_cached_tokens([*tokens[:7], 99, *tokens[8:]]) == 4


def test_weights_come_with_requests_and_may_change(lab):
    queue = FairQueue(burst=0)
    arrivals = Arrivals(lab, queue)

    def admitted(count):
        names = []
        for _ in range(count):
            request = queue.peek()
            queue.admit(request)
            names.append(request.tenant)
        return "".join(names)

    for tenant, weight in (("a", 1.0), ("b", 3.0)):
        for _ in range(12):
            arrivals.push(prompt=[1] * 10, tenant=tenant, tenant_weight=weight)
    assert admitted(8).count("b") == 6
    arrivals.push(prompt=[1] * 10, tenant="b", tenant_weight=1.0)
    assert admitted(8).count("b") == 4


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_that_is_none_is_refused(lab, weight):
    queue = FairQueue()
    with pytest.raises(InvalidRequestError, match="must be a positive number"):
        queue.push(lab.make_request("x", [1], tenant="a", tenant_weight=weight))
    assert len(queue) == 0
    assert not queue.counters


def test_a_list_of_tenants_says_their_weights(lab):
    queue = FairQueue({"a": 2.0})
    queue.push(lab.make_request("x", [1] * 10, tenant="a", tenant_weight=7.0))
    queue.admit(queue.peek())
    assert queue.counters == {"a": 5.0}
