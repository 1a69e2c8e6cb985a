"""Comparisons as a bar chart in SVG, written by hand: a plotting library would weigh more than this package.

One group per work, one bar per engine. Works differ by a factor of a hundred, so lengths are relative to the best peer
and the figures stand beside the bars.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from aios_serve.bench.engines import ENGINES
from aios_serve.bench.tables import TITLES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from aios_serve.bench.summary import Comparison, Figure

WIDTH, LABELS, FIGURES = 860, 150, 260
BAR, BAR_GAP, GROUP_GAP, TOP = 15, 3, 14, 64
_PALETTE = ("#0f766e", "#94a3b8", "#60a5fa", "#f59e0b", "#c084fc")
COLORS: Mapping[str, str] = dict(zip(ENGINES, _PALETTE, strict=True))


def bar_chart(comparisons: Sequence[Comparison], *, subtitle: str) -> str:
    """An SVG image of all comparisons; readable on light and on dark pages, since it brings its background."""
    longest = max((_share(row, each) for row in comparisons for each in row.figures.values()), default=1.0)
    body, y, heading = [], float(TOP), None
    for row in comparisons:
        if row.precision != heading:
            heading = row.precision
            y += 18
            body.append(_text(16, y, TITLES[heading], weight="600"))
            y += 10
        lines = list(_group(row, y, longest))
        body += lines
        y += len(row.figures) * (BAR + BAR_GAP) + GROUP_GAP
    engines = dict.fromkeys(engine for row in comparisons for engine in row.figures)
    head = [_text(16, 26, "AIOS and its peers, relative to the best peer", size=16, weight="600"), *_legend(engines)]
    return _svg([*head, *body, _text(16, y + 12, subtitle, size=11, color="#64748b")], height=y + 28)


def _group(row: Comparison, y: float, longest: float) -> Iterator[str]:
    height = len(row.figures) * (BAR + BAR_GAP)
    yield _text(LABELS - 8, y + height / 2 + 3, row.work.name, anchor="end")
    scale = (WIDTH - LABELS - FIGURES) / longest
    yield _reference(LABELS + scale, y, height)
    for engine, figure in row.figures.items():
        length = max(1.0, _share(row, figure) * scale)
        yield f'<rect x="{LABELS}" y="{y:.1f}" width="{length:.1f}" height="{BAR}" rx="2" fill="{COLORS[engine]}"/>'
        yield _text(LABELS + length + 6, y + BAR - 3.5, _label(row, figure), size=11)
        y += BAR + BAR_GAP


def _share(row: Comparison, figure: Figure) -> float:
    """Of the best peer's figure; of AIOS's own where there is no peer."""
    reference = row.figures[row.best_peer] if row.best_peer else figure
    return figure.spread.median / reference.spread.median


def _label(row: Comparison, figure: Figure) -> str:
    digits = 0 if figure.spread.median >= 100 else 1
    share = f" · {_share(row, figure):.2f}×" if row.best_peer and figure.engine != row.best_peer else ""
    return f"{figure.spread.median:.{digits}f} {row.work.unit}{share} · {figure.variant}"


def _legend(engines: Sequence[str] | Mapping[str, None]) -> Iterator[str]:
    x = 16
    for engine in engines:
        yield f'<rect x="{x}" y="40" width="12" height="12" rx="2" fill="{COLORS[engine]}"/>'
        yield _text(x + 18, 50, engine)
        x += 34 + 8 * len(engine)


def _reference(x: float, y: float, height: float) -> str:
    """Where the best peer ends."""
    ends = f'x1="{x:.1f}" y1="{y - 3:.1f}" x2="{x:.1f}" y2="{y + height:.1f}"'
    return f'<line {ends} stroke="#cbd5e1" stroke-dasharray="3 3"/>'


def _text(
    x: float, y: float, text: str, *, size: int = 12, anchor: str = "start", weight: str = "400", color: str = "#0f172a"
) -> str:
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{color}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _svg(lines: Sequence[str], *, height: float) -> str:
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *lines, "</svg>", ""])
