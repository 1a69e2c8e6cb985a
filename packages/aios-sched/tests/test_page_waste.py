"""How much of the pool holds no keys and values: at most 4% in pages of 16 tokens.

`benchmarks/page_waste.py` counts, so that the table in docs/en/memory.md and this test cannot mean different things.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from aios_sched.simulator.cost import LinearCost
from aios_sched.simulator.trace import TraceRequest

CONTIGUOUS = 2048


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[3] / "benchmarks" / "page_waste.py"
    spec = importlib.util.spec_from_file_location("page_waste_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


class Listed:
    """A trace that is written down."""

    def __init__(self, *requests):
        self._requests, self.num_requests = requests, len(requests)

    def arrivals(self):
        yield from self._requests

    def follow_up(self, request, *, finished_s):
        return None


def request(number, *, prompt, output):
    return TraceRequest(arrival_s=0.0, num_prompt_tokens=prompt, num_output_tokens=output, stream=number)


def test_at_most_four_percent_of_the_pool_are_wasted_on_mixed_lengths(benchmark):
    cost = benchmark.RooflineCost(config=benchmark.MODEL, hardware=benchmark.DEVICE)
    pool, trace = cost.max_blocks(block_size=1), benchmark.trace(300, random.randrange(2**32))
    paged = benchmark.run(trace, 16, pool=pool, cost=cost)
    assert paged.of_pool[0] <= 0.04, trace.seed
    assert paged.of_taken[0] <= 0.04, trace.seed
    assert paged.above_target <= 0.05, trace.seed  # the first steps of a burst, while its prompts are read
    contiguous = benchmark.run(trace, CONTIGUOUS, pool=pool, cost=cost)
    assert contiguous.of_pool[0] > 0.5, trace.seed
    assert paged.num_running > 2 * contiguous.num_running, trace.seed
    assert paged.tokens_per_s > 1.5 * contiguous.tokens_per_s, trace.seed


def test_larger_pages_waste_more(benchmark):
    cost = LinearCost(step_s=0.01)
    outcomes = [benchmark.run(benchmark.trace(150, 3), size, pool=8192, cost=cost) for size in (8, 32, 128)]
    wasted = [outcome.of_pool[0] for outcome in outcomes]
    assert wasted == sorted(wasted)
    for outcome in outcomes:
        assert sum(outcome.shares.values()) == pytest.approx(1)
    ET.fromstring(benchmark.draw({"pages": outcomes[0]}))


def test_slots_are_told_apart_as_on_paper(benchmark):
    """Two requests of 10 + 3 tokens, a pool of 20 slots, pages of 16: one runs, one waits, and four slots fit no page.

    While the other waits, three steps hold 10, 11 and 12 tokens; the thirteenth is never stored. So of the page's 16
    slots 2, 1 and 0 are reserved for what comes, and 4 will never be filled.
    """
    trace = Listed(request(0, prompt=10, output=3), request(1, prompt=10, output=3))
    outcome = benchmark.run(trace, 16, pool=20, cost=LinearCost(step_s=0.1))
    expected = {"token states": 11, "reserved": 1, "internal": 4, "external": 4, "free": 0}
    assert outcome.shares == pytest.approx({part: slots / 20 for part, slots in expected.items()})
    assert outcome.of_taken == pytest.approx((5 / 16, 6 / 16))
    assert outcome.of_pool == pytest.approx((9 / 20, 10 / 20))
    assert outcome.above_target == 1
    assert outcome.num_running == 1
