"""What a trace records and what it adds up to: on made-up spans, and on groups of threads and processes."""

from __future__ import annotations

import ctypes
import json
import random
import socket
import threading
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from aios_model.native import native_status
from aios_parallel.control.connection import Connection
from aios_parallel.control.driver import RankGroup
from aios_parallel.control.messages import command_reader, event_reader
from aios_parallel.control.rank_loop import serve_rank
from aios_parallel.errors import ParallelError
from aios_parallel.executor import GroupExecutor
from aios_parallel.mesh import Mesh
from aios_parallel.native.structures import parallel_library
from aios_parallel.shared_memory import SharedMemoryCommunicator
from aios_parallel.thread_group import ThreadGroup, run_threads
from aios_parallel.torch_group import TorchCommunicator
from aios_parallel.tracing.accounts import Window, accounts, overhead, phase_windows, waiting_times
from aios_parallel.tracing.chrome_trace import chrome_trace
from aios_parallel.tracing.clock import now
from aios_parallel.tracing.group_trace import ClockOffset, Exchange, GroupTrace, RankTrace, StepSpan
from aios_parallel.tracing.group_tracer import GroupTracer, estimate_offset
from aios_parallel.tracing.plot import trace_plot
from aios_parallel.tracing.rank_tracer import TRACE_CALLS, RankTracer
from aios_parallel.tracing.span_ring import ExchangeKind, Span, SpanRing, label_of, read_label, unpack_spans
from aios_parallel.tracing.step_log import StepRecord
from aios_sched.output import ScheduledRequest, SchedulerOutput, StepResult

KINDS = ("all_reduce", "all_gather", "gather", "gather", "broadcast", "send", "receive", "barrier")


# -- rings -------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 7), st.integers(0, 30))
def test_a_ring_keeps_the_last_spans_in_their_order(capacity: int, count: int) -> None:
    ring = SpanRing(capacity)
    spans = [Span(i, i + 1, -i, 2**40 + i) for i in range(count)]
    for span in spans:
        ring.record(*span)
    assert list(unpack_spans(ring.packed())) == spans[-capacity:]
    assert (ring.num_recorded, ring.num_dropped) == (count, max(0, count - capacity))


def test_a_ring_holds_something() -> None:
    with pytest.raises(ValueError, match="give 1 or more"):
        SpanRing(0)


@pytest.mark.parametrize("kind", ExchangeKind)
def test_labels_are_read_as_they_were_written(kind: ExchangeKind) -> None:
    written = label_of(kind, 64 if kind is ExchangeKind.GATHER else 63)
    assert read_label(written) == (kind, 63)


# -- communicators -----------------------------------------------------------------------------------------------------


def shared_memory(path, timeout=20.0):
    if not native_status(parallel_library).available:
        pytest.skip(native_status(parallel_library).reason)
    return run_threads(
        [lambda rank=rank: SharedMemoryCommunicator.open(path, rank=rank, size=2, timeout=timeout) for rank in range(2)]
    )


def gloo():
    store = HashStore()
    return run_threads(
        [lambda rank=rank: TorchCommunicator.create(store, rank=rank, size=2, timeout=20) for rank in range(2)]
    )


@pytest.fixture(params=["threads", "shared memory", "gloo"])
def pair(request, tmp_path):
    if request.param == "threads":
        groups = ThreadGroup(2, timeout=20).communicators()
    elif request.param == "gloo":
        groups = gloo()
    else:
        groups = shared_memory(tmp_path / "group")
    yield groups
    for group in groups:
        group.close()


def make_all_calls(group, x):
    group.all_reduce(x)
    group.all_gather(x)
    group.gather(x, to=0)
    group.gather(x, to=1)
    group.broadcast(x, source=1)
    if group.rank == 0:
        group.send(x, to=1)
        group.receive(x, source=1)
    else:
        group.receive(x, source=0)
        group.send(x, to=0)
    group.barrier()


def test_every_call_of_a_communicator_is_recorded_with_its_bytes(pair) -> None:
    sizes = [random.randrange(1, 5000) for _ in range(3)]
    rings = [SpanRing(100) for _ in pair]

    def work(group):
        make_all_calls(group, torch.ones(3))  # not yet
        group.trace(rings[group.rank])
        before = now()
        for size in sizes:
            make_all_calls(group, torch.ones(size))
        after = now()
        group.trace(None)
        make_all_calls(group, torch.ones(3))  # no longer
        return before, after

    times = run_threads([lambda group=group: work(group) for group in pair])
    for rank, (ring, (before, after)) in enumerate(zip(rings, times, strict=True)):
        spans = list(unpack_spans(ring.packed()))
        order = KINDS if rank == 0 else (*KINDS[:5], "receive", "send", "barrier")
        assert [read_label(span.label)[0].name.lower() for span in spans] == [*order] * len(sizes)
        peers = [read_label(span.label)[1] for span in spans[:7]]
        assert peers == [0, 0, 0, 1, 1, 1 - rank, 1 - rank]
        assert [span.amount for span in spans] == [bytes_ for size in sizes for bytes_ in [4 * size] * 7 + [0]]
        moments = [time for span in spans for time in (span.begin, span.end)]
        assert [before, *moments, after] == sorted([before, *moments, after])


