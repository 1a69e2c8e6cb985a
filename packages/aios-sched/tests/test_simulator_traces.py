"""Traces: repeatable, in order, of the lengths and rates that were asked for, and clear about mistakes."""

from __future__ import annotations

import math
import tracemalloc
from itertools import islice, pairwise
from random import Random
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios_model.errors import ConfigError
from aios_sched.simulator.arrivals import IndependentRequests, bursts, poisson
from aios_sched.simulator.chat import ChatSessions
from aios_sched.simulator.csv_trace import CSVTrace, TraceFileError
from aios_sched.simulator.lengths import SHAREGPT_OUTPUTS, SHAREGPT_PROMPTS, LogNormalLengths
from aios_sched.simulator.trace_options import TraceOptions, make_trace

HEADER = "arrival_s,prompt_tokens,output_tokens"


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rate=st.floats(0.01, 1e4),
    burst=st.booleans(),
    max_model_len=st.integers(2, 5000),
    prefix=st.integers(0, 100),
)
def test_arrivals_are_repeatable_in_order_and_fit_the_context(seed, rate, burst, max_model_len, prefix):
    trace = IndependentRequests(
        times=bursts(rate) if burst else poisson(rate),
        num_requests=50,
        seed=seed,
        max_model_len=max_model_len,
        num_prefix_tokens=min(prefix, max_model_len - 2),
    )
    requests = list(trace.arrivals())
    assert requests == list(trace.arrivals())
    assert len(requests) == 50
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(requests))
    for request in requests:
        assert request.num_output_tokens >= 1
        assert request.num_prompt_tokens > request.num_prefix_tokens
        assert request.num_prompt_tokens + request.num_output_tokens <= max_model_len
        assert len(request.prompt_token_ids()) == request.num_prompt_tokens


@pytest.mark.parametrize("times", [poisson(5.0), bursts(5.0, on_seconds=2.0)])
def test_the_mean_rate_is_the_one_that_was_asked_for(times):
    count = 40_000
    last = next(islice(times(Random(3)), count - 1, None))
    assert count / last == pytest.approx(5.0, rel=0.1)


def test_bursts_come_and_go():
    arrivals = list(islice(bursts(10.0, factor=10.0, on_seconds=5.0)(Random(1)), 20_000))
    seconds = [0] * (int(arrivals[-1]) + 1)
    for arrival in arrivals:
        seconds[int(arrival)] += 1
    assert seconds.count(0) / len(seconds) > 0.7


def test_lengths_have_the_mean_of_sharegpt():
    random = Random(5)
    assert mean(SHAREGPT_PROMPTS.draw(random) for _ in range(30_000)) == pytest.approx(161.31, rel=0.1)
    assert mean(SHAREGPT_OUTPUTS.draw(random) for _ in range(30_000)) == pytest.approx(337.99, rel=0.1)
    assert {LogNormalLengths(mean=7, sigma=0).draw(random) for _ in range(10)} == {7}


def test_a_million_requests_need_no_room():
    requests = IndependentRequests(times=poisson(10), num_requests=10**6).arrivals()
    next(requests)
    tracemalloc.start()
    for _ in islice(requests, 20_000):
        pass
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_a_turn_begins_with_everything_that_was_said():
    chat = ChatSessions(times=poisson(1.0), num_requests=200, seed=4, mean_turns=6.0)
    first = list(chat.arrivals())
    num_turns = len(first)
    for request in first:
        while (following := chat.follow_up(request, finished_s=100.0)) is not None:
            num_turns += 1
            assert following == chat.follow_up(request, finished_s=100.0)
            assert following.arrival_s >= 100.0
            assert following.turn == request.turn + 1
            said = request.prompt_token_ids() + [0] * request.num_output_tokens
            assert following.prompt_token_ids()[: len(said)] == said
            assert following.num_prompt_tokens > len(said)
            assert following.num_prompt_tokens + following.num_output_tokens <= chat.max_model_len
            request = following
    assert 100 < num_turns < 400


