"""The same trace for several values of an option: which policy, which block size, how many replicas?"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from aios_model.errors import ConfigError
from aios_sched.simulator.fleet import Fleet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aios_sched.simulator.cost import CostModel
    from aios_sched.simulator.results import Objectives, Results
    from aios_sched.simulator.system import SystemConfig
    from aios_sched.simulator.trace import Trace

SWEPT = ("block-size", "max-num-batched-tokens", "max-num-seqs", "num-blocks", "policy", "replicas", "routing")
"""Options that can be swept, as they are written on the command line."""

_MAX_VALUES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """An option and its values.

    Attributes:
        option: One of SWEPT.
        values: What it takes in turn.
    """

    option: str
    values: tuple[int | str, ...]

    @classmethod
    def parse(cls, option: str, values: str) -> Sweep:
        """From the command line: `8,16,32`, `1..8`, `fcfs,priority`.

        Raises:
            ConfigError: The option cannot be swept, or a value is none of its kind.
        """
        option = option.removeprefix("--")
        if option not in SWEPT:
            raise ConfigError(f"option {option!r} cannot be swept; use one of {', '.join(SWEPT)}")
        if option in ("policy", "routing"):
            found: list[int | str] = [name for name in values.split(",") if name]
        else:
            found = [number for part in values.split(",") for number in _numbers(option, part)]
        if not found or len(found) > _MAX_VALUES:
            raise ConfigError(f"--sweep {option} has {len(found)} values; give 1 to {_MAX_VALUES}")
        return cls(option=option, values=tuple(dict.fromkeys(found)))

    def systems(self, system: SystemConfig) -> Iterator[tuple[int | str, SystemConfig]]:
        """Each value and the system that has it. The bytes of the pool stay as they are when pages grow.

        Raises:
            ConfigError: A value cannot be honoured.
        """
        name = self.option.replace("-", "_")
        assert name in {field.name for field in fields(system)}
        for value in self.values:
            changes: dict[str, Any] = {name: value}
            if name == "block_size" and isinstance(value, int) and value > 0:
                changes["num_blocks"] = system.num_blocks * system.block_size // value
            yield value, replace(system, **changes)


def run_sweep(
    sweep: Sweep,
    system: SystemConfig,
    cost: CostModel,
    trace: Trace,
    *,
    on_result: Callable[[int | str, Results], None] | None = None,
    until: Callable[[Results], bool] | None = None,
) -> list[tuple[int | str, Results]]:
    """Simulates the trace once per value.

    Args:
        sweep: The option and its values.
        system: Everything else.
        cost: How long steps take.
        trace: The requests, the same for each.
        on_result: Told of every result.
        until: Stop behind the first result of which this is true.
    """
    systems = list(sweep.systems(system))  # mistakes in any value are found before the first one takes its time
    rows = []
    for value, each in systems:
        results = Fleet(each, cost).run(trace)
        rows.append((value, results))
        if on_result is not None:
            on_result(value, results)
        if until is not None and until(results):
            break
    return rows


def meets(results: Results, objectives: Objectives, *, share: float) -> bool:
    """Whether at least `share` of the requests, refused ones included, kept all objectives."""
    return results.goodput(objectives)["share"] >= share


def _numbers(option: str, text: str) -> range:
    match = re.fullmatch(r"(\d{1,9})(?:\.\.(\d{1,9}))?", text.strip())
    if match is None:
        raise ConfigError(f"--sweep {option}: {text!r} is no number and no range; write 8,16,32 or 1..8")
    low = int(match[1])
    return range(low, int(match[2] or low) + 1)
