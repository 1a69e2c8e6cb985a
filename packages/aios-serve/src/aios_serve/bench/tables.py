"""Comparisons as tables: for the terminal, and in Markdown for the documentation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.table import Table

    from aios_serve.bench.summary import Comparison, Figure, Spread

TITLES = {"4bit": "4-bit weights", "8bit": "8-bit weights", "bf16": "16-bit weights"}


def rich_tables(comparisons: Sequence[Comparison]) -> Iterator[Table]:
    """One table per precision."""
    from rich.table import Table

    for precision in _precisions(comparisons):
        rows = [each for each in comparisons if each.precision == precision]
        engines = _engines(rows)
        table = Table(title=TITLES[precision], title_justify="left")
        for name in ("work", "unit", *engines, "AIOS / best peer"):
            table.add_column(name, no_wrap=name in ("work", "unit"))
        for row in rows:
            table.add_row(*_cells(row, engines, separator="\n"))
        yield table


def markdown_tables(comparisons: Sequence[Comparison]) -> str:
    """The same in Markdown."""
    lines = []
    for precision in _precisions(comparisons):
        rows = [each for each in comparisons if each.precision == precision]
        engines = _engines(rows)
        header = ["work", "unit", *engines, "AIOS / best peer"]
        lines += [f"**{TITLES[precision]}**", "", _line(header), _line(["---"] * len(header))]
        lines += [_line(_cells(row, engines, separator="<br>")) for row in rows]
        lines.append("")
    return "\n".join(lines)


def spread_text(spread: Spread) -> str:
    """Median and range, with as many digits as mean something: `1.31 (1.20–1.42)`, `230 (221–243)`."""
    digits = 0 if spread.median >= 100 else 1 if spread.median >= 10 else 2
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}–{spread.high:.{digits}f})"


def _cells(row: Comparison, engines: Sequence[str], *, separator: str) -> list[str]:
    figures = [_figure(row.figures.get(engine), separator) for engine in engines]
    ratio = "–" if row.ratio is None else f"{spread_text(row.ratio)}{separator}{row.best_peer}"
    return [row.work.name, row.work.unit, *figures, ratio]


def _figure(figure: Figure | None, separator: str) -> str:
    return "–" if figure is None else f"{spread_text(figure.spread)}{separator}{figure.variant}"


def _precisions(comparisons: Sequence[Comparison]) -> list[str]:
    return list(dict.fromkeys(each.precision for each in comparisons))


def _engines(rows: Sequence[Comparison]) -> list[str]:
    return list(dict.fromkeys(engine for row in rows for engine in row.figures))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
