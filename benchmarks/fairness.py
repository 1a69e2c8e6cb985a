"""One tenant floods: what do the others notice, under each policy?

The real scheduler and block manager, no model: time is simulated, and every step takes `STEP_SECONDS`. Four tenants
have equal shares of what the engine can do. In the quiet run each asks for `--load` of its share; in the flood, one of
them asks for ten times its share. Arrivals are Poisson, prompts and answers have long tails; the same seeds give the
same requests in every run. What the other three get is printed as a table and drawn as an SVG file.

    uv run python benchmarks/fairness.py --plot docs/en/assets/fairness.svg
"""

from __future__ import annotations

import argparse
import random
from collections import deque
from dataclasses import dataclass, field
from math import log10
from pathlib import Path
from statistics import fmean, quantiles

from aios_kvcache.block_manager import BlockManager
from aios_model.sampling.params import SamplingParams
from aios_model.sampling.rows import SampledToken
from aios_sched import Request, Scheduler, SchedulerConfig, StepResult, make_policy

STEP_SECONDS = 0.025
NUM_SEATS, STEP_TOKENS = 64, 512
MEAN_PROMPT, MEAN_OUTPUT = 350, 80
TENANTS = ("flood", "anna", "ben", "cleo")
OTHERS = TENANTS[1:]
POLICIES = ("fcfs", "priority", "prefix", "fair")


@dataclass(frozen=True)
class Arrival:
    """A request to come: when, whose, and how many tokens it has and will generate."""

    time: float
    tenant: str
    num_prompt: int
    num_output: int


@dataclass
class Served:
    """What a tenant got: seconds to the first token of each request, and tokens generated."""

    first_token_seconds: list[float] = field(default_factory=list)
    num_tokens: int = 0

    def row(self, seconds: float) -> tuple[float, float, float]:
        """Tokens per second, mean and 95th percentile of the seconds to the first token."""
        waits = self.first_token_seconds or [float("nan")] * 2
        return self.num_tokens / seconds, fmean(waits), quantiles(waits, n=20)[-1]


def main() -> None:
    """Run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", type=float, default=0.9, help="what each tenant asks for, as a part of its share")
    parser.add_argument("--flood", type=float, default=10.0, help="what the flooding one asks for, in shares")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    share = capacity() / len(TENANTS)
    print(f"share of a tenant: {share:.2f} requests/s; quiet: {args.load:g} of it each; flood: {args.flood:g} shares\n")
    print("| policy | run | tokens/s of the others | TTFT mean | TTFT p95 | tokens/s of the flooding one |")
    print("|---|---|---|---|---|---|")
    bars = {}
    for policy in POLICIES:
        for run_name, rate in (("quiet", args.load), ("flood", args.flood)):
            rates = dict.fromkeys(TENANTS, share * args.load) | {"flood": share * rate}
            served = run(policy, arrivals(rates, args.seconds, args.seed), args.seconds)
            rows = [served[tenant].row(args.seconds) for tenant in OTHERS]
            speed, mean, p95 = (fmean(column) for column in zip(*rows, strict=True))
            bars[policy, run_name] = (speed, mean)
            flooding = served["flood"].row(args.seconds)[0]
            print(f"| {policy} | {run_name} | {speed:.0f} | {mean:.3f} s | {p95:.3f} s | {flooding:.0f} |", flush=True)
        (quiet_speed, quiet_ttft), (speed, ttft) = bars[policy, "quiet"], bars[policy, "flood"]
        print(f"| {policy} | change | {speed / quiet_speed - 1:+.1%} | {ttft / quiet_ttft - 1:+.1%} | | |", flush=True)
    if args.plot:
        args.plot.write_text(draw(bars), encoding="utf-8")


def capacity() -> float:
    """Requests per second, limited by seats or by tokens per step, whichever is less."""
    by_seats = NUM_SEATS / (MEAN_OUTPUT + MEAN_PROMPT / STEP_TOKENS)
    by_tokens = STEP_TOKENS / (MEAN_PROMPT + MEAN_OUTPUT)
    return min(by_seats, by_tokens) / STEP_SECONDS


def arrivals(rates: dict[str, float], seconds: float, seed: int) -> deque[Arrival]:
    """Poisson arrivals of each tenant, with a random generator of its own, so that one's rate changes only its own."""
    found = []
    for tenant, rate in rates.items():
        rng, time = random.Random(f"{seed} {tenant}"), 0.0
        while (time := time + rng.expovariate(rate)) < seconds:
            num_prompt = min(2000, 1 + int(rng.expovariate(1 / MEAN_PROMPT)))
            num_output = min(600, 1 + int(rng.expovariate(1 / MEAN_OUTPUT)))
            found.append(Arrival(time, tenant, num_prompt, num_output))
    return deque(sorted(found, key=lambda arrival: arrival.time))


