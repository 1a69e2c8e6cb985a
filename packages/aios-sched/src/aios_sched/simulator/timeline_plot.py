"""The beginning of a timeline as a picture: one replica's steps, and below them its requests, one line each."""

from __future__ import annotations

from html import escape
from typing import Any

_WIDTH, _LEFT, _RIGHT, _TOP = 760, 84, 24, 84
_ROW = 14
_COLORS = {"waiting": "#d0d7de", "prompt": "#d1242f", "answer": "#1f6feb"}
_MIXED, _DECODE = "#d1242f", "#1f6feb"
_STYLE = "text{font:13px sans-serif;fill:#333}.title{font-weight:bold;font-size:15px}.paper{fill:#fff}"


def timeline_plot(record: dict[str, Any], *, replica: int = 0, max_requests: int = 32) -> str:
    """An SVG document of what `Timeline` wrote.

    Args:
        record: Its JSON.
        replica: Whose part of it.
        max_requests: Lines: the requests that arrived first.
    """
    events = [event for event in record["traceEvents"] if event["pid"] == replica + 1]
    spans = _spans(events)
    names = sorted({key for key, _ in spans}, key=lambda key: min(b for (k, _), (b, _) in spans.items() if k == key))
    names = names[:max_requests]
    shown = {key: span for key, span in spans.items() if key[0] in names}
    start = min((begin for begin, _ in shown.values()), default=0.0)
    end = max((end for _, end in shown.values()), default=1.0)
    scale = (_WIDTH - _LEFT - _RIGHT) / max(end - start, 1e-9)
    marks = [f'<text x="{_LEFT}" y="24" class="title">Replica {replica}: steps, and requests by arrival</text>']
    marks += _legend()
    for event in events:
        if event["ph"] == "X" and start <= event["ts"] and event["ts"] + event["dur"] <= end:
            color = _MIXED if event["args"]["prefill tokens"] else _DECODE
            marks.append(
                _bar(_LEFT + (event["ts"] - start) * scale, _TOP - 22, event["dur"] * scale, color, event["name"])
            )
    for (key, name), (begin, finish) in shown.items():
        y = _TOP + _ROW * names.index(key)
        marks.append(_bar(_LEFT + (begin - start) * scale, y, (finish - begin) * scale, _COLORS[name], f"{key} {name}"))
    bottom = _TOP + _ROW * len(names) + 18
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = _LEFT + share * (_WIDTH - _LEFT - _RIGHT)
        seconds = (start + share * (end - start)) / 1e6
        marks.append(f'<text x="{x:.1f}" y="{bottom}" text-anchor="middle">{seconds:.3g} s</text>')
    body, height = "\n  ".join(marks), bottom + 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">\n'
        f'  <style>{_STYLE}</style>\n  <rect width="{_WIDTH}" height="{height}" class="paper"/>\n  {body}\n</svg>\n'
    )


def _spans(events: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[float, float]]:
    """(request, what it does) to (from, to) in microseconds; only of requests whose every event was recorded."""
    begun: dict[tuple[str, str], float] = {}
    spans = {}
    for event in events:
        key = (event.get("id", ""), event["name"])
        if event["name"] not in _COLORS:
            continue
        if event["ph"] == "b":
            begun[key] = event["ts"]
        elif event["ph"] == "e":
            spans[key] = (begun.pop(key), event["ts"])
    return spans


def _legend() -> list[str]:
    marks = []
    texts = {
        "waiting": "waiting",
        "prompt": "prompt, or a step with prompt tokens",
        "answer": "answer, or decoding only",
    }
    for (name, text), x in zip(texts.items(), (_LEFT, _LEFT + 90, _LEFT + 350), strict=True):
        marks.append(f'<rect x="{x}" y="36" width="10" height="10" fill="{_COLORS[name]}"/>')
        marks.append(f'<text x="{x + 15}" y="45">{text}</text>')
    return marks


def _bar(x: float, y: float, width: float, color: str, title: str) -> str:
    # A hair narrower, so that neighbours can be told apart.
    size = f'width="{max(width - 0.3, 0.2):.2f}" height="10"'
    return f'<rect x="{x:.2f}" y="{y:.1f}" {size} fill="{color}"><title>{escape(title)}</title></rect>'
