"""How long ranks take to exchange tensors: from the figures of a link, or from measured times.

From a link with n ranks and S bytes, the usual model of a tree for small and a ring for large messages:

    all_reduce  2 · ceil(log2 n) · latency + 2 (n - 1) / n · S / bandwidth       S: the tensor
    gather          ceil(log2 n) · latency +   (n - 1) / n · S / bandwidth       S: what all ranks hold together
    send                           latency +                 S / bandwidth

Measured times come as a JSON file:

    {"name": "gloo, two hosts",
     "rows": [{"operation": "all_reduce", "link": "host", "bytes": 8192, "ranks": 2, "seconds": 1.2e-5}, …]}

`operation` is `all_reduce` (the default), `gather` or `send`; `link` is `host` (the default: between devices of one
host) or `network`. Between measured sizes the time is interpolated linearly, below the smallest it is that of the
smallest, above the largest it grows with the slope of the last two. A number of ranks that was not measured takes the
times of the nearest one, scaled as the formula above scales. Operations without rows use the formula.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from aios_model.errors import ConfigError
from aios_parallel.planning.devices import Link

Operation = Literal["all_reduce", "gather", "send"]
Where = Literal["host", "network"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveTimes:
    """Times of collectives over the links of a cluster.

    Attributes:
        links: By where they are.
        measured: Rows of (bytes, seconds), sorted, by where, operation and number of ranks.
        name: What was measured; empty without measurements.
    """

    links: Mapping[Where, Link]
    measured: Mapping[tuple[Where, Operation, int], Sequence[tuple[float, float]]] = field(default_factory=dict)
    name: str = ""

    def seconds(self, operation: Operation, *, ranks: int, num_bytes: float, where: Where) -> float:
        """Time of one call; 0 for a group of one."""
        if ranks == 1:
            return 0.0
        counts = [count for place, kind, count in self.measured if (place, kind) == (where, operation)]
        if not counts:
            return link_seconds(operation, self.links[where], ranks=ranks, num_bytes=num_bytes)
        nearest = min(counts, key=lambda count: (abs(math.log(count / ranks)), count))
        seconds = _interpolate(self.measured[where, operation, nearest], num_bytes)
        if nearest == ranks:
            return seconds
        link = self.links[where]
        scale = link_seconds(operation, link, ranks=ranks, num_bytes=num_bytes)
        return seconds * scale / link_seconds(operation, link, ranks=nearest, num_bytes=num_bytes)


def link_seconds(operation: Operation, link: Link, *, ranks: int, num_bytes: float) -> float:
    """Time of one call by the formula of the module's docstring."""
    if operation == "send":
        return link.latency + num_bytes / link.bandwidth
    rounds = 2 if operation == "all_reduce" else 1
    steps = math.ceil(math.log2(ranks))
    return rounds * (steps * link.latency + (ranks - 1) / ranks * num_bytes / link.bandwidth)


def sent_bytes(operation: Operation, *, ranks: int, num_bytes: float) -> float:
    """Bytes that a rank sends in one call, S as in the module's docstring."""
    if operation == "send":
        return num_bytes
    return (2 if operation == "all_reduce" else 1) * (ranks - 1) / ranks * num_bytes


def read_collectives(path: Path, links: Mapping[Where, Link]) -> CollectiveTimes:
    """The times in a file of the format above; ConfigError naming the row and the field that is wrong."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--collectives {path} cannot be read as JSON: {error}") from error
    rows = raw.get("rows") if isinstance(raw, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f'--collectives {path} must hold {{"rows": [{{"bytes": …, "ranks": …, "seconds": …}}, …]}}')
    measured: dict[tuple[Where, Operation, int], list[tuple[float, float]]] = {}
    for number, row in enumerate(rows):
        key, point = _read_row(row, f"--collectives {path}, row {number}")
        points = measured.setdefault(key, [])
        if any(point[0] == size for size, _ in points):
            raise ConfigError(f"--collectives {path}, row {number} repeats an earlier one; give one time per size")
        points.append(point)
    return CollectiveTimes(
        links=links,
        measured={key: sorted(points) for key, points in measured.items()},
        name=str(raw.get("name") or path.name),
    )


def _read_row(row: Any, where: str) -> tuple[tuple[Where, Operation, int], tuple[float, float]]:
    if not isinstance(row, dict):
        raise ConfigError(f"{where} must be an object, got {type(row).__name__}")
    operation, place = row.get("operation", "all_reduce"), row.get("link", "host")
    if operation not in get_args(Operation):
        raise ConfigError(f"{where}: operation is {operation!r}; it must be one of {', '.join(get_args(Operation))}")
    if place not in get_args(Where):
        raise ConfigError(f"{where}: link is {place!r}; it must be host or network")
    ranks = _number(row, "ranks", where)
    if ranks < 2 or ranks != int(ranks):
        raise ConfigError(f"{where}: ranks is {ranks:g}; it must be a whole number from 2")
    return (place, operation, int(ranks)), (_number(row, "bytes", where), _number(row, "seconds", where))


def _number(row: Mapping[str, Any], name: str, where: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{where}: {name} is {value!r}; it must be a number above 0")
    return float(value)


def _interpolate(points: Sequence[tuple[float, float]], num_bytes: float) -> float:
    place = bisect_left([size for size, _ in points], num_bytes)
    if place == 0:
        return points[0][1]
    if len(points) == 1:
        return points[0][1] * num_bytes / points[0][0]
    (low, before), (high, after) = points[min(place, len(points) - 1) - 1], points[min(place, len(points) - 1)]
    slope = (after - before) / (high - low)
    if num_bytes > high:  # noise may make the last slope negative; a larger message is never faster
        return after + max(0.0, slope) * (num_bytes - high)
    return before + slope * (num_bytes - low)
