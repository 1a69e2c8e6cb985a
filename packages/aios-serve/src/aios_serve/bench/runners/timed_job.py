"""What every runner shares: a JSON job on stdin, warm-up and timed passes, one JSON line on stdout."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_PASSES = 5
WARM_UP_TOKENS = 8
TOKENS_SHOWN = 64


class EngineUnderTest(Protocol):
    """One loaded model. `facts` are what it says about itself, for the record."""

    version: str
    facts: dict[str, Any]

    def generate(self, prompts: list[list[int]], new_tokens: int, timeline: Timeline) -> list[list[int]]:
        """Greedy tokens of every prompt, `new_tokens` each, whatever the end-of-text token says.

        Calls `timeline.record` after each step.
        """
        ...


class Timeline:
    """How many tokens were there when: one point per step of the engine."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.points: list[tuple[float, list[int]]] = []

    def record(self, counts: Sequence[int]) -> None:
        """Note that sequence i has `counts[i]` new tokens now."""
        self.points.append((time.perf_counter(), list(counts)))

    def measure(self, new_tokens: int) -> dict[str, float]:
        """Seconds of prefill and of pure decoding.

        Prefill ends when the last sequence has its first token. Decoding counts from there until the first sequence
        has all of its tokens, so that every step counted decoded the whole batch and nothing else.
        """
        first = next(point for point in self.points if min(point[1]) >= 1)
        last = next(point for point in self.points if max(point[1]) >= new_tokens)
        if new_tokens > 1 and last[0] <= first[0]:
            raise SystemExit(f"no step decoded all {len(first[1])} sequences: {new_tokens} new tokens are too few")
        decoding = new_tokens > 1
        return {
            "prefill_seconds": first[0] - self.start,
            "decode_seconds": last[0] - first[0] if decoding else 0.0,
            "decode_tokens": sum(last[1]) - sum(first[1]) if decoding else 0,
            "total_seconds": self.points[-1][0] - self.start,
        }


def serve(prepare: Callable[[], Callable[[dict[str, Any]], EngineUnderTest]]) -> None:
    """Run the job on stdin and print its result as the only line on stdout.

    The job holds `prompts` and `warm_up` (lists of token ids), `new_tokens`, `seconds` (how long to go on measuring),
    `model`, `threads`, `max_context` and the `options` of the engine.

    Args:
        prepare: Imports the engine and returns what loads it for a job. Memory is counted from between the two on.
    """
    job: dict[str, Any] = json.load(sys.stdin)
    # Engines print, some from C++: all of that goes to stderr, and the result to what was stdout.
    result_file = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    load = prepare()
    rss_after_imports = peak_rss()
    start = time.perf_counter()
    engine = load(job)
    result = {"version": engine.version, "facts": engine.facts, "load_seconds": time.perf_counter() - start}
    engine.generate(job["warm_up"], min(job["new_tokens"], WARM_UP_TOKENS), Timeline())
    passes, tokens = _passes(engine, job)
    result |= {"passes": passes, "produced": [len(each) for each in tokens], "tokens": tokens[0][:TOKENS_SHOWN]}
    result |= {"rss_after_imports": rss_after_imports, "peak_rss": peak_rss()} | _median_pass(passes)
    result_file.write(json.dumps(result) + "\n")
    result_file.flush()
    # Some engines crash or hang while their threads are torn down. What was measured is out.
    os._exit(0)


def peak_rss() -> int:
    """Most memory that this program has had resident, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss would start from the peak of the process that this one was forked from.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _passes(engine: EngineUnderTest, job: dict[str, Any]) -> tuple[list[dict[str, float]], list[list[int]]]:
    """Short jobs are repeated, up to `MAX_PASSES` times, until they have taken `seconds` altogether."""
    passes: list[dict[str, float]] = []
    tokens: list[list[int]] = []
    while not passes or (len(passes) < MAX_PASSES and sum(each["total_seconds"] for each in passes) < job["seconds"]):
        timeline = Timeline()
        tokens = engine.generate(job["prompts"], job["new_tokens"], timeline)
        passes.append(timeline.measure(job["new_tokens"]))
    return passes, tokens


def _median_pass(passes: list[dict[str, float]]) -> dict[str, float]:
    """The pass of median speed, the slower one of two."""

    def seconds(each: dict[str, float]) -> float:
        return each["decode_seconds"] / each["decode_tokens"] if each["decode_tokens"] else each["prefill_seconds"]

    median = statistics.median_high([seconds(each) for each in passes])
    return next(each for each in passes if seconds(each) == median)