def test_sums_that_native_code_asks_for_are_recorded_too(tmp_path) -> None:
    groups = shared_memory(tmp_path / "group")
    rings = [SpanRing(4) for _ in groups]

    def work(group):
        group.trace(rings[group.rank])
        native = group.native_reduce
        reduce = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(native.function)
        x = torch.ones(50)
        for _ in range(6):
            reduce(native.context, x.data_ptr(), 50)
        group.trace(None)
        return x

    sums = run_threads([lambda group=group: work(group) for group in groups])
    assert all((x == 64).all() for x in sums)
    for ring, group in zip(rings, groups, strict=True):
        assert (ring.num_recorded, ring.num_dropped) == (6, 2)
        assert {(span.label, span.amount) for span in unpack_spans(ring.packed())} == {
            (label_of(ExchangeKind.ALL_REDUCE), 200)
        }
        group.close()


def test_tracing_does_not_change_sums_or_counts(pair) -> None:
    x = torch.randn(2, 999)

    def work(group, traced):
        group.trace(SpanRing(2) if traced else None)
        before = group.traffic.calls, group.traffic.num_bytes
        total = group.all_reduce(x[group.rank].clone())
        after = group.traffic.calls, group.traffic.num_bytes
        return total, [b - a for a, b in zip(before, after, strict=True)]

    plain, traced = (run_threads([lambda g=g, on=on: work(g, on) for g in pair]) for on in (False, True))
    assert [counts for _, counts in traced] == [counts for _, counts in plain] == [[1, 3996]] * 2
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(plain, traced, strict=True))


# -- accounts ----------------------------------------------------------------------------------------------------------


def reduction(begin, end, num_bytes=8):
    return Exchange(begin, end, ExchangeKind.ALL_REDUCE, 0, num_bytes, "tensor")


def rank_trace(rank, steps, exchanges, **fields):
    return RankTrace(rank=rank, steps=tuple(StepSpan(*step) for step in steps), exchanges=tuple(exchanges), **fields)


def record(step_id, submitted, sent, returned, tokens=1, requests=1):
    return StepRecord(
        step_id=step_id, num_tokens=tokens, num_requests=requests, submitted=submitted, sent=sent, returned=returned
    )


def two_ranks() -> GroupTrace:
    """Two steps of two ranks: the second one comes late to both sums of the first step."""
    return GroupTrace(
        mesh=Mesh(tensor=2),
        ranks=(
            rank_trace(0, [(10, 50, 0, 6), (60, 90, 1, 2)], [reduction(20, 31), reduction(40, 48), reduction(70, 75)]),
            rank_trace(1, [(12, 49, 0, 6), (62, 91, 1, 2)], [reduction(30, 31), reduction(46, 48), reduction(68, 75)]),
        ),
        steps=(record(0, 5, 7, 52, tokens=6, requests=2), record(1, 55, 57, 93, tokens=2, requests=2)),
    )


def test_time_is_shared_out_and_waiting_told_from_exchanging() -> None:
    first, second = accounts(two_ranks(), Window(5, 93))
    assert (first.compute, first.communication, first.waiting, first.idle) == (46, 24, 16, 18)
    assert (second.compute, second.communication, second.waiting, second.idle) == (56, 10, 2, 22)
    assert (first.num_steps, first.num_exchanges, first.num_bytes) == (2, 3, 24)


def test_a_window_takes_its_part_of_what_reaches_over_its_ends() -> None:
    first, _ = accounts(two_ranks(), Window(25, 65))
    assert (first.compute, first.communication, first.waiting, first.idle) == (16, 14, 11, 10)
    assert (first.num_steps, first.num_exchanges) == (1, 1)


@given(st.data())
def test_compute_communication_and_idle_are_all_there_is(data) -> None:
    draw = random.Random(data.draw(st.integers(0, 10**9)))
    ranks = []
    for rank in range(2):
        time, steps, exchanges = 0, [], []
        for step_id in range(4):
            time += draw.randrange(5)
            begin = time
            for _ in range(draw.randrange(4)):
                time += draw.randrange(5)
                exchanges.append(reduction(time, time + draw.randrange(6)))
                time = exchanges[-1].end
            time += draw.randrange(5)
            steps.append((begin, time, step_id, 1))
        ranks.append(rank_trace(rank, steps, exchanges))
    trace = GroupTrace(mesh=Mesh(tensor=2), ranks=tuple(ranks), steps=())
    begin = draw.randrange(40)
    window = Window(begin, begin + draw.randrange(1, 60))
    for row in accounts(trace, window):
        assert row.compute + row.communication + row.idle == row.wall == window.end - window.begin
        assert min(row.compute, row.idle) >= 0
        assert 0 <= row.waiting <= row.communication