def run(policy: str, todo: deque[Arrival], seconds: float) -> dict[str, Served]:
    """Serves arrivals until the time is up; what is waiting then has waited until then."""
    pages = BlockManager(num_blocks=4000, block_size=16)
    config = SchedulerConfig(max_num_seqs=NUM_SEATS, max_num_batched_tokens=STEP_TOKENS, max_model_len=4096)
    scheduler = Scheduler(config, pages, make_policy(policy, block_manager=pages))  # type: ignore[arg-type]
    served = {tenant: Served() for tenant in TENANTS}
    unanswered: dict[str, Arrival] = {}
    whose: dict[str, str] = {}
    now, count = 0.0, 0
    while now < seconds:
        while todo and todo[0].time <= now:
            arrival = todo.popleft()
            request = request_of(f"r{count}", arrival)
            unanswered[request.request_id], whose[request.request_id] = arrival, arrival.tenant
            scheduler.add(request)
            count += 1
        step = scheduler.schedule()
        now += STEP_SECONDS
        if step is None:
            continue
        sampled = {row.request_id: SampledToken(token_id=7) for row in step.requests if row.sampling is not None}
        scheduler.update(step, StepResult(sampled=sampled))
        for request_id in sampled:
            tenant = served[whose[request_id]]
            tenant.num_tokens += 1
            if (arrival := unanswered.pop(request_id, None)) is not None:
                tenant.first_token_seconds.append(now - arrival.time)
    for arrival in unanswered.values():
        served[arrival.tenant].first_token_seconds.append(seconds - arrival.time)
    return served


def request_of(request_id: str, arrival: Arrival) -> Request:
    """A request whose prompt nobody shares."""
    rng = random.Random(request_id)
    return Request(
        request_id=request_id,
        prompt_token_ids=[rng.randrange(2**30), *range(1, arrival.num_prompt)],
        params=SamplingParams(max_tokens=arrival.num_output, ignore_eos=True),
        seed=0,
        eos_token_ids=(),
        arrival_time=arrival.time,
        tenant=arrival.tenant,
    )


# -- the plot ----------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, BASE = 760, 300, 60, 240
COLOURS = {"quiet": "#7aa6c2", "flood": "#d1603d"}


def draw(bars: dict[tuple[str, str], tuple[float, float]]) -> str:
    """Two panels of bars: tokens per second, and seconds to the first token on a logarithmic scale."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    most = max(speed for speed, _ in bars.values())
    panels = (
        ("tokens/s of each other tenant", 0, lambda value: value / most, "{:.0f}"),
        ("mean seconds to their first token (logarithmic)", 1, _logarithmic, "{:.2f}"),
    )
    for panel, (title, index, height_of, form) in enumerate(panels):
        left = LEFT + panel * WIDTH / 2
        parts.append(f'<text x="{left - 30}" y="20" font-weight="bold">{title}</text>')
        for position, policy in enumerate(POLICIES):
            x = left + position * 78
            parts.append(f'<text x="{x + 25}" y="{BASE + 18}" text-anchor="middle">{policy}</text>')
            for side, run_name in enumerate(("quiet", "flood")):
                value = bars[policy, run_name][index]
                parts += _bar(x + side * 26, height_of(value) * 190, form.format(value), COLOURS[run_name])
    for side, run_name in enumerate(("quiet", "flood")):
        x = LEFT + side * 100
        parts.append(f'<rect x="{x}" y="{HEIGHT - 25}" width="12" height="12" fill="{COLOURS[run_name]}"/>')
        parts.append(f'<text x="{x + 18}" y="{HEIGHT - 15}">{run_name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _bar(x: float, height: float, label: str, colour: str) -> list[str]:
    return [
        f'<rect x="{x:.0f}" y="{BASE - height:.0f}" width="24" height="{height:.0f}" fill="{colour}"/>',
        f'<text x="{x + 12:.0f}" y="{BASE - height - 4:.0f}" text-anchor="middle" font-size="10">{label}</text>',
    ]


def _logarithmic(seconds: float) -> float:
    """10 ms to 1,000 s, as a height from 0 to 1."""
    return min(1.0, max(0.02, (log10(seconds) + 2) / 5))


if __name__ == "__main__":
    main()
