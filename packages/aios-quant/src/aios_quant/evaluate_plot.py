"""A scatter plot in SVG, written by hand: two axes and a few labelled points need no plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 720, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 24, 44, 56
_LABEL_HEIGHT = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One labelled point; `y` is positive."""

    label: str
    x: float
    y: float


def scatter_plot(points: Sequence[Point], *, title: str, x_title: str, y_title: str) -> str:
    """An SVG document with x from 0 on a linear axis and y on a logarithmic one."""
    x_axis = _LinearAxis(max((point.x for point in points), default=1.0))
    y_axis = _LogAxis([point.y for point in points] or [1.0])
    marks = [f'<text x="{_LEFT}" y="24" class="title">{escape(title)}</text>']
    marks += [_vertical_line(x_axis.place(tick), f"{tick:g}") for tick in x_axis.ticks]
    marks += [_horizontal_line(y_axis.place(tick), f"{tick:g}") for tick in y_axis.ticks]
    marks.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 14, x_title, anchor="middle"))
    marks.append(f'<g transform="translate(18 {(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)">')
    marks.append(_text(0, 0, y_title, anchor="middle") + "</g>")
    marks += _labelled([(x_axis.place(point.x), y_axis.place(point.y), point.label) for point in points])
    body = "\n  ".join(marks)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">\n  <style>{_STYLE}</style>\n'
        f'  <rect width="{_WIDTH}" height="{_HEIGHT}" class="paper"/>\n  {body}\n</svg>\n'
    )


_STYLE = (
    "text{font:13px sans-serif;fill:#333}.title{font-weight:bold;font-size:15px}.paper{fill:#fff}"
    ".grid{stroke:#ddd}.point{fill:#1f6feb}"
)


class _LinearAxis:
    def __init__(self, largest: float) -> None:
        step = 10 ** math.floor(math.log10(largest / 2 if largest > 0 else 1.0))
        step *= next(factor for factor in (1, 2, 5, 10) if largest / (step * factor) <= 8)
        self.ticks = [step * i for i in range(math.ceil(largest / step) + 1)]

    def place(self, value: float) -> float:
        return _LEFT + value / self.ticks[-1] * (_WIDTH - _LEFT - _RIGHT)


class _LogAxis:
    def __init__(self, values: Sequence[float]) -> None:
        self._low, self._high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        self._high = max(self._high, self._low + 1)
        self.ticks = [10.0**power for power in range(self._low, self._high + 1)]

    def place(self, value: float) -> float:
        share = (math.log10(value) - self._low) / (self._high - self._low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _labelled(places: list[tuple[float, float, str]]) -> list[str]:
    """Points and their labels; a label moves down where it would cover the one above it."""
    marks: list[str] = []
    taken: list[tuple[float, float]] = []
    for x, y, label in sorted(places, key=lambda place: place[1]):
        right = x > _WIDTH * 0.7
        text_y = y + 4
        while any(abs(text_y - other_y) < _LABEL_HEIGHT and abs(x - other_x) < 150 for other_x, other_y in taken):
            text_y += 1
        taken.append((x, text_y))
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="point"/>')
        marks.append(_text(x - 10 if right else x + 10, text_y, label, anchor="end" if right else "start"))
    return marks


def _vertical_line(x: float, label: str) -> str:
    line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" class="grid"/>'
    return line + _text(x, _HEIGHT - _BOTTOM + 18, label, anchor="middle")


def _horizontal_line(y: float, label: str) -> str:
    line = f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
    return line + _text(_LEFT - 8, y + 4, label, anchor="end")


def _text(x: float, y: float, text: str, *, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
