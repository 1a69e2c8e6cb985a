"""The simulator against what can be worked out by hand, and what it shows."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest

from aios_kvcache.page_events import Taken
from aios_model.errors import AiosError, ConfigError
from aios_sched.simulator.arrivals import IndependentRequests, poisson
from aios_sched.simulator.chat import ChatSessions
from aios_sched.simulator.cost import LinearCost
from aios_sched.simulator.fleet import Fleet
from aios_sched.simulator.lengths import LogNormalLengths
from aios_sched.simulator.plots import results_plot
from aios_sched.simulator.results import Objectives
from aios_sched.simulator.sweep import Sweep, meets, run_sweep
from aios_sched.simulator.system import SystemConfig
from aios_sched.simulator.timeline import Timeline
from aios_sched.simulator.trace import TraceRequest

TENTH = LinearCost(step_s=0.1)


class Listed:
    """A trace that is written down."""

    def __init__(self, *requests):
        self._requests = requests

    def arrivals(self):
        yield from self._requests

    def follow_up(self, request, *, finished_s):
        return None


def request(number, *, at=0.0, prompt=10, output=5, **fields):
    return TraceRequest(arrival_s=at, num_prompt_tokens=prompt, num_output_tokens=output, stream=number, **fields)


def fixed(mean):
    return LogNormalLengths(mean=mean, sigma=0)


def test_times_of_two_requests_are_those_on_paper():
    """Steps of 0.1 s. One arrives at 0, the other during the third step, so it joins the fourth."""
    results = Fleet(SystemConfig(num_blocks=64), TENTH).run(Listed(request(0, output=6), request(1, at=0.25, output=2)))
    assert list(results.arrivals) == pytest.approx([0.25, 0.0])
    assert list(results.times["ttft"]) == pytest.approx([0.15, 0.1])
    assert list(results.times["queue"]) == pytest.approx([0.05, 0.0])
    assert list(results.times["tpot"]) == pytest.approx([0.1, 0.1])
    assert list(results.times["e2e"]) == pytest.approx([0.25, 0.6])
    assert results.seconds == pytest.approx(0.6)
    assert results.meters.num_steps == 6
    assert results.meters.gaps.count == 6


def test_requests_of_one_moment_share_their_first_step():
    results = Fleet(SystemConfig(num_blocks=64), TENTH).run(Listed(*(request(n, at=1.0) for n in range(8))))
    assert list(results.times["ttft"]) == [pytest.approx(0.1)] * 8


def test_a_request_of_one_token_has_no_time_per_token_and_keeps_any_limit_on_it():
    results = Fleet(SystemConfig(num_blocks=64), TENTH).run(Listed(request(0, output=1)))
    assert math.isnan(results.times["tpot"][0])
    assert results.percentile("tpot", 50) is None
    assert results.goodput(Objectives(tpot_s=1e-9))["share"] == 1.0


def test_goodput_counts_refused_requests_as_bad():
    results = Fleet(SystemConfig(num_blocks=64, max_model_len=100), TENTH).run(
        Listed(request(0), request(1), request(2, prompt=200), request(3, at=50.0, output=80))
    )
    assert results.num_refused == 1
    assert "shorten it" in results.refusal
    assert results.goodput(Objectives(e2e_s=1.0)) == {"share": 0.5, "requests_per_s": pytest.approx(2 / 58)}


def test_wasted_slots_are_those_behind_the_last_token():
    """One request alone, 10 + 7 tokens in pages of 16: contexts of 10 to 16 in each of seven steps."""
    summary = Fleet(SystemConfig(num_blocks=4, max_model_len=64), TENTH).run(Listed(request(0, output=7))).summary()
    memory = summary["memory"]
    assert memory["used_share"] == pytest.approx(1 / 4)
    assert memory["wasted_share_of_reserved"] == pytest.approx(1 - 13 / 16)
    assert memory["wasted_share_of_pool"] == pytest.approx(3 / 64)
    assert memory["contiguous_wasted_share_of_reserved"] == pytest.approx(1 - 13 / 64)


@pytest.mark.parametrize(("policy", "calm_waits"), [("fcfs", True), ("fair", False)])
def test_figures_of_tenants_show_who_waits_for_a_flood(policy, calm_waits):
    flood = [request(n, prompt=20, output=20, tenant="flood") for n in range(60)]
    calm = [request(100 + n, at=3.0 + 3 * n, prompt=20, output=20, tenant="calm") for n in range(5)]
    system = SystemConfig(num_blocks=400, max_num_seqs=4, policy=policy)
    tenants = Fleet(system, TENTH).run(Listed(*flood, *calm)).summary()["tenants"]
    assert (tenants["flood"]["finished"], tenants["calm"]["finished"]) == (60, 5)
    assert (tenants["calm"]["latency"]["ttft"]["p50"] > 5.0) == calm_waits


def test_busy_shares_tell_device_and_host_apart():
    cost = LinearCost(step_s=0.1, host_s=0.025)
    steps = Fleet(SystemConfig(num_blocks=64), cost).run(Listed(request(0), request(1, at=1.5))).summary()["steps"]
    assert steps["busy_share"] == pytest.approx(0.5)
    assert steps["device_busy_share"] == pytest.approx(0.375)
    assert steps["host_busy_share"] == pytest.approx(0.125)


def test_turns_of_a_chat_find_their_history_in_the_cache():
    chat = ChatSessions(times=poisson(0.5), num_requests=200, num_system_tokens=320, mean_turns=8)
    system = SystemConfig(num_blocks=20_000, max_model_len=4096)
    warm = Fleet(system, LinearCost(step_s=0.01)).run(chat).summary()["prefix_cache"]
    assert warm["hit_rate"] > 0.7


@pytest.mark.parametrize("routing", ["round-robin", "least-loaded", "session", "prefix-affinity"])
def test_a_thousand_replicas_share_the_work(routing):
    chat = ChatSessions(times=poisson(500.0), num_requests=1500, mean_turns=2.0, mean_think_s=0.5)
    fleet = Fleet(SystemConfig(num_blocks=600, replicas=1000, routing=routing), LinearCost(step_s=0.02))
    results = fleet.run(chat)
    assert results.num_finished >= 1000
    assert sum(replica.meters.num_steps > 0 for replica in fleet.replicas) > 300
    assert all(replica.num_outstanding == 0 for replica in fleet.replicas)


def test_affinity_finds_more_prefixes_than_turns_do():
    chat = ChatSessions(times=poisson(5.0), num_requests=400, mean_turns=6.0, mean_think_s=1.0)
    rates = {}
    for routing in ("round-robin", "prefix-affinity"):
        system = SystemConfig(num_blocks=4000, replicas=8, routing=routing)
        rates[routing] = Fleet(system, LinearCost(step_s=0.02)).run(chat).summary()["prefix_cache"]["hit_rate"]
    assert rates["prefix-affinity"] > rates["round-robin"] + 0.2


def test_a_timeline_is_what_viewers_open(tmp_path):
    path = tmp_path / "timeline.json"
    system = SystemConfig(num_blocks=64, replicas=2, routing="round-robin")
    trace = Listed(*(request(n, at=0.03 * n, output=4) for n in range(6)))
    with Timeline(path) as timeline:
        results = Fleet(system, TENTH, timeline=timeline).run(trace)
    events = json.loads(path.read_text())["traceEvents"]
    steps = [event for event in events if event["ph"] == "X"]
    assert len(steps) == results.meters.num_steps
    assert sum(event["dur"] for event in steps) == pytest.approx(results.meters.busy_time / 1e9)
    for pid in (1, 2):
        own = sorted((event["ts"], event["dur"]) for event in steps if event["pid"] == pid)
        assert all(a + b <= c + 1e-3 for (a, b), (c, _) in pairwise(own))
    begun = [event for event in events if event["ph"] == "b" and event["name"] == "request"]
    ended = [event for event in events if event["ph"] == "e" and event["name"] == "request"]
    assert len(begun) == len(ended) == 6
    assert {event["id"] for event in begun} == {event["id"] for event in ended}
    tokens = sum(event["args"]["prefill tokens"] + event["args"]["decode tokens"] for event in steps)
    assert tokens == results.meters.num_tokens


def test_pages_change_at_the_times_of_their_steps():
    fleet = Fleet(SystemConfig(num_blocks=64, block_size=4), TENTH, leap=False)
    recorder = fleet.record_pages()
    fleet.run(Listed(request(0, prompt=4, output=9)))
    times = [record.time for record in recorder.trace().records if isinstance(record.event, Taken)]
    assert times == pytest.approx([0.0, 0.1, 0.5])
    with pytest.raises(ConfigError, match="leap=False"):
        Fleet(SystemConfig(num_blocks=64), TENTH).record_pages()


def test_a_timeline_ends_when_it_is_full_and_says_so(tmp_path):
    path = tmp_path / "timeline.json"
    with Timeline(path, max_events=10) as timeline:
        Fleet(SystemConfig(num_blocks=64), TENTH, timeline=timeline).run(Listed(request(0, output=40)))
    record = json.loads(path.read_text())
    assert len(record["traceEvents"]) == 10
    assert record["otherData"] == {"events_left_out": timeline.num_left_out}
    assert timeline.num_left_out > 20
    with pytest.raises(AiosError, match="cannot be written"):
        Timeline(tmp_path / "none" / "timeline.json")


@pytest.mark.parametrize("requests", [[request(0)], [request(n, at=n / 3, output=n + 1) for n in range(30)]])
def test_plots_are_well_formed(requests):
    svg = results_plot(Fleet(SystemConfig(num_blocks=64), TENTH).run(Listed(*requests)))
    assert "nan" not in svg
    ET.fromstring(svg)


def test_a_sweep_of_block_sizes_keeps_the_bytes_of_the_pool():
    sweep = Sweep.parse("block-size", "8,16..18,16")
    systems = dict(sweep.systems(SystemConfig(num_blocks=90, block_size=16)))
    assert list(systems) == [8, 16, 17, 18]
    assert systems[8].num_blocks == 180
    assert systems[18].num_blocks == 80


def test_a_sweep_of_replicas_stops_at_the_smallest_fleet_that_is_good_enough():
    trace = IndependentRequests(
        times=poisson(40.0), num_requests=600, prompts=fixed(50), outputs=fixed(20), max_model_len=200
    )
    system = SystemConfig(num_blocks=400, max_num_seqs=8, max_model_len=200)
    objectives = Objectives(ttft_s=0.2)
    rows = run_sweep(
        Sweep.parse("replicas", "1..20"),
        system,
        LinearCost(step_s=0.02),
        trace,
        until=lambda results: meets(results, objectives, share=0.99),
    )
    assert 1 < len(rows) < 20
    good = [results.goodput(objectives)["share"] >= 0.99 for _, results in rows]
    assert good == [False] * (len(rows) - 1) + [True]


@pytest.mark.parametrize(
    ("option", "values"),
    [("color", "1"), ("replicas", ""), ("replicas", "8..1"), ("replicas", "a"), ("block-size", "1..9999999")],
)
def test_sweeps_of_nothing_are_refused(option, values):
    with pytest.raises(ConfigError):
        Sweep.parse(option, values)


@pytest.mark.parametrize(
    "fields",
    [{"replicas": 0}, {"num_blocks": 0}, {"block_size": 0}, {"policy": "x"}, {"routing": "x"}, {"max_num_seqs": 4000}],
)
def test_systems_that_cannot_be_are_refused(fields):
    with pytest.raises(ConfigError):
        SystemConfig(**{"num_blocks": 100, **fields})
