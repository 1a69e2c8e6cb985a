"""How much output should admission expect? The same trace under three answers.

The real scheduler and block manager, no model. Requests arrive all at once, so that memory is what limits; prompts and
answers have long tails, and every request allows the whole rest of its context, as chat clients do. Pages are 16
tokens, and the pool holds a tenth of what all seats could fill.

    uv run python benchmarks/admission.py
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass

from aios_kvcache.block_manager import BlockManager
from aios_model.sampling.params import SamplingParams
from aios_model.sampling.rows import SampledToken
from aios_sched import Request, Scheduler, SchedulerConfig, StepResult, make_policy

MAX_MODEL_LEN = 4096
EOS, WORD = 0, 7
EXPECTATIONS = ("none", "estimated", "maximal")


@dataclass(frozen=True)
class Outcome:
    """What one run came to."""

    num_steps: int
    mean_running: float
    num_preemptions: int
    computed_again: float
    usage: float


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=1600)
    parser.add_argument("--seats", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| expected output | run at once | preemptions | tokens computed again | pool in use | steps |")
    print("|---|---|---|---|---|---|")
    for expectation in EXPECTATIONS:
        outcome = run(expectation, args.requests, args.blocks, args.seats, args.seed)
        print(
            f"| {expectation} | {outcome.mean_running:.1f} | {outcome.num_preemptions} | "
            f"{outcome.computed_again:.1%} | {outcome.usage:.1%} | {outcome.num_steps} |"
        )


def run(expectation: str, num_requests: int, num_blocks: int, num_seats: int, seed: int) -> Outcome:
    """Serves the trace; numbers are means over steps."""
    config = SchedulerConfig(
        max_num_seqs=num_seats,
        max_num_batched_tokens=512,
        max_model_len=MAX_MODEL_LEN,
        expected_output=expectation,  # type: ignore[arg-type]
    )
    pages = BlockManager(num_blocks=num_blocks, block_size=16, enable_prefix_caching=False)
    scheduler = Scheduler(config, pages, make_policy("fcfs", block_manager=pages))
    lengths = {}
    for request, num_tokens in trace(num_requests, seed):
        lengths[request.request_id] = num_tokens
        scheduler.add(request)
    needed = sum(num_tokens for num_tokens in lengths.values())
    num_steps, running, computed, usage = 0, 0, 0, 0.0
    done = dict.fromkeys(lengths, 0)
    while (step := scheduler.schedule()) is not None:
        sampled = {}
        for row in step.requests:
            if row.sampling is not None:
                done[row.request_id] += 1
                ends = done[row.request_id] == lengths[row.request_id]
                sampled[row.request_id] = SampledToken(token_id=EOS if ends else WORD)
        num_steps += 1
        running += scheduler.num_running
        usage += pages.usage
        computed += step.num_scheduled_tokens
        scheduler.update(step, StepResult(sampled=sampled))
    needed += scheduler.num_prompt_tokens - num_requests  # the last token of an answer is never computed
    return Outcome(
        num_steps=num_steps,
        mean_running=running / num_steps,
        num_preemptions=scheduler.num_preemptions,
        computed_again=computed / needed - 1,
        usage=usage / num_steps,
    )


def trace(num_requests: int, seed: int) -> list[tuple[Request, int]]:
    """Requests with the number of tokens each will generate: two tenants, one with short answers, one with long."""
    rng = random.Random(seed)
    requests = []
    for number in range(num_requests):
        tenant, typical = rng.choice([("short", 60), ("long", 400)])
        num_prompt = min(1500, max(8, int(rng.lognormvariate(5.3, 0.9))))
        num_tokens = min(MAX_MODEL_LEN - num_prompt, max(1, int(rng.lognormvariate(0.0, 0.7) * typical)))
        request = Request(
            request_id=f"r{number}",
            prompt_token_ids=[WORD] * num_prompt,
            params=SamplingParams(max_tokens=None),
            seed=0,
            eos_token_ids=(EOS,),
            tenant=tenant,
        )
        requests.append((request, num_tokens))
    return requests


if __name__ == "__main__":
    main()
