"""What a trace adds up to: for a stretch of time, how long each rank computed, communicated and had nothing to do.

    wall = compute + communication + idle

A rank is idle between steps; within a step it communicates or it computes. Of communication, `waiting` is the part
before the other rank had even come: the price of uneven shares, or of a pipeline that is not full.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from aios_parallel.tracing.span_ring import ExchangeKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aios_parallel.tracing.group_trace import Exchange, GroupTrace
    from aios_parallel.tracing.step_log import StepRecord


class Window(NamedTuple):
    """A stretch of time, in nanoseconds on the driver's clock."""

    begin: int
    end: int

    def overlap(self, begin: int, end: int) -> int:
        """How much of it lies between the two."""
        return max(0, min(self.end, end) - max(self.begin, begin))


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Where one rank's time went; nanoseconds.

    Attributes:
        rank: Its number.
        wall: All of it.
        compute: In steps, but not in exchanges.
        communication: In exchanges.
        waiting: Of communication, before the other ranks had come.
        idle: Between steps.
        num_steps: Steps that began in this time.
        num_exchanges: Exchanges that began in it.
        num_bytes: Bytes of this rank's tensors in those.
    """

    rank: int
    wall: int
    compute: int
    communication: int
    waiting: int
    idle: int
    num_steps: int
    num_exchanges: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """What lies between a result and the next step on the first rank: medians, in nanoseconds.

    Attributes:
        planning: From the result until the next step was submitted.
        sending: From then until the first rank began with it: encoding, sending, waking up.
        total: From the result until the first rank began with the step.
        num_steps: Steps of which it is the median: with a pipeline, those that found the first rank with nothing to do.
    """

    planning: float
    sending: float
    total: float
    num_steps: int


def accounts(trace: GroupTrace, window: Window) -> list[Account]:
    """Where each rank's time went in `window`.

    Raises:
        ValueError: Part of it was dropped from the trace.
    """
    if window.begin < trace.complete_since:
        raise ValueError(
            f"{trace.num_dropped} spans did not fit into the trace, and some of them lay in this time: trace less, or "
            "start with a larger capacity"
        )
    waits = waiting_times(trace)
    return [_account(trace, rank, window, waits[rank]) for rank in range(trace.mesh.size)]


def _account(trace: GroupTrace, rank: int, window: Window, waits: Sequence[int]) -> Account:
    own = trace.ranks[rank]
    busy = sum(window.overlap(step.begin, step.end) for step in own.steps)
    communication = sum(window.overlap(each.begin, each.end) for each in own.exchanges)
    waiting = sum(
        window.overlap(each.begin, each.begin + wait) for each, wait in zip(own.exchanges, waits, strict=True)
    )
    begun = [each for each in own.exchanges if window.begin <= each.begin < window.end]
    return Account(
        rank=rank,
        wall=window.end - window.begin,
        compute=busy - communication,
        communication=communication,
        waiting=waiting,
        idle=window.end - window.begin - busy,
        num_steps=sum(window.begin <= step.begin < window.end for step in own.steps),
        num_exchanges=len(begun),
        num_bytes=sum(each.num_bytes for each in begun),
    )


def waiting_times(trace: GroupTrace) -> list[list[int]]:
    """For each rank and exchange, how long it waited for others to come; 0 where the other end is not in the trace.

    Exchanges have no names: the n-th of a group is the n-th on all of its ranks. So all are 0 if some were dropped.
    """
    waits = [[0] * len(rank.exchanges) for rank in trace.ranks]
    if any(rank.num_dropped for rank in trace.ranks):
        return waits
    meetings: dict[tuple[object, ...], list[tuple[int, int, Exchange]]] = defaultdict(list)
    for rank, own in enumerate(trace.ranks):
        counts: dict[tuple[object, ...], int] = defaultdict(int)
        for index, each in enumerate(own.exchanges):
            key = _meeting(trace, rank, each)
            meetings[*key, counts[key]].append((rank, index, each))
            counts[key] += 1
    for group in meetings.values():
        for rank, index, each in group:
            waits[rank][index] = max(0, min(each.end, _all_came(each, group)) - each.begin)
    return waits


def _all_came(own: Exchange, group: Sequence[tuple[int, int, Exchange]]) -> int:
    """When those had come that this rank waits for: for a receiver its sender, for a sender nobody."""
    if own.kind is ExchangeKind.SEND:
        return own.begin
    return max(each.begin for _, _, each in group)


def _meeting(trace: GroupTrace, rank: int, exchange: Exchange) -> tuple[object, ...]:
    """What the ends of an exchange have in common."""
    place = trace.mesh.place(rank)
    in_tensor_group = exchange.group == "tensor"
    group, own = (place.stage, place.tensor_rank) if in_tensor_group else (place.tensor_rank, place.stage)
    if not exchange.kind.is_transfer:
        return exchange.group, group
    ends = (own, exchange.peer) if exchange.kind is ExchangeKind.SEND else (exchange.peer, own)
    return exchange.group, group, ends


def phase_windows(steps: Sequence[StepRecord]) -> dict[str, Window]:
    """The time of `prefill`, up to the result of the last step with prompt tokens, and of `decode` after it.

    A phase without steps is left out.
    """
    windows: dict[str, Window] = {}
    last = max((index for index, step in enumerate(steps) if not step.only_decodes), default=-1)
    if last >= 0:
        windows["prefill"] = Window(steps[0].submitted, steps[last].returned)
    if last + 1 < len(steps):
        begin = steps[last].returned if last >= 0 else steps[0].submitted
        windows["decode"] = Window(begin, steps[-1].returned)
    return windows


def overhead(trace: GroupTrace, window: Window) -> Overhead | None:
    """What the driver takes between steps in `window`; None if no step found the first rank with nothing to do."""
    found = list(_gaps(trace, window))
    if not found:
        return None
    planning, sending, total = (median(column) for column in zip(*found, strict=True))
    return Overhead(planning=planning, sending=sending, total=total, num_steps=len(found))


def _gaps(trace: GroupTrace, window: Window) -> Iterator[tuple[int, int, int]]:
    """Planning, sending, and all until the first rank has begun, of each step that was awaited."""
    spans = {step.step_id: step for step in trace.ranks[0].steps}
    returns = sorted(step.returned for step in trace.steps)
    for before, step in pairwise(trace.steps):
        result = max((time for time in returns if time <= step.submitted), default=None)
        began, previous = spans.get(step.step_id), spans.get(before.step_id)
        if result is None or began is None or previous is None or before.submitted > result:
            continue  # not submitted in answer to a result, but to fill the pipeline
        is_awaited = trace.mesh.pipeline == 1 or previous.end <= step.submitted
        if is_awaited and window.begin <= result and began.begin <= window.end:
            yield step.submitted - result, began.begin - step.submitted, began.begin - result
