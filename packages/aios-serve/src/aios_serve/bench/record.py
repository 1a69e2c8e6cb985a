"""What `aios-bench peers` has measured so far: kept in files, shown as tables."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from aios_serve.bench.chart import bar_chart
from aios_serve.bench.machine import describe_machine, machine_line
from aios_serve.bench.summary import compare
from aios_serve.bench.tables import markdown_tables, rich_tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from aios_serve.bench.engines import Engine
    from aios_serve.bench.environments import Environments
    from aios_serve.bench.model_files import SourceModel
    from aios_serve.bench.peers import PeersConfig
    from aios_serve.bench.samples import Sample
    from aios_serve.bench.summary import Comparison
    from aios_serve.bench.work import Work

BUSY_CORES = 0.15
"""Of others, above which figures come with a warning."""


class Record:
    """Everything measured so far; written to the output folder after every sample, so that nothing is ever lost."""

    def __init__(
        self, *, config: PeersConfig, source: SourceModel, environments: Environments, works: Sequence[Work]
    ) -> None:
        self._config = config
        self._source = source
        self._environments = environments
        self._works = works
        self._machine = describe_machine()
        self._samples: list[Sample] = []

    def add(self, sample: Sample) -> None:
        """Take in a sample, and write all files anew."""
        self._samples.append(sample)
        comparisons = self._comparisons()
        self._config.output.mkdir(parents=True, exist_ok=True)
        self._write("peers.json", json.dumps(self._as_json(comparisons), indent=1) + "\n")
        self._write("peers.md", f"{markdown_tables(comparisons)}\n{self._caption()}\n")
        if comparisons:
            self._write("peers.svg", bar_chart(comparisons, subtitle=self._caption()))

    def show(self, console: Console) -> int:
        """Print the tables, and what failed; returns the exit status."""
        comparisons = self._comparisons()
        for table in rich_tables(comparisons):
            console.print(table)
        for failed in (each for each in self._samples if each.error):
            words = str(failed.error).splitlines()
            console.print(f"{failed.engine} {failed.variant}, {failed.work}: {words[0]} … {words[-1]}", style="red")
        busiest = max((each.busy_elsewhere or 0.0 for each in self._samples), default=0.0)
        if busiest > BUSY_CORES:
            console.print(
                f"other programs kept up to {busiest:.1f} cores busy meanwhile: these figures and ratios mean little",
                style="yellow",
            )
        console.print(f"{self._caption()}\nwritten to {self._config.output}/peers.{{json,md,svg}}", highlight=False)
        return 0 if comparisons else 1

    def _comparisons(self) -> list[Comparison]:
        return compare(self._samples, self._works, self._config.precisions)

    def _caption(self) -> str:
        versions = {each.engine: each.result["version"] for each in self._samples if each.result}
        named = ", ".join(f"{engine} {version}" for engine, version in versions.items())
        where = machine_line(self._machine, threads=self._config.threads)
        return f"{self._source.name}; medians of {self._config.repeats} rounds (range); {where}; {named}"

    def _as_json(self, comparisons: Sequence[Comparison]) -> dict[str, Any]:
        return {
            "command": shlex.join(["aios-bench", *sys.argv[1:]]),
            "model": {"name": self._source.name, "file_type": self._source.file_type},
            "machine": self._machine,
            "threads": self._config.threads,
            "environments": {engine.name: self._environment(engine) for engine in self._config.engines},
            "summary": [_summary(each) for each in comparisons],
            "samples": [asdict(sample) for sample in self._samples],
        }

    def _environment(self, engine: Engine) -> dict[str, Any] | None:
        installed = self._environments.installed(engine)
        return None if installed is None else asdict(installed)

    def _write(self, name: str, text: str) -> None:
        (self._config.output / name).write_text(text, encoding="utf-8")


def _summary(comparison: Comparison) -> dict[str, Any]:
    return {
        "work": comparison.work.name,
        "precision": comparison.precision,
        "unit": comparison.work.unit,
        "engines": {
            name: {"variant": figure.variant, **asdict(figure.spread)} for name, figure in comparison.figures.items()
        },
        "best_peer": comparison.best_peer,
        "ratio": None if comparison.ratio is None else asdict(comparison.ratio),
    }
