"""Rounds of measurements: every engine in turn on the same work, so that a drifting machine drifts for all of them."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from aios_serve.bench.samples import Task

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aios_serve.bench.engines import Engine
    from aios_serve.bench.samples import Measure, Sample
    from aios_serve.bench.work import Work

KEPT_SHARE = 0.75
"""After the first round, settings of an engine below this share of its best one for that work are measured no more."""


def plan_tasks(engines: Sequence[Engine], precisions: Sequence[str], works: Sequence[Work]) -> list[Task]:
    """Everything to be measured in a round: work by work and precision by precision, the engines beside each other."""
    return [
        Task(engine=engine, precision=precision, variant=variant, work=work)
        for work in works
        for precision in precisions
        for engine in engines
        for variant in engine.variants.get(precision, ())
        if variant.can_do(work)
    ]


def run_rounds(tasks: Sequence[Task], measure: Measure, *, repeats: int) -> Iterator[Sample]:
    """Measure all tasks `repeats` times; memory, which does not vary, once.

    Every second round goes through the engines in the opposite order: whoever comes second finds a warmer machine.
    What failed in a round is not tried again.
    """
    for round_number in range(1, repeats + 1):
        samples = []
        for task in _in_order(tasks, round_number):
            sample = measure(task, round_number)
            samples.append(sample)
            yield sample
        tasks = _still_measured(tasks, samples, drop_slow=round_number == 1)


def _in_order(tasks: Sequence[Task], round_number: int) -> Iterator[Task]:
    for _, group in groupby(tasks, key=lambda task: (task.work.name, task.precision)):
        beside_each_other = list(group)
        yield from beside_each_other if round_number % 2 else reversed(beside_each_other)


def _still_measured(tasks: Sequence[Task], samples: Sequence[Sample], *, drop_slow: bool) -> list[Task]:
    figures = {(each.engine, each.precision, each.variant, each.work): each.figure for each in samples}

    def figure(task: Task) -> float | None:
        return figures.get((task.engine.name, task.precision, task.variant.name, task.work.name))

    def best(task: Task) -> float:
        rivals = (other for other in tasks if _compete(task, other))
        return max(value for other in rivals if (value := figure(other)) is not None)

    return [
        task
        for task in tasks
        if task.work.more_is_better
        and (value := figure(task)) is not None
        and not (drop_slow and value < KEPT_SHARE * best(task))
    ]


def _compete(one: Task, other: Task) -> bool:
    """Whether they differ in the setting only."""
    return (one.engine, one.precision, one.work) == (other.engine, other.precision, other.work)
