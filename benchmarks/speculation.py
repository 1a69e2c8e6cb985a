"""Speculation against plain decoding: one stream on the bundled model, on text that repeats its prompt and other text.

Two engines in one process take turns at the same requests, in changing order, so that a drifting machine drifts for
both; what counts is the ratio of each pair. Prompts are in the prefix cache by then: what is measured is decoding. That
both give the same tokens is checked on the way.

    uv run python benchmarks/speculation.py                             # about two minutes
    uv run python benchmarks/speculation.py --pairs 15 --threads 2 --config '{"method": "ngram"}'
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

from aios_serve import InferenceEngine, SamplingParams

CODE = """class Basket:
    def __init__(self, owner):
        self.owner = owner
        self.items = []

    def add(self, name, price, quantity=1):
        if quantity < 1:
            raise ValueError("quantity must be positive")
        self.items.append((name, price, quantity))

    def total(self):
        amount = 0
        for name, price, quantity in self.items:
            amount += price * quantity
        return amount
"""
REPORT = (
    "The harbour of Port Anselm was closed for nine hours on Tuesday after a tanker lost its anchor in the main "
    "channel. Divers found the anchor at a depth of twenty-two metres, next to the cable that supplies the island with "
    "electricity. The harbour master, Elena Marsh, said that nobody was hurt and that the cable was not damaged. "
    "Eleven ships had to wait outside the breakwater, among them two ferries with four hundred passengers. The tanker "
    "will be inspected on Friday, and the company that owns it will have to pay for the divers."
)

WORKLOADS = {
    "edit of code": "Rename the method total to sum_of_prices and write down the whole class again.\n\n"
    f"```python\n{CODE}```",
    "quotes": f"Repeat the following report word for word, then say what it is about.\n\n{REPORT}",
    "summary": f"{REPORT}\n\nSummarize the report in three sentences. Quote it where you can.",
    "story": "Write a story about a lighthouse keeper who collects broken clocks.",
    "list of ideas": "Give me unusual ideas for a birthday party of a retired sailor, each in one sentence.",
}
SAMPLED = ("story", "list of ideas")
"""Greedy, so small a model soon repeats itself in a free text, and that would be a repeating workload, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One workload: seconds of each pair, and what became of the drafts."""

    workload: str
    plain: list[float]
    speculative: list[float]
    num_tokens: int
    acceptance: float
    tokens_per_step: float

    def ratio(self) -> tuple[float, float, float]:
        """Median of the pairs' ratios, and two bounds: the mean is above one and below the other, 95% sure each."""
        ratios = [plain / speculative for plain, speculative in zip(self.plain, self.speculative, strict=True)]
        draw = random.Random(0)
        means = sorted(statistics.fmean(draw.choices(ratios, k=len(ratios))) for _ in range(4000))
        return statistics.median(ratios), means[200], means[-200]


def main() -> None:
    """Measures and prints a table."""
    given = _arguments()
    options: dict[str, Any] = {"max_model_len": 1024, "threads": given.threads, "quantization": given.quantization}
    with InferenceEngine(**options) as plain, InferenceEngine(**options, speculative=given.config) as speculative:
        print(f"{platform.processor() or platform.machine()}, {plain.info.threads} threads, {plain.info.kernels}")
        print(
            f"weights {plain.info.quantization}, {json.dumps(given.config)}, "
            f"{given.pairs} pairs of {given.tokens} tokens"
        )
        print(
            f"{'workload':14} {'plain':>9} {'drafts':>9} {'ratio':>6} {'95% bounds':>11} "
            f"{'accepted':>9} {'tokens/step':>11}"
        )
        for workload in given.workloads:
            _print(_measure(workload, plain, speculative, given))


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument(
        "--config",
        type=json.loads,
        # Without the store: it would know each answer from the pair before.
        default={"method": "suffix", "suffix_store_tokens": 0},
    )
    return parser.parse_args()


def _measure(workload: str, plain: InferenceEngine, speculative: InferenceEngine, given: Any) -> Result:
    engines = {"plain": plain, "speculative": speculative}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    tokens: dict[str, list[int]] = {}
    before = speculative.stats()
    num_tokens = 0
    for number in range(given.pairs + 1):
        order = list(engines) if number % 2 else list(engines)[::-1]
        for name in order:
            elapsed, tokens[name] = _run(engines[name], workload, given, seed=number)
            seconds[name] += [elapsed] if number else []  # the first one warms up
        assert tokens["plain"] == tokens["speculative"], "drafts changed the output"
        num_tokens += len(tokens["plain"])
    after = speculative.stats()
    num_drafted = after.num_draft_tokens - before.num_draft_tokens
    num_accepted = after.num_accepted_tokens - before.num_accepted_tokens
    return Result(
        workload=workload,
        plain=seconds["plain"],
        speculative=seconds["speculative"],
        num_tokens=num_tokens // (given.pairs + 1),
        acceptance=num_accepted / num_drafted if num_drafted else 0.0,
        tokens_per_step=num_tokens / (after.num_steps - before.num_steps),
    )


def _run(engine: InferenceEngine, workload: str, given: Any, *, seed: int) -> tuple[float, list[int]]:
    params = SamplingParams(
        temperature=1.0 if workload in SAMPLED else 0.0, seed=seed, max_tokens=given.tokens, ignore_eos=True
    )
    started = time.perf_counter()
    (output,) = engine.chat([{"role": "user", "content": WORKLOADS[workload]}], params)
    return time.perf_counter() - started, output.outputs[0].token_ids


def _print(result: Result) -> None:
    median, low, high = result.ratio()
    plain, drafts = (result.num_tokens / statistics.median(each) for each in (result.plain, result.speculative))
    print(
        f"{result.workload:14} {plain:7.1f}/s {drafts:7.1f}/s {median:6.2f} {low:5.2f}–{high:5.2f} "
        f"{result.acceptance:9.0%} {result.tokens_per_step:11.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
