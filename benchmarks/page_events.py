"""What does it cost that pages can be watched? Nobody listening against an earlier version, and against a recorder.

    git worktree add /tmp/before COMMIT
    python benchmarks/page_events.py --against /tmp/before

Both versions of the block manager and of the simulator are loaded into one process and take turns, first one and then
the other one first. Printed are medians of the paired ratios, with the range in which the true median lies with a
confidence of at least 95%. Without `--against` only the recorder is compared.
"""

from __future__ import annotations

import argparse
import importlib
import random
import statistics
import sys
from collections.abc import Callable
from math import comb
from pathlib import Path
from time import process_time
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent.parent
MODULES = (
    "aios_kvcache.block_manager",
    "aios_sched.simulator.arrivals",
    "aios_sched.simulator.cost",
    "aios_sched.simulator.fleet",
    "aios_sched.simulator.lengths",
    "aios_sched.simulator.system",
)
PHASES = ("open", "reserve a prompt", "publish a prompt", "64 decode steps", "free", "all of it")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="root of another checkout")
    parser.add_argument("--pairs", type=int, default=41)
    parser.add_argument("--requests", type=int, default=400, help="of the simulation")
    given = parser.parse_args()
    if given.pairs < 6:
        parser.error(f"--pairs {given.pairs} says nothing with 95% confidence; give at least 6")
    this = load(HERE)
    if given.against is not None:
        other, again = load(given.against.resolve()), load(given.against.resolve())
        print(f"nobody listens, this version over {given.against}: ratio of processor times")
        compare(PHASES, given.pairs, lambda: books(this), lambda: books(other))
        name = f"simulate {given.requests} requests"
        compare((name,), given.pairs, lambda: simulate(this, given.requests), lambda: simulate(other, given.requests))
        print("the earlier version over itself, loaded twice: how far such ratios are to be trusted")
        compare(PHASES, given.pairs, lambda: books(again), lambda: books(other))
        compare((name,), given.pairs, lambda: simulate(again, given.requests), lambda: simulate(other, given.requests))
    print("a recorder listens, over nobody does: ratio of processor times")
    compare(PHASES, given.pairs, lambda: books(this, record=True), lambda: books(this))
    snapshots(this)


def load(root: Path) -> dict[str, ModuleType]:
    """The modules of one checkout, which keep each other's company whatever is loaded later."""
    paths = [str(path) for path in sorted((root / "packages").glob("*/src"))]
    if not paths:
        raise SystemExit(f"{root} holds no packages/*/src: give the root of a checkout")
    for name in [name for name in sys.modules if name.startswith("aios_")]:
        del sys.modules[name]
    sys.path[:0] = paths
    modules = {name: importlib.import_module(name) for name in MODULES}
    for name in ("page_recorder",):
        if (root / "packages/aios-kvcache/src/aios_kvcache" / f"{name}.py").exists():
            modules[name] = importlib.import_module(f"aios_kvcache.{name}")
    del sys.path[: len(paths)]
    assert all(str(module.__file__).startswith(str(root)) for module in modules.values()), "the wrong checkout"
    return modules


def compare(
    names: tuple[str, ...], num_pairs: int, run: Callable[[], list[float]], base: Callable[[], list[float]]
) -> None:
    """Runs both in turn and prints what comes of it."""
    ratios: list[list[float]] = [[] for _ in names]
    seconds: list[list[float]] = [[] for _ in names]
    run()
    base()
    for pair in range(num_pairs):
        first, second = (run, base) if pair % 2 else (base, run)
        one, two = first(), second()
        ours, theirs = (one, two) if pair % 2 else (two, one)
        for index in range(len(names)):
            ratios[index].append(ours[index] / theirs[index])
            seconds[index].append(theirs[index])
    for index, name in enumerate(names):
        low, high = interval(ratios[index])
        median, base_ms = statistics.median(ratios[index]), statistics.median(seconds[index]) * 1e3
        print(f"  {name:24} {median:6.3f}  [{low:.3f}, {high:.3f}]  {num_pairs} pairs, base {base_ms:8.2f} ms")


def interval(values: list[float]) -> tuple[float, float]:
    """Between these order statistics lies the true median with at least 95% confidence, whatever the distribution."""
    ordered, count = sorted(values), len(values)
    tail, rank = 0.0, 0
    while tail + comb(count, rank) / 2**count <= 0.025:
        tail += comb(count, rank) / 2**count
        rank += 1
    return ordered[max(rank - 1, 0)], ordered[min(count - rank, count - 1)]


