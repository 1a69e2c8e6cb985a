"""How much of the memory for keys and values holds none? Pages of several sizes, and one whole context per sequence.

The real scheduler and block manager in simulated time (`aios_sched.simulator`), one trace for all: ShareGPT-like
lengths, everything there at once, so that memory is what limits. The setting is that of figure 2 of the PagedAttention
paper (arXiv 2309.06180): a model of 13B weights in 16 bits on a GPU of 40 GB, contexts of 2,048 tokens, and the
definition is the paper's, too. Of all slots for one token's keys and values,

- *token states* are those that hold a token, those that the step computes included;
- *reserved* are taken by a sequence that will fill them later;
- *internal* fragmentation is taken by a sequence that will never fill them;
- *external* fragmentation is left between the last page and the end of the pool;
- *free* slots are in pages that nobody holds. They can be had, and are not waste; the other three are.

Means are over time, and the worst is that of a single step, while requests wait. (When the last one is alone, most of
its last page may be empty, and nobody lacks it.) A prompt gets all its pages when it is admitted, so those that several
steps read have reserved pages until then: that is what the worst steps show.

    uv run python benchmarks/page_waste.py                                  # about twenty seconds
    uv run python benchmarks/page_waste.py --plot docs/en/assets/page-waste.svg
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from aios_model.config import LayerSpec, ModelConfig
from aios_model.hardware import DATASHEETS
from aios_sched.simulator.arrivals import IndependentRequests, poisson
from aios_sched.simulator.fleet import Fleet
from aios_sched.simulator.roofline_cost import RooflineCost
from aios_sched.simulator.system import SystemConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_sched.simulator.cost import CostModel, StepShape
    from aios_sched.simulator.leaping_scheduler import LeapingScheduler

PAGE_SIZES = (8, 16, 32, 64)
CONTEXT, SEATS, STEP_TOKENS = 2048, 256, 2048
TARGET = 0.04  # of the pool; the paper's figure 2 has 96.3% token states in pages of 16
PARTS = ("token states", "reserved", "internal", "external", "free")
WASTED = ("reserved", "internal", "external")

MODEL = ModelConfig(
    architecture="llama",
    vocab_size=32_000,
    hidden_size=5120,
    intermediate_size=13_824,
    num_attention_heads=40,
    num_key_value_heads=40,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=CONTEXT,
    layers=(LayerSpec(num_key_value_heads=40, head_dim=128, window=None, scale=128**-0.5),) * 40,
)
DEVICE = replace(DATASHEETS["a100"], name="a100-40", memory_bytes=40e9, bandwidth=1.555e12)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one way to hand out the pool.

    Attributes:
        page_size: Tokens.
        shares: Of the pool, by PARTS: means over time; they add up to 1.
        of_taken: Wasted share of the pages in use: mean, and that of the worst step.
        of_pool: Wasted share of the pool, the same way.
        above_target: Share of the time in which that is more than TARGET.
        num_running: Sequences side by side, mean over time.
        tokens_per_s: Output tokens a second, predicted, over the whole trace.
        preemptions: Requests that had to give their pages back.
    """

    page_size: int
    shares: dict[str, float]
    of_taken: tuple[float, float]
    of_pool: tuple[float, float]
    above_target: float
    num_running: float
    tokens_per_s: float
    preemptions: int


def main() -> None:
    """Simulates, prints a table, draws it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page-sizes", type=int, nargs="+", default=PAGE_SIZES)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    cost = RooflineCost(config=MODEL, hardware=DEVICE)
    pool = cost.max_blocks(block_size=1)
    print(f"{args.requests:,} requests, a pool of {pool:,} tokens, contexts of {CONTEXT:,}, seed {args.seed}\n")
    print("| KV memory | wasted of the pages in use: mean | worst step | of the pool: mean | worst step | ", end="")
    print(f"time above {TARGET:.0%} | reserved | internal | external | side by side | output tokens/s | preemptions |")
    print("|---|" + "---:|" * 11)
    outcomes = {}
    for name, size in [*((f"pages of {size}", size) for size in args.page_sizes), ("contiguous", CONTEXT)]:
        outcomes[name] = run(trace(args.requests, args.seed), size, pool=pool, cost=cost)
        print(row(name, outcomes[name]), flush=True)
    if args.plot:
        args.plot.write_text(draw(outcomes), encoding="utf-8")


def trace(num_requests: int, seed: int) -> IndependentRequests:
    """Prompts and answers as long as ShareGPT's, all of them there from the start."""
    return IndependentRequests(times=poisson(math.inf), num_requests=num_requests, seed=seed, max_model_len=CONTEXT)


def run(requests: IndependentRequests, page_size: int, *, pool: int, cost: CostModel) -> Outcome:
    """Simulates the trace on a pool of so many tokens. A page of a whole context is the contiguous policy.

    So it is in the engine: see decision 0008.
    """
    system = SystemConfig(
        num_blocks=pool // page_size,
        block_size=page_size,
        max_num_seqs=SEATS,
        max_num_batched_tokens=STEP_TOKENS,
        max_model_len=CONTEXT,
        enable_prefix_caching=page_size < CONTEXT,
    )
    watch = Watch(cost, pool)
    fleet = Fleet(system, watch, leap=False)
    watch.scheduler = fleet.replicas[0].scheduler
    results = fleet.run(requests)
    assert results.num_finished == requests.num_requests, results.refusal
    return watch.outcome(tokens_per_s=results.num_output_tokens / results.seconds, preemptions=results.num_preemptions)