def test_a_receiver_waits_for_its_sender_and_a_sender_for_nobody() -> None:
    trace = GroupTrace(
        mesh=Mesh(pipeline=2),
        ranks=(
            rank_trace(0, [(0, 22, 0, 1)], [Exchange(20, 22, ExchangeKind.SEND, 1, 8, "pipeline")]),
            rank_trace(1, [(2, 40, 0, 1)], [Exchange(3, 23, ExchangeKind.RECEIVE, 0, 8, "pipeline")]),
        ),
        steps=(),
    )
    assert waiting_times(trace) == [[0], [17]]


def test_phases_end_with_the_last_step_that_has_prompt_tokens() -> None:
    steps = [
        record(0, 1, 2, 10, tokens=9),
        record(1, 11, 12, 20),
        record(2, 21, 22, 30, tokens=2),
        record(3, 31, 32, 40),
    ]
    assert phase_windows(steps) == {"prefill": Window(1, 30), "decode": Window(30, 40)}
    assert phase_windows(steps[3:]) == {"decode": Window(31, 40)}
    assert phase_windows(steps[:1]) == {"prefill": Window(1, 10)}
    assert phase_windows([]) == {}


def test_overhead_is_what_lies_between_a_result_and_the_next_step() -> None:
    found = overhead(two_ranks(), Window(0, 100))
    assert found is not None
    assert (found.planning, found.sending, found.total, found.num_steps) == (3, 5, 8, 1)
    assert overhead(two_ranks(), Window(56, 100)) is None


def test_what_was_dropped_is_said_and_not_added_up() -> None:
    rings = {"steps": SpanRing(2), "tensor": SpanRing(10)}
    for start in (100, 200, 300):
        rings["steps"].record(start, start + 50, start, 1)
        rings["tensor"].record(start + 10, start + 20, label_of(ExchangeKind.ALL_REDUCE), 8)
    recorded = {name: {"spans": ring.packed(), "num_dropped": ring.num_dropped} for name, ring in rings.items()}
    rank = RankTrace.of(0, recorded, ClockOffset(nanoseconds=1000))
    trace = GroupTrace(mesh=Mesh(), ranks=(rank,), steps=())
    assert (trace.num_dropped, trace.complete_since) == (1, 1200)
    with pytest.raises(ValueError, match="1 spans did not fit"):
        accounts(trace, Window(1100, 1350))
    (row,) = accounts(trace, Window(1200, 1350))
    assert (row.compute, row.communication, row.idle) == (80, 20, 50)


def test_the_offset_of_a_clock_is_that_of_the_quickest_answer() -> None:
    assert estimate_offset([(0, 100, 5000), (200, 210, 5105), (300, 400, 5399)]) == ClockOffset(
        nanoseconds=-4900, uncertainty=5
    )


# -- what is written ---------------------------------------------------------------------------------------------------


def test_chromes_json_has_a_process_per_rank_and_times_that_go_on() -> None:
    trace = two_ranks()
    written = json.loads(json.dumps(chrome_trace(trace, phases=phase_windows(trace.steps), about={"model": "m"})))
    events = written["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {0: "driver", 1: "rank 0 (stage 0, tensor rank 0)", 2: "rank 1 (stage 0, tensor rank 1)"}
    spans = [event for event in events if event["ph"] == "X"]
    assert [span["ts"] for span in spans] == sorted(span["ts"] for span in spans)
    assert spans[0]["ts"] == 0
    assert all(span["dur"] >= 0 for span in spans)
    tracks = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert {(span["pid"], span["tid"]) for span in spans} == tracks
    for track in tracks:  # on one track nothing may overlap
        own = [span for span in spans if (span["pid"], span["tid"]) == track]
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-9 for a, b in pairwise(own)), track
    assert [span["args"]["bytes"] for span in spans if span["cat"] == "exchange"] == [8] * 6
    assert written["otherData"]["model"] == "m"


def test_the_plot_is_xml_with_a_bar_for_each_rank_and_phase() -> None:
    trace = two_ranks()
    text = trace_plot(trace, phase_windows(trace.steps), title='a & "b" <c>')
    root = ET.fromstring(text)
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == 'a & "b" <c>'
    assert texts.count("rank 0") == texts.count("rank 1") == 4
    assert "prefers-color-scheme:dark" in text


# -- driver and ranks --------------------------------------------------------------------------------------------------


