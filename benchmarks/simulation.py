"""The simulator against the engine it simulates: the same traces, on the bundled model and in simulated time.

    uv run python benchmarks/simulation.py                                  # about two minutes
    uv run python benchmarks/simulation.py --cost cost.json --plot validation.svg --json validation.json

First the engine runs requests of random lengths while every step is timed; a cost model is fitted to that
(`aios_sched.simulator.fitting`). Then traces with other seeds run on the engine, at a moderate load and beyond its
capacity, and in the simulator with the fitted model. The machine's speed drifts, so a part of the calibration runs
before, between and behind the traces. `--cost` writes the fitted model, for `aios-sched simulate --cost`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aios_model.sampling.params import SamplingParams
from aios_sched.request import Request
from aios_sched.simulator.arrivals import IndependentRequests, poisson
from aios_sched.simulator.cost import StepShape
from aios_sched.simulator.fitting import Fit, MeasuredStep, fit, save_cost
from aios_sched.simulator.fleet import Fleet
from aios_sched.simulator.lengths import LogNormalLengths
from aios_sched.simulator.plots import Line, panel, stack
from aios_sched.simulator.system import SystemConfig
from aios_serve import InferenceEngine

if TYPE_CHECKING:
    from aios_sched.engine import Engine
    from aios_sched.output import SchedulerOutput
    from aios_sched.simulator.results import Results
    from aios_sched.stats import RequestTiming, StepStats

SEATS, CONTEXT = 16, 1024
PROMPTS = LogNormalLengths(mean=96, sigma=0.9, low=4, high=512)
OUTPUTS = LogNormalLengths(mean=64, sigma=0.8, low=2, high=256)


def trace(rate: float, count: int, seed: int) -> IndependentRequests:
    """Requests of the lengths above."""
    return IndependentRequests(
        times=poisson(rate), num_requests=count, seed=seed, prompts=PROMPTS, outputs=OUTPUTS, max_model_len=CONTEXT
    )


@dataclass
class Measured:
    """What a run on the real engine took: its requests, its steps, and seconds from the first arrival to the end."""

    timings: list[RequestTiming]
    steps: list[MeasuredStep]
    seconds: float


class Recorder:
    """An executor that notes the shape of each step, and a listener that notes when requests end."""

    def __init__(self, engine: Engine) -> None:
        self._executor = engine._executor
        self.shapes: deque[StepShape] = deque()
        self.timings: list[RequestTiming] = []
        engine._executor = self
        engine._listeners = (*engine._listeners, self)

    max_steps_in_flight = property(lambda self: self._executor.max_steps_in_flight)
    vocab_size = property(lambda self: self._executor.vocab_size)

    def submit(self, output: SchedulerOutput) -> Any:
        """The step's shape, as the cost model sees it."""
        rows = [(row.start, len(row.token_ids)) for row in output.requests]
        pairs = sum(count * start + count * (count + 1) // 2 for start, count in rows)
        context = sum(start + count for start, count in rows)
        self.shapes.append(StepShape(output.num_scheduled_tokens, len(rows), context, pairs))
        return self._executor.submit(output)

    def on_step(self, stats: StepStats) -> None:
        """See StatsListener."""

    def on_finished(self, timing: RequestTiming) -> None:
        """See StatsListener."""
        self.timings.append(timing)


def run_for_real(engine: Engine, recorder: Recorder, requests: IndependentRequests) -> Measured:
    """Feeds a trace to the engine in real time."""
    recorder.timings.clear()
    waiting = deque(requests.arrivals())
    steps = []
    start = time.monotonic()
    while waiting or engine.has_unfinished:
        begun = time.monotonic()
        while waiting and start + waiting[0].arrival_s <= begun:
            each = waiting.popleft()
            engine.add(as_request(each.stream, each.num_prompt_tokens, each.num_output_tokens, start + each.arrival_s))
        if engine.has_unfinished:
            engine.step()
            steps.append(MeasuredStep(shape=recorder.shapes.popleft(), seconds=time.monotonic() - begun))
        else:
            time.sleep(max(0.0, min(0.002, start + waiting[0].arrival_s - begun)))
    return Measured(list(recorder.timings), steps, time.monotonic() - start)


def as_request(number: int, num_prompt: int, num_output: int, arrival: float) -> Request:
    """Random tokens, greedily continued, the end of sequence ignored."""
    tokens = random.Random(number)
    return Request(
        request_id=f"{number}-{arrival}",
        prompt_token_ids=[tokens.randrange(100, 49_000) for _ in range(num_prompt)],
        params=SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True),
        seed=0,
        eos_token_ids=(),
        arrival_time=arrival,
    )


