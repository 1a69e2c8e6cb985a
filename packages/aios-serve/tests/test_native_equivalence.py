"""With native kernels the answer to a prompt is the same, token for token, whatever happens around it.

Bitwise kernels make this a plain comparison: there is no margin between logits to hope for. What is compared is each
prompt's answer alone, in a roomy pool, on one thread.
"""

from __future__ import annotations

import random
from dataclasses import replace

import bundled_oracle
import pytest

from aios_model.native import native_status
from aios_serve import InferenceEngine, SamplingParams
from aios_serve.assembly import scheduler_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not native_status().available, reason=native_status().reason),
]

LENGTH = 24
BACKENDS = {
    "as stored": {},
    "int8": {"quantization": "int8"},
    "int4, int8 pages": {"quantization": "int4", "kv_cache_dtype": "int8"},
    "fp8 pages": {"kv_cache_dtype": "fp8"},
    "bfloat16": {"dtype": "bfloat16", "quantization": "none"},
}


@pytest.fixture(autouse=True)
def crowded(monkeypatch) -> None:
    """Admission that expects no output: otherwise it would foresee the pressure that these tests are to make."""

    def careless(*args, **options):
        return replace(scheduler_config(*args, **options), expected_output="none")

    for root in ("build", "build_parallel"):
        monkeypatch.setattr(f"aios_serve.{root}.scheduler_config", careless)


def build(**options) -> InferenceEngine:
    return InferenceEngine(**{"device": "cpu", "threads": 1, "max_model_len": 384, **options})


def prompts() -> list[list[int]]:
    """Short ones, long ones, and several that begin alike."""
    cases = [case["prompt_token_ids"] + case["token_ids"] for case in bundled_oracle.greedy_cases()]
    shared = cases[0] + cases[1]
    return [*cases[2:7], shared[:90], shared + cases[7][:20], shared + cases[8], cases[9] + cases[10] + cases[11]]


def params(index: int) -> SamplingParams:
    """Every third request samples, with a seed of its own."""
    if index % 3:
        return SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    return SamplingParams(temperature=0.9, top_p=0.95, seed=index, max_tokens=LENGTH, ignore_eos=True)


def answers(engine: InferenceEngine, order: list[int]) -> dict[int, list[int]]:
    all_prompts = prompts()
    outputs = engine.generate([all_prompts[i] for i in order], [params(i) for i in order])
    return {i: output.outputs[0].token_ids for i, output in zip(order, outputs, strict=True)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_do_not_depend_on_what_else_happens(backend) -> None:
    options = BACKENDS[backend]
    order = list(range(len(prompts())))
    with build(**options) as engine:
        assert engine.info.quantization == options.get("quantization", "as-stored")
        assert "native" in engine.info.kernels
        alone = {i: answers(engine, [i])[i] for i in order}
        assert answers(engine, order) == alone, "all at once, from the prefix cache"
        assert answers(engine, order[::-1]) == alone, "in another order"
    with build(**options, threads=2, max_num_batched_tokens=20, max_num_seqs=5) as engine:
        assert answers(engine, order) == alone, "chunked, two threads"
    with build(**options, enable_chunked_prefill=False, enable_prefix_caching=False, block_size=32) as engine:
        assert answers(engine, order) == alone, "whole prompts, larger pages"
    with build(**options, num_gpu_blocks_override=30, max_num_batched_tokens=64) as engine:
        assert answers(engine, order) == alone, "in a pool that forces preemption"
        assert engine.stats().num_preemptions > 0
        assert engine.stats().kv_cache_usage == 0.0
    for tiers in (
        {"kv_offloading_size": 64 << 20},
        {"kv_offloading_size": 3 << 20, "kv_offloading_disk_size": 99 << 20},
    ):
        pool = {"num_gpu_blocks_override": 26, "max_num_batched_tokens": 64, "preemption_mode": "swap"}
        with build(**options, **pool, **tiers) as engine:
            assert answers(engine, order) == alone, "swapped"
            assert answers(engine, order[::-1]) == alone, "found below the pool"
            stats = engine.stats()
            assert min(stats.num_swap_preemptions, stats.tier_cache_hits) > 0
            assert (stats.num_pages_lost, stats.kv_cache_usage) == (0, 0.0)


def test_random_schedules() -> None:
    """Random engines and workloads; `seed` is printed where one fails."""
    with build() as engine:
        alone = {i: answers(engine, [i])[i] for i in range(len(prompts()))}
    for _ in range(3):
        seed = random.randrange(10**6)
        draw = random.Random(seed)
        options = {
            "threads": draw.choice([1, 2, 3]),
            "max_num_seqs": draw.choice([1, 3, 9]),
            "max_num_batched_tokens": draw.choice([9, 33, 100, 400]),
            "num_gpu_blocks_override": draw.choice([24, 40, 200]),
            "enable_prefix_caching": draw.choice([True, False]),
        }
        order = draw.sample(range(len(prompts())), len(prompts()))
        with build(**options) as engine:
            assert answers(engine, order) == alone, (seed, options)