class TracedRank:
    """Sums over a group of threads in every step."""

    progress = num_exchanges = 0

    def __init__(self, group) -> None:
        self.tracer = RankTracer()
        self.tracer.watch(tensor=group)
        self._group = group

    def call(self, name, arguments, report):
        assert name in TRACE_CALLS
        return self.tracer.answer(name, arguments)

    def execute(self, output):
        self._group.all_reduce(torch.ones(output.step_id + 1))
        return StepResult(sampled={}) if self._group.rank == 0 else None


@pytest.fixture
def traced():
    mesh, ends = Mesh(tensor=2), [socket.socketpair() for _ in range(2)]
    ranks = [TracedRank(group) for group in ThreadGroup(2, timeout=20).communicators()]
    threads = [
        threading.Thread(target=serve_rank, args=(Connection(theirs, command_reader()), rank), daemon=True)
        for (_, theirs), rank in zip(ends, ranks, strict=True)
    ]
    for thread in threads:
        thread.start()
    group = RankGroup([Connection(ours, event_reader()) for ours, _ in ends])
    executor = GroupExecutor(group, mesh=mesh, vocab_size=9)
    yield executor, GroupTracer(group, executor, mesh=mesh), ranks
    executor.shutdown()
    for thread in threads:
        thread.join(5)
    for pair in ends:
        for end in pair:
            end.close()


def step(step_id: int, tokens: int) -> SchedulerOutput:
    row = ScheduledRequest(request_id="r", token_ids=[1] * tokens, start=0, block_table=[], sampling=None)
    return SchedulerOutput(
        step_id=step_id, requests=(row,), block_copies=(), num_scheduled_tokens=tokens, finished_request_ids=()
    )


def test_a_driver_switches_tracing_on_and_collects_what_happened(traced) -> None:
    executor, tracer, ranks = traced
    executor.submit(step(0, 4)).result()
    tracer.start()
    handles = [executor.submit(step(number, 7 - number)) for number in (1, 2)]  # both on their way
    trace = tracer.stop()
    assert [handle.result() for handle in handles] == [StepResult(sampled={})] * 2
    executor.submit(step(3, 1)).result()
    assert [(record.step_id, record.num_tokens) for record in trace.steps] == [(1, 6), (2, 5)]
    for rank in trace.ranks:
        assert [(span.step_id, span.num_tokens) for span in rank.steps] == [(1, 6), (2, 5)]
        assert [each.num_bytes for each in rank.exchanges] == [8, 12]
        for span, each, record in zip(rank.steps, rank.exchanges, trace.steps, strict=True):
            assert record.submitted <= span.begin <= each.begin <= each.end <= span.end
            assert record.submitted <= record.sent <= record.returned
    assert trace.num_dropped == 0
    assert all(rank.tracer._steps is None and not rank.tracer._exchanges for rank in ranks)
    window = Window(trace.begin, trace.end)
    assert all(row.compute + row.communication + row.idle == row.wall for row in accounts(trace, window))


def test_a_trace_that_is_too_small_keeps_the_end_and_says_so(traced) -> None:
    executor, tracer, _ = traced
    tracer.start(capacity=2)
    for number in range(5):
        executor.submit(step(number, 1)).result()
    trace = tracer.stop()
    assert [record.step_id for record in trace.steps] == [3, 4]
    assert trace.num_dropped == 3 + 2 * (3 + 3)
    with pytest.raises(ValueError, match="larger capacity"):
        accounts(trace, Window(trace.complete_since - 1, trace.end))


def test_a_rank_of_another_host_is_brought_onto_the_drivers_clock(traced) -> None:
    executor, tracer, ranks = traced
    ahead, own = 7_000_000_000, ranks[1].tracer

    def elsewhere(name, arguments):
        return {"now": now() + ahead, "host": "another"} if name == "clock" else own.answer(name, arguments)

    ranks[1].call = lambda name, arguments, report: elsewhere(name, arguments)
    tracer.start()
    executor.submit(step(0, 1)).result()
    trace = tracer.stop()
    assert trace.ranks[0].clock == ClockOffset()
    clock = trace.ranks[1].clock
    assert 0 < clock.uncertainty < 1e9
    assert abs(clock.nanoseconds + ahead) <= clock.uncertainty
    difference = trace.ranks[1].steps[0].begin - trace.ranks[0].steps[0].begin
    assert abs(difference + ahead) < 1e9  # this rank's spans were made by our own clock: they must have been moved


def test_two_traces_do_not_overlap(traced) -> None:
    _, tracer, _ = traced
    with pytest.raises(ParallelError, match="no trace was started"):
        tracer.stop()
    with pytest.raises(ValueError, match="capacity=0"):
        tracer.start(capacity=0)
    tracer.start()
    with pytest.raises(ParallelError, match="stop that trace first"):
        tracer.start()
    assert tracer.stop().steps == ()
