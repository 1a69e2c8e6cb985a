"""What the samples say: each engine's best setting, its median and spread, and AIOS beside the best peer."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aios_serve.bench.engines import AIOS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from aios_serve.bench.samples import Sample
    from aios_serve.bench.work import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median, smallest and largest of some values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """At least one value."""
        values = list(values)
        return cls(median=statistics.median(values), low=min(values), high=max(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """An engine at one precision on one work, with its best setting.

    Attributes:
        engine: Its name.
        variant: The setting.
        by_round: Round number to figure.
        spread: Over the rounds.
    """

    engine: str
    variant: str
    by_round: Mapping[int, float]
    spread: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All engines at one precision on one work.

    Attributes:
        work: What was measured.
        precision: Such as "4bit".
        figures: By engine, in the order in which they were named; without those that failed.
        best_peer: Name of the best one that is not AIOS; None if there is none.
        ratio: AIOS to the best peer, round by round; for memory it is below 1 where AIOS takes less. None without both.
    """

    work: Work
    precision: str
    figures: Mapping[str, Figure]
    best_peer: str | None
    ratio: Spread | None


def compare(samples: Sequence[Sample], works: Sequence[Work], precisions: Sequence[str]) -> list[Comparison]:
    """A comparison for every precision and work of which there is any figure, by precision."""
    compared = (_compare_one(samples, work, precision) for precision in precisions for work in works)
    return [each for each in compared if each.figures]


def _compare_one(samples: Sequence[Sample], work: Work, precision: str) -> Comparison:
    here = [each for each in samples if each.work == work.name and each.precision == precision]
    figures = {}
    for engine in dict.fromkeys(each.engine for each in here):
        figure = _best_setting([each for each in here if each.engine == engine], work)
        if figure is not None:
            figures[engine] = figure
    best_peer = _best([figure for engine, figure in figures.items() if engine != AIOS], work)
    return Comparison(
        work=work,
        precision=precision,
        figures=figures,
        best_peer=None if best_peer is None else best_peer.engine,
        ratio=_ratio(figures.get(AIOS), best_peer),
    )


def _best_setting(samples: Sequence[Sample], work: Work) -> Figure | None:
    """The best median, of those measured in most rounds: one lucky round does not make a setting the best."""
    by_variant: dict[str, dict[int, float]] = defaultdict(dict)
    for sample in samples:
        if sample.figure is not None:
            by_variant[sample.variant][sample.round_number] = sample.figure
    rounds = max(map(len, by_variant.values()), default=0)
    return _best(
        [
            Figure(engine=samples[0].engine, variant=variant, by_round=values, spread=Spread.of(values.values()))
            for variant, values in by_variant.items()
            if len(values) == rounds
        ],
        work,
    )


def _best(figures: Sequence[Figure], work: Work) -> Figure | None:
    choose = max if work.more_is_better else min
    return choose(figures, key=lambda figure: figure.spread.median, default=None)


def _ratio(ours: Figure | None, theirs: Figure | None) -> Spread | None:
    if ours is None or theirs is None:
        return None
    common = ours.by_round.keys() & theirs.by_round.keys()
    return Spread.of(ours.by_round[each] / theirs.by_round[each] for each in common) if common else None
