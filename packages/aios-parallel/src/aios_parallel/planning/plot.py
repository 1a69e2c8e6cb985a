"""A plot in SVG, written by hand: two logarithmic axes, a few lines, a legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

_WIDTH, _HEIGHT = 760, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 24, 48, 56
_COLORS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a")
_STEPS = (1, 2, 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A line.

    Attributes:
        name: In the legend.
        points: (x, y), both positive, in the order in which they are joined.
    """

    name: str
    points: Sequence[tuple[float, float]]


def log_plot(
    series: Sequence[Series], *, title: str, x_title: str, y_title: str, legend: Literal["top", "bottom"] = "top"
) -> str:
    """An SVG document of all series, with the legend in the left corner that is likelier to be empty."""
    points = [point for each in series for point in each.points]
    x_axis = _Axis([x for x, _ in points], _LEFT, _WIDTH - _RIGHT)
    y_axis = _Axis([y for _, y in points], _HEIGHT - _BOTTOM, _TOP)
    marks = [f'<text x="{_LEFT}" y="24" class="title">{escape(title)}</text>']
    marks += [_vertical_line(x_axis.place(tick), f"{tick:,g}") for tick in x_axis.ticks]
    marks += [_horizontal_line(y_axis.place(tick), f"{tick:,g}") for tick in y_axis.ticks]
    marks.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, x_title, anchor="middle"))
    marks.append(f'<g transform="translate(18 {(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)">')
    marks.append(_text(0, 0, y_title, anchor="middle") + "</g>")
    legend_y = _TOP + 16 if legend == "top" else _HEIGHT - _BOTTOM - 18 * len(series)
    for number, each in enumerate(series):
        color = _COLORS[number % len(_COLORS)]
        marks += _line(each, color, x_axis, y_axis)
        marks.append(f'<circle cx="{_LEFT + 14}" cy="{legend_y + 18 * number - 4}" r="4" fill="{color}"/>')
        marks.append(_text(_LEFT + 26, legend_y + 18 * number, each.name, anchor="start"))
    body = "\n  ".join(marks)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">\n  <style>{_STYLE}</style>\n'
        f'  <rect width="{_WIDTH}" height="{_HEIGHT}" class="paper"/>\n  {body}\n</svg>\n'
    )


_STYLE = (
    "text{font:13px sans-serif;fill:#333}.title{font-weight:bold;font-size:15px}.paper{fill:#fff}"
    ".grid{stroke:#ddd}.line{fill:none;stroke-width:2}"
)


class _Axis:
    """A logarithmic axis from `start` to `stop`, whose ticks are 1, 2 and 5 times powers of ten."""

    def __init__(self, values: Sequence[float], start: float, stop: float) -> None:
        low, high = min(values, default=1.0), max(values, default=1.0)
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        ticks = [step * 10.0**power for power in powers for step in _STEPS]
        first = max(i for i, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
        last = min(i for i, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
        self.ticks = ticks[first : max(last, first + 1) + 1]
        self._start, self._stop = start, stop
        self._low, self._high = math.log10(self.ticks[0]), math.log10(self.ticks[-1])
        if len(self.ticks) > 10:
            self.ticks = [tick for tick in self.ticks if math.log10(tick).is_integer()]

    def place(self, value: float) -> float:
        share = (math.log10(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._stop - self._start)


def _line(series: Series, color: str, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in series.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>' for x, y in places]
    return [f'<polyline points="{path}" class="line" stroke="{color}"/>', *dots]


def _vertical_line(x: float, label: str) -> str:
    line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" class="grid"/>'
    return line + _text(x, _HEIGHT - _BOTTOM + 18, label, anchor="middle")


def _horizontal_line(y: float, label: str) -> str:
    line = f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
    return line + _text(_LEFT - 8, y + 4, label, anchor="end")


def _text(x: float, y: float, text: str, *, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