def calibrate(engine: Engine, recorder: Recorder, seed: int) -> list[MeasuredStep]:
    """Steps of all shapes that occur: alone, in some company, and full."""
    steps = []
    for rate, count in ((1.5, 8), (6.0, 25), (math.inf, 45)):
        steps += run_for_real(engine, recorder, trace(rate, count, seed)).steps
    return steps


def compare(name: str, measured: Measured, predicted: Results) -> dict[str, Any]:
    """Figures of both, and how far the prediction is off."""
    tokens = sum(each.num_generation_tokens for each in measured.timings)
    ttft = [each.first_token_seconds or 0.0 for each in measured.timings]
    e2e = [each.total_seconds for each in measured.timings]
    tpot = [
        (each.decode_seconds or 0.0) / (each.num_generation_tokens - 1)
        for each in measured.timings
        if each.num_generation_tokens > 1
    ]
    real = {"output tokens/s": tokens / measured.seconds, "requests/s": len(e2e) / measured.seconds}
    guess = {
        "output tokens/s": predicted.num_output_tokens / predicted.seconds,
        "requests/s": predicted.num_finished / predicted.seconds,
    }
    for label, values in (("ttft", ttft), ("tpot", tpot), ("e2e", e2e)):
        for percent in (50, 95):
            real[f"{label} p{percent}, s"] = rank(values, percent)
            guess[f"{label} p{percent}, s"] = predicted.percentile(label, percent) or 0.0
    errors = {label: guess[label] / real[label] - 1 for label in real}
    return {"scenario": name, "measured": real, "predicted": guess, "error": errors, "e2e": sorted(e2e)}


def rank(values: list[float], percent: float) -> float:
    """A percentile by nearest rank."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def plot(rows: list[tuple[dict[str, Any], Results]]) -> str:
    """Of each scenario the end-to-end latencies, measured and predicted."""
    panels = []
    for row, predicted in rows:
        guess = sorted(predicted.times["e2e"])
        lines = [
            Line(name=label, points=[(value, (i + 1) / len(values)) for i, value in enumerate(values)])
            for label, values in (("measured", row["e2e"]), ("predicted", guess))
        ]
        title = f"{row['scenario']}: throughput predicted {row['error']['output tokens/s']:+.1%}"
        panels.append(
            panel(lines, title=title, x_title="end to end, seconds", y_title="share of the requests", logarithmic=True)
        )
    return stack(panels)


def main() -> None:
    """Calibrate, run, simulate, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", type=Path, help="write the fitted cost model here")
    parser.add_argument("--plot", type=Path, help="write the comparison as SVG here")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--scale", type=float, default=1.0, help="of the lengths of the traces")
    args = parser.parse_args()
    with InferenceEngine(max_batch_size=SEATS, max_model_len=CONTEXT) as engine:
        inner, info = engine._port._engine, engine.info
        recorder = Recorder(inner)
        run_for_real(inner, recorder, trace(math.inf, 20, 99))  # warm-up
        steps = calibrate(inner, recorder, seed=1)
        scenarios = [("moderate", trace(3.0, round(75 * args.scale), 11))]
        scenarios.append(("saturation", trace(30.0, round(150 * args.scale), 12)))
        runs = []
        for seed, (name, requests) in enumerate(scenarios, start=2):
            runs.append((name, requests, run_for_real(inner, recorder, requests)))
            steps += calibrate(inner, recorder, seed)
        system = SystemConfig(
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            max_model_len=info.max_model_len,
        )
        threads, kernels = info.threads, info.kernels
    fitted = fit(steps)
    rows = [(name, measured, Fleet(system, fitted.cost).run(requests)) for name, requests, measured in runs]
    compared = [(compare(name, measured, predicted), predicted) for name, measured, predicted in rows]
    about = {
        "model": info.model_name,
        "machine": f"{platform.machine()}, {threads} threads, {kernels}",
        "python": platform.python_version(),
    }
    report(fitted, [row for row, _ in compared], about)
    if args.cost:
        save_cost(args.cost, fitted, about=about)
    if args.plot:
        args.plot.write_text(plot(compared), encoding="utf-8")
    if args.json:
        figures = [{key: value for key, value in row.items() if key != "e2e"} for row, _ in compared]
        args.json.write_text(json.dumps({"about": about, "rows": figures}, indent=2) + "\n", encoding="utf-8")


def report(fitted: Fit, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Markdown, for the documentation."""
    print(f"{about['model']}, {about['machine']}")
    print(
        f"cost model: {fitted.num_steps} steps, median error {fitted.median_error:.1%}, sum {fitted.total_error:+.1%}"
    )
    print(replace(fitted.cost))
    for row in rows:
        print(f"\n| {row['scenario']} | measured | predicted | error |\n|---|---|---|---|")
        for name in row["measured"]:
            print(
                f"| {name} | {row['measured'][name]:.4g} | {row['predicted'][name]:.4g} | {row['error'][name]:+.1%} |"
            )


if __name__ == "__main__":
    main()