def books(modules: dict[str, ModuleType], *, record: bool = False) -> list[float]:
    """Seconds of each phase: 6 times 64 sequences of 520 tokens in a pool that evicts, half of them with a prefix."""
    manager = modules["aios_kvcache.block_manager"].BlockManager(num_blocks=2600, block_size=16)
    recorder = modules["page_recorder"].PageRecorder(manager) if record else None
    draw, seconds = random.Random(0), [0.0] * (len(PHASES) - 1)
    for round_number in range(6):
        batch = Batch(manager, {f"{round_number}-{i}": prompt_of(draw, shared=i % 2 == 0) for i in range(64)})
        for phase, action in enumerate((batch.open, batch.reserve, batch.publish, batch.decode, batch.free)):
            started = process_time()
            action()
            seconds[phase] += process_time() - started
    if recorder is not None:
        recorder.close()
    return [*seconds, sum(seconds)]


class Batch:
    """Sequences that live together."""

    def __init__(self, manager: Any, prompts: dict[str, list[int]]) -> None:
        self.manager, self.prompts = manager, prompts
        self.cached: dict[str, int] = {}

    def open(self) -> None:
        """Finds what is cached."""
        for name, tokens in self.prompts.items():
            self.cached[name] = self.manager.open(name, tokens)

    def reserve(self) -> None:
        """Takes pages for the prompts."""
        for name, tokens in self.prompts.items():
            assert self.manager.reserve(name, start=self.cached[name], end=len(tokens)) is not None

    def publish(self) -> None:
        """Lets others find them."""
        for name, tokens in self.prompts.items():
            self.manager.publish(name, tokens, len(tokens))

    def decode(self) -> None:
        """64 tokens for each."""
        manager = self.manager
        for _ in range(64):
            for name, tokens in self.prompts.items():
                tokens.append(1)
                manager.reserve(name, start=len(tokens) - 1, end=len(tokens))
                manager.publish(name, tokens, len(tokens))

    def free(self) -> None:
        """Gives all pages back."""
        for name in self.prompts:
            self.manager.free(name)


def prompt_of(draw: random.Random, *, shared: bool) -> list[int]:
    """A prompt of 520 tokens, of which 256 are shared."""
    start = [7] * 256 if shared else [draw.randrange(1 << 30), *[7] * 255]
    return [*start, draw.randrange(1 << 30), *[8] * 263]


def simulate(modules: dict[str, ModuleType], num_requests: int) -> list[float]:
    """Seconds to simulate ShareGPT-like requests, all at once, in 64 seats and a pool that evicts."""
    system = modules["aios_sched.simulator.system"].SystemConfig(num_blocks=4096)
    cost = modules["aios_sched.simulator.cost"].LinearCost(step_s=0.02, token_s=0.0, context_s=0.0)
    arrivals = modules["aios_sched.simulator.arrivals"]
    trace = arrivals.IndependentRequests(times=arrivals.poisson(8.0), num_requests=num_requests, seed=1)
    fleet = modules["aios_sched.simulator.fleet"].Fleet(system, cost)
    started = process_time()
    fleet.run(trace)
    return [process_time() - started]


def snapshots(modules: dict[str, ModuleType]) -> None:
    """What a viewer asks for, of 10,000 pages that 300 sequences hold."""
    manager = modules["aios_kvcache.block_manager"].BlockManager(num_blocks=10_000, block_size=16)
    recorder = modules["page_recorder"].PageRecorder(manager)
    draw = random.Random(0)
    for number in range(300):
        tokens = prompt_of(draw, shared=number % 2 == 0)
        manager.open(f"{number}", tokens)
        manager.reserve(f"{number}", start=0, end=len(tokens))
        manager.publish(f"{number}", tokens, len(tokens))
    for name, action in (
        ("a snapshot", recorder.snapshot),
        ("the last 100 events", lambda: recorder.since(recorder.num_events - 100)),
        ("attaching", manager.page_states),
    ):
        times = []
        for _ in range(50):
            started = process_time()
            action()
            times.append(process_time() - started)
        print(f"  {name} of 10,000 pages: {statistics.median(times) * 1e6:.0f} µs")


if __name__ == "__main__":
    main()
