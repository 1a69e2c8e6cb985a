"""A trace in Chrome's JSON format, which https://ui.perfetto.dev and chrome://tracing open.

The driver comes first, then a process for each rank, with a track for its steps and one for each group's exchanges.
Format: "Trace Event Format", complete (`X`) and metadata (`M`) events, times in microseconds.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aios_parallel.tracing.accounts import Window
    from aios_parallel.tracing.group_trace import GroupTrace, RankTrace

_DRIVER = 0
_STEPS, _FIRST_GROUP = 1, 2
_PHASES, _PLANNING, _FIRST_LANE = 1, 2, 3


def chrome_trace(
    trace: GroupTrace, *, phases: Mapping[str, Window] | None = None, about: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The trace as one JSON object; times start at 0.

    Args:
        trace: What happened.
        phases: Stretches of time to name on a track of the driver.
        about: Anything to keep with it: machine, model, options.
    """
    events = [*_driver(trace, phases or {})]
    for rank in trace.ranks:
        events += _rank(trace, rank)
    start = min([trace.begin, *(window.begin for window in (phases or {}).values())])
    for event in events:
        if event["ph"] == "X":
            event["ts"] = (event["ts"] - start) / 1e3
            event["dur"] /= 1e3
    metadata = [event for event in events if event["ph"] == "M"]
    timed = sorted((event for event in events if event["ph"] == "X"), key=lambda event: (event["ts"], -event["dur"]))
    other = {"num_dropped": trace.num_dropped, "clocks": [_clock(rank) for rank in trace.ranks], **(about or {})}
    return {"traceEvents": metadata + timed, "displayTimeUnit": "ms", "otherData": other}


def _driver(trace: GroupTrace, phases: Mapping[str, Window]) -> Iterator[dict[str, Any]]:
    lanes = trace.mesh.pipeline
    yield from _process(_DRIVER, "driver")
    if phases:
        yield _thread(_DRIVER, _PHASES, "phases")
    yield _thread(_DRIVER, _PLANNING, "between result and next step")
    for lane in range(lanes):
        yield _thread(_DRIVER, _FIRST_LANE + lane, "steps on their way" if lanes == 1 else f"steps on their way {lane}")
    for name, window in phases.items():
        yield _span(name, "phase", _DRIVER, _PHASES, window.begin, window.end)
    for index, step in enumerate(trace.steps):
        facts = {"step": step.step_id, "tokens": step.num_tokens, "requests": step.num_requests}
        name = "decode step" if step.only_decodes else "prefill step"
        lane = _FIRST_LANE + index % lanes  # steps return in their order: those of a lane do not overlap
        yield _span(name, "driver", _DRIVER, lane, step.submitted, step.returned, **facts)
    yield from _planning(trace)


def _planning(trace: GroupTrace) -> Iterator[dict[str, Any]]:
    """What the driver does between a result, or the message before, and the next message."""
    moments = sorted(
        [(step.returned, "returned", 0) for step in trace.steps]
        + [(step.submitted, "submitted", step.step_id) for step in trace.steps]
        + [(step.sent, "sent", step.step_id) for step in trace.steps]
    )
    for (begin, before, _), (end, after, step_id) in pairwise(moments):
        if after == "submitted":
            yield _span("plan", "driver", _DRIVER, _PLANNING, begin, end, step=step_id)
        elif before == "submitted" and after == "sent":
            yield _span("send", "driver", _DRIVER, _PLANNING, begin, end, step=step_id)


def _rank(trace: GroupTrace, rank: RankTrace) -> Iterator[dict[str, Any]]:
    pid, place = rank.rank + 1, trace.mesh.place(rank.rank)
    groups = sorted({each.group for each in rank.exchanges}, reverse=True)  # tensor first
    yield from _process(pid, f"rank {rank.rank} (stage {place.stage}, tensor rank {place.tensor_rank})")
    yield _thread(pid, _STEPS, "steps")
    for track, group in enumerate(groups, _FIRST_GROUP):
        yield _thread(pid, track, f"exchanges, {group} group")
    for step in rank.steps:
        facts = {"step": step.step_id, "tokens": step.num_tokens}
        yield _span(f"step {step.step_id}", "step", pid, _STEPS, step.begin, step.end, **facts)
    for each in rank.exchanges:
        track = _FIRST_GROUP + groups.index(each.group)
        name = each.kind.name.lower()
        yield _span(name, "exchange", pid, track, each.begin, each.end, bytes=each.num_bytes)


def _process(pid: int, name: str) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}


def _thread(pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}


def _span(name: str, category: str, pid: int, tid: int, begin: int, end: int, **facts: object) -> dict[str, Any]:
    """A complete event, in nanoseconds for now."""
    placed = {"ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid, "ts": begin, "dur": end - begin}
    return {**placed, "args": facts}


def _clock(rank: RankTrace) -> dict[str, int]:
    return {
        "rank": rank.rank,
        "offset_ns": rank.clock.nanoseconds,
        "uncertainty_ns": rank.clock.uncertainty,
        "dropped": rank.num_dropped,
    }
