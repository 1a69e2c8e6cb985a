"""A cost model from measured steps: least squares with weights that cannot be negative, and its JSON file.

The time of a step is the sum of a curve over the number of tokens, straight between a few knots, and of terms in
proportion to requests, contexts and pairs of tokens. That is linear in its coefficients; each is a time that something
takes, so none may be negative. Non-negative least squares by cyclic coordinate descent: each coefficient in turn takes
its best value while the others stay (Franc, Hlavac and Navara, 2005). Residuals are relative to what is predicted
(reweighted a few times), for a step of one token matters as much as one of two hundred.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from aios_model.errors import AiosError, ConfigError
from aios_sched.simulator.cost import LinearCost, StepShape

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_FORMAT = "aios step cost 1"
_MAX_ROUNDS = 20_000
_NUM_REWEIGHTINGS = 2


class CostFileError(AiosError, ValueError):
    """A file with a cost model cannot be read or written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """A step of a real engine.

    Attributes:
        shape: What it computed.
        seconds: How long it took.
    """

    shape: StepShape
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A fitted model and how well it fits.

    Attributes:
        cost: The model.
        num_steps: Measured steps it was fitted to.
        median_error: Median of the relative errors of single steps, 0 to 1.
        total_error: Relative error of the sum over all steps, signed.
    """

    cost: LinearCost
    num_steps: int
    median_error: float
    total_error: float


def fit(steps: Sequence[MeasuredStep]) -> Fit:
    """The model that is nearest to the measured steps.

    Args:
        steps: At least two, of different shapes.

    Raises:
        ConfigError: There are too few, or a time is not positive.
    """
    if len({step.shape for step in steps}) < 2:
        raise ConfigError("a cost model needs measured steps of at least two shapes; measure more")
    if not all(math.isfinite(step.seconds) and step.seconds > 0 for step in steps):
        raise ConfigError("a measured step took no time, or an infinite one; check the measurement")
    largest = max(step.shape.num_tokens for step in steps)
    knots = [knot for knot in KNOTS if knot < largest]
    cost = _fit_once(steps, [step.seconds for step in steps], knots)
    for _ in range(_NUM_REWEIGHTINGS):
        # Relative to the measured times, slow outliers would count too little, and the sum come out too low.
        cost = _fit_once(steps, [_seconds(cost, step.shape) for step in steps], knots)
    predicted = [_seconds(cost, step.shape) for step in steps]
    errors = [abs(guess / step.seconds - 1) for guess, step in zip(predicted, steps, strict=True)]
    total = sum(step.seconds for step in steps)
    return Fit(
        cost=cost, num_steps=len(steps), median_error=median(errors), total_error=math.fsum(predicted) / total - 1
    )


def save_cost(path: Path, fitted: Fit, *, about: dict[str, object] | None = None) -> None:
    """Writes a fitted model as JSON.

    Args:
        path: The file.
        fitted: The model.
        about: What else to say: machine, model, settings.

    Raises:
        CostFileError: It cannot be written.
    """
    record = {"format": _FORMAT, **asdict(fitted), "about": about or {}}
    try:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CostFileError(f"{path} cannot be written: {error}") from error


def load_cost(path: Path) -> LinearCost:
    """Reads a model that `save_cost` wrote, or a JSON object with the fields of LinearCost.

    Raises:
        CostFileError: It cannot be read, or is no cost model.
    """
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CostFileError(f"{path} cannot be read as JSON: {error}") from error
    fields = record.get("cost", record) if isinstance(record, dict) else None
    if not isinstance(fields, dict) or "step_s" not in fields:
        raise CostFileError(f"{path} holds no cost model: a JSON object with at least step_s is needed")
    try:
        curve = tuple((int(tokens), float(seconds)) for tokens, seconds in fields.get("curve", ()))
        return LinearCost(
            **{**{name: float(value) for name, value in fields.items() if name != "curve"}, "curve": curve}
        )
    except (TypeError, ValueError) as error:
        raise CostFileError(f"{path} holds no cost model: {error}") from error


def _fit_once(steps: Sequence[MeasuredStep], scales: Sequence[float], knots: Sequence[int]) -> LinearCost:
    """The model with the least squares of errors, each divided by its scale."""
    rows = [
        [value / scale for value in _features(step.shape, knots)] for step, scale in zip(steps, scales, strict=True)
    ]
    goals = [step.seconds / scale for step, scale in zip(steps, scales, strict=True)]
    largest = max(step.shape.num_tokens for step in steps)
    return _model(_non_negative_least_squares(rows, goals), knots, largest)


def _features(shape: StepShape, knots: Sequence[int]) -> list[float]:
    """A constant, how much further than each knot the tokens reach up to the next one, and the other terms."""
    pieces = [
        float(max(0, min(shape.num_tokens, end) - start))
        for start, end in zip(knots, [*knots[1:], 1 << 40], strict=True)
    ]
    return [1.0, *pieces, float(shape.num_sequences), float(shape.num_context), float(shape.num_pairs)]


def _model(weights: Sequence[float], knots: Sequence[int], largest: int) -> LinearCost:
    step, *slopes = weights[:-3]
    curve, height = [(knots[0], 0.0)] if knots else [], 0.0
    for slope, start, end in zip(slopes, knots, [*knots[1:], largest], strict=True):
        height += slope * (end - start)
        curve.append((end, height))
    sequence, context, pair = weights[-3:]
    return LinearCost(step_s=step, sequence_s=sequence, context_s=context, pair_s=pair, curve=tuple(curve))


def _seconds(cost: LinearCost, shape: StepShape) -> float:
    return cost.step(shape) / 1e15


def _non_negative_least_squares(rows: Sequence[Sequence[float]], wanted: Sequence[float]) -> list[float]:
    """x >= 0 with `rows` times x nearest to `wanted`."""
    size = len(rows[0])
    products = [[math.fsum(row[i] * row[j] for row in rows) for j in range(size)] for i in range(size)]
    goals = [math.fsum(row[i] * value for row, value in zip(rows, wanted, strict=True)) for i in range(size)]
    solution = [0.0] * size
    for _ in range(_MAX_ROUNDS):
        largest_change = 0.0
        for i in range(size):
            if not products[i][i]:
                continue
            rest = math.fsum(products[i][j] * solution[j] for j in range(size)) - products[i][i] * solution[i]
            value = max(0.0, (goals[i] - rest) / products[i][i])
            # In units of the whole, so that terms of any size count alike.
            largest_change = max(largest_change, abs(value - solution[i]) * math.sqrt(products[i][i] / len(rows)))
            solution[i] = value
        if largest_change < 1e-9:
            break
    return solution