def test_prompts_share_what_they_should_and_nothing_else():
    chat = ChatSessions(times=poisson(1.0), num_requests=300, num_system_tokens=50)
    requests = list(islice(chat.arrivals(), 40))
    for a in requests:
        for b in requests:
            shared = next(
                (i for i, (x, y) in enumerate(zip(a.prompt_token_ids(), b.prompt_token_ids(), strict=False)) if x != y),
                None,
            )
            if a is not b:
                assert shared == (50 if a.prefix == b.prefix else 0)


def test_a_csv_is_read_with_its_sessions_and_prefixes(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        HEADER + ",session,tenant,priority,prefix_id,prefix_tokens\n"
        "0,30,4,anna,t1,2,system,20\n0.5,10,1,,,,,\n2,60,5,anna,t1,0,system,20\n"
    )
    first, second, third = CSVTrace(path=path).arrivals()
    assert (first.arrival_s, first.num_prompt_tokens, first.num_output_tokens) == (0.0, 30, 4)
    assert (first.session, first.tenant, first.priority, first.num_prefix_tokens) == ("anna", "t1", 2, 20)
    assert third.prompt_token_ids()[:34] == first.prompt_token_ids() + [0] * 4
    assert second.prompt_token_ids()[0] not in first.prompt_token_ids()
    assert len(list(CSVTrace(path=path, limit=2).arrivals())) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: column 'arrival_s' is missing"),
        ("arrival_s,prompt_tokens\n", "line 1: column 'output_tokens' is missing"),
        (HEADER + ",color\n1,2,3,red\n", "line 1: column 'color' is unknown"),
        (HEADER + "\n", "holds no requests"),
        (HEADER + "\n0,5,5\n1,x,5\n", "line 3: prompt_tokens is 'x'; it must be a whole number of at least 1"),
        (HEADER + "\n0,5,0\n", "line 2: output_tokens is '0'"),
        (HEADER + "\n0,5,2.5\n", "line 2: output_tokens is '2.5'"),
        (HEADER + "\n-1,5,2\n", "line 2: arrival_s is '-1'"),
        (HEADER + "\nnan,5,2\n", "line 2: arrival_s is 'nan'"),
        (HEADER + "\ninf,5,2\n", "line 2: arrival_s is 'inf'"),
        (HEADER + "\n0,99999999999999,2\n", "line 2: prompt_tokens"),
        (HEADER + "\n0,5\n", "line 2: it has more or fewer fields"),
        (HEADER + "\n0,5,5,5\n", "line 2: it has more or fewer fields"),
        (HEADER + "\n1,5,5\n0.5,5,5\n", "line 3: arrival_s 0.5 is before 1 above it"),
        (HEADER + ",prefix_id\n1,5,5,a\n", "line 2: prefix_id and prefix_tokens belong together"),
        (HEADER + ",prefix_id,prefix_tokens\n1,5,5,a,5\n", "line 2: prefix_tokens 5 must be below"),
        (HEADER + '\n0,"5,5\n', "line 2"),
    ],
)
def test_a_mistake_in_a_csv_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(TraceFileError, match=message) as caught:
        list(CSVTrace(path=path).arrivals())
    assert str(path) in str(caught.value)


def test_a_csv_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_bytes(b"\xff\xfe\x00garbage")
    with pytest.raises(TraceFileError, match="cannot be read"):
        CSVTrace(path=path)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("poisson", {"rate": "fast"}),
        ("poisson", {"rate": "0"}),
        ("bursts", {"rate": "inf"}),
        ("bursts", {"burst_factor": 1.0}),
        ("poisson", {"turns": 2.0}),
        ("poisson", {"burst_factor": 2.0}),
        ("chat", {"turns": 0.5}),
        ("chat", {"prefix_tokens": 4095}),
        ("poisson", {"prompt_tokens": math.nan}),
        ("poisson", {"output_spread": -1.0}),
        ("wrong", {}),
    ],
)
def test_options_out_of_range_or_without_effect_are_refused(kind, options):
    with pytest.raises(ConfigError):
        make_trace(kind, TraceOptions(**options))
