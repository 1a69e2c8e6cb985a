"""How long does a device wait for Python between two steps, with steps one by one and with steps that overlap?

The real engine, scheduler, pages, packing and attention plan; the device is a clock. It computes one step after
another, each for `--step-ms`, beginning when it is launched or when the one before it ends, whichever is later. What
lies between is time in which it has nothing to do: Python that is exposed. No GPU is involved, so what a real one costs
beside (the launch of kernels, copies, the wake-up after an event) is not in these figures.

    uv run python benchmarks/overlap.py
    uv run python benchmarks/overlap.py --sequences 256 --step-ms 12
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass, field
from statistics import median, quantiles
from time import perf_counter

import torch

from aios_kvcache.attention_plan import AttentionPlanner
from aios_kvcache.block_manager import BlockManager
from aios_model.sampling.params import SamplingParams
from aios_model.sampling.rows import SampledToken
from aios_sched import Engine, FCFSQueue, Request, Scheduler, SchedulerConfig, SchedulerOutput, StepResult
from aios_sched.batch import pack
from aios_sched.overlapped_executor import OverlappedExecutor

BLOCK_SIZE, MAX_MODEL_LEN, VOCAB_SIZE = 16, 2048, 32_000
CPU = torch.device("cpu")


@dataclass
class ClockDevice:
    """A device whose steps take a fixed time, in the order of their launch.

    Attributes:
        step_seconds: How long each takes.
        idle_seconds: Time before each step in which it had nothing to do.
        vocab_size: Of the tokens that it makes up.
    """

    step_seconds: float
    idle_seconds: list[float] = field(default_factory=list)
    vocab_size: int = VOCAB_SIZE
    free_at: float = 0.0
    planner: AttentionPlanner = field(
        default_factory=lambda: AttentionPlanner(
            block_size=BLOCK_SIZE, window=None, max_group_keys=1 << 20, dtype=torch.float32, device=CPU
        )
    )

    def launch(self, output: SchedulerOutput) -> ClockStep:
        """Makes the tensors of a step and gives it to the clock."""
        batch = pack(output, device=CPU)
        self.planner.plan(batch.sequences)
        now = perf_counter()
        self.idle_seconds.append(max(0.0, now - self.free_at))
        self.free_at = max(now, self.free_at) + self.step_seconds
        return ClockStep(output, self.free_at)


@dataclass
class ClockStep:
    """A step that is done at a certain time."""

    output: SchedulerOutput
    done_at: float

    def result(self) -> StepResult:
        """Waits until then, spinning at the end as a waiting CUDA event does."""
        if (rest := self.done_at - perf_counter()) > 0.001:
            time.sleep(rest - 0.0005)
        while perf_counter() < self.done_at:
            pass
        sampled = {row.request_id: SampledToken(token_id=row.start % 1000 + 1) for row in self.output.requests}
        return StepResult(sampled=sampled)


def run(*, num_sequences: int, num_tokens: int, step_seconds: float, overlap: bool) -> ClockDevice:
    """Answers so many requests at once; -> the device, which knows how long it waited."""
    rng = random.Random(3)
    config = SchedulerConfig(
        max_num_seqs=num_sequences, max_num_batched_tokens=8192, max_model_len=MAX_MODEL_LEN, schedule_ahead=overlap
    )
    pages = BlockManager(num_blocks=num_sequences * MAX_MODEL_LEN // BLOCK_SIZE, block_size=BLOCK_SIZE)
    device = ClockDevice(step_seconds)
    executor = OverlappedExecutor(device)
    executor.max_steps_in_flight = 2 if overlap else 1
    engine = Engine(Scheduler(config, pages, FCFSQueue()), executor)
    for index in range(num_sequences):
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(64, 192))]
        params = SamplingParams(temperature=0, max_tokens=num_tokens)
        engine.add(Request(request_id=str(index), prompt_token_ids=prompt, params=params, seed=0, eos_token_ids=()))
    while engine.has_unfinished:
        engine.step()
    return device


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(given.repeats):
        for overlap, idle in found.items():
            device = run(
                num_sequences=given.sequences,
                num_tokens=given.tokens,
                step_seconds=given.step_ms / 1000,
                overlap=overlap,
            )
            idle += device.idle_seconds[5:]  # prompts, and what is slow the first time
    print(f"{given.sequences} sequences, steps of {given.step_ms:g} ms, {given.repeats} × {given.tokens} tokens each")
    print("steps         idle before a step, µs: median     p90     p99    mean")
    for overlap, idle in found.items():
        cuts = quantiles(idle, n=100)
        figures = [median(idle), cuts[89], cuts[98], sum(idle) / len(idle)]
        print(f"{'that overlap' if overlap else 'one by one':31}", *(f"{1e6 * each:7.0f}" for each in figures))


if __name__ == "__main__":
    main()