class Watch:
    """A cost model that looks at the pool when it is asked: a step is planned then, and nothing of it has ended."""

    scheduler: LeapingScheduler

    def __init__(self, cost: CostModel, pool: int) -> None:
        self._cost = cost
        self._pool = pool
        self._time = self._running_time = self._taken_time = self._time_above_target = 0
        self._part_times: dict[str, int] = dict.fromkeys(PARTS, 0)
        self._worst_of_taken = self._worst_of_pool = 0.0

    @property
    def host_time(self) -> int:
        """See CostModel."""
        return self._cost.host_time

    def decode_steps(self, *, num_sequences: int, num_context: int, count: int) -> Sequence[int]:
        """See CostModel. Nobody asks: steps are taken one by one."""
        return self._cost.decode_steps(num_sequences=num_sequences, num_context=num_context, count=count)

    def step(self, shape: StepShape) -> int:
        """See CostModel."""
        duration = self._cost.step(shape)
        if self.scheduler.num_waiting:
            self._add(self.count_slots(), duration)
        return duration

    def count_slots(self) -> dict[str, int]:
        """Slots of the pool, by PARTS."""
        pages, size = self.scheduler.block_manager, self.scheduler.block_manager.block_size
        counts: dict[str, int] = dict.fromkeys(PARTS, 0)
        for request in self.scheduler._planner.running:
            num_slots = len(pages.block_table(request.request_id)) * size
            num_held = request.num_computed_tokens + request.num_in_flight_tokens
            # The last token of an answer is never computed.
            num_final = len(request.prompt_token_ids) + (request.max_tokens or 0) - 1
            counts["token states"] += num_held
            counts["reserved"] += min(num_slots, num_final) - num_held
            counts["internal"] += num_slots - min(num_slots, num_final)
        counts["external"] = self._pool - pages.num_blocks * size
        counts["free"] = pages.num_free_blocks * size
        assert sum(counts.values()) == self._pool, f"slots that were lost, or have two owners: {counts}"
        return counts

    def outcome(self, *, tokens_per_s: float, preemptions: int) -> Outcome:
        """What was seen."""
        times, pool_time = self._part_times, self._time * self._pool
        return Outcome(
            page_size=self.scheduler.block_manager.block_size,
            shares={part: time / pool_time for part, time in times.items()},
            of_taken=((times["reserved"] + times["internal"]) / self._taken_time, self._worst_of_taken),
            of_pool=(sum(times[part] for part in WASTED) / pool_time, self._worst_of_pool),
            above_target=self._time_above_target / self._time,
            num_running=self._running_time / self._time,
            tokens_per_s=tokens_per_s,
            preemptions=preemptions,
        )

    def _add(self, counts: dict[str, int], duration: int) -> None:
        taken = counts["token states"] + counts["reserved"] + counts["internal"]
        of_taken = (counts["reserved"] + counts["internal"]) / taken
        of_pool = sum(counts[part] for part in WASTED) / self._pool
        self._time += duration
        self._running_time += self.scheduler.num_running * duration
        self._taken_time += taken * duration
        self._time_above_target += (of_pool > TARGET) * duration
        for part, count in counts.items():
            self._part_times[part] += count * duration
        self._worst_of_taken = max(self._worst_of_taken, of_taken)
        self._worst_of_pool = max(self._worst_of_pool, of_pool)


def row(name: str, outcome: Outcome) -> str:
    """A line of the table."""
    shares = [*outcome.of_taken, *outcome.of_pool, outcome.above_target, *(outcome.shares[part] for part in WASTED)]
    cells = [*(f"{share:.1%}" for share in shares), f"{outcome.num_running:.1f}", f"{outcome.tokens_per_s:,.0f}"]
    return f"| {name} | {' | '.join(cells)} | {outcome.preemptions:,} |"


# -- the plot ----------------------------------------------------------------------------------------------------------

WIDTH, LEFT, TOP, BAR, GAP = 760, 110, 70, 30, 16
COLOURS = dict(zip(PARTS, ("#1a7f37", "#e0a93b", "#d1603d", "#8c5a8c", "#e4e8ec"), strict=True))


def draw(outcomes: dict[str, Outcome]) -> str:
    """A bar for each: the pool and what its slots hold."""
    height = TOP + len(outcomes) * (BAR + GAP) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="12" role="img" aria-label="What the slots of the pool hold">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        '<text x="20" y="22" font-weight="bold">What the slots of the pool hold, mean over time</text>',
    ]
    for number, part in enumerate(PARTS):
        x = LEFT + number * 120
        parts.append(f'<rect x="{x}" y="38" width="12" height="12" fill="{COLOURS[part]}"/>')
        parts.append(f'<text x="{x + 18}" y="48">{part}</text>')
    for number, (name, outcome) in enumerate(outcomes.items()):
        parts += _bar(name, outcome, y=TOP + number * (BAR + GAP))
    return "\n".join([*parts, "</svg>", ""])


def _bar(name: str, outcome: Outcome, *, y: int) -> list[str]:
    marks = [f'<text x="{LEFT - 10}" y="{y + 20}" text-anchor="end">{name}</text>']
    x, room = float(LEFT), WIDTH - LEFT - 20
    for part, share in outcome.shares.items():
        width = share * room
        marks.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{COLOURS[part]}"/>')
        if width > 40:
            place = f'x="{x + width / 2:.1f}" y="{y + 20}" text-anchor="middle"'
            marks.append(f'<text {place} fill="{"#333" if part == "free" else "white"}">{share:.1%}</text>')
        x += width
    return marks


if __name__ == "__main__":
    main()
