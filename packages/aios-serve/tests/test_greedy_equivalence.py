"""The bundled model answers as transformers does, through the whole engine, however its work is cut and shared.

The expected tokens are in `greedy_tokens.json`, which the tests of aios-model hold against a live transformers model.
"""

from __future__ import annotations

import bundled_oracle
import pytest

from aios_serve import InferenceEngine, SamplingParams

pytestmark = pytest.mark.slow

CASES = bundled_oracle.greedy_cases()
# The same answers, asked for in their middle: prompts of several pages, which can be chunked and found again.
SPLIT = 40


def expected(start: int = 0) -> list[list[int]]:
    return [case["token_ids"][start:] for case in CASES]


def prompts(start: int = 0) -> list[list[int]]:
    return [case["prompt_token_ids"] + case["token_ids"][:start] for case in CASES]


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def tokens(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def build(**options) -> InferenceEngine:
    return InferenceEngine(**{"device": "cpu", "dtype": "float32", "threads": 1, "max_model_len": 256, **options})


@pytest.fixture(scope="module")
def engine():
    with build(max_num_seqs=20) as engine:
        yield engine


def test_all_at_once(engine):
    assert tokens(engine.generate(prompts(), greedy(64))) == expected()


def test_each_alone(engine):
    assert [tokens(engine.generate([prompt], greedy(64)))[0] for prompt in prompts()] == expected()


def test_cold_and_then_cached(engine):
    for round_number in range(2):
        outputs = engine.generate(prompts(SPLIT), greedy(64 - SPLIT))
        assert tokens(outputs) == expected(SPLIT)
        if round_number:
            assert all(output.num_cached_tokens >= 32 for output in outputs)


def test_from_text(engine):
    outputs = engine.generate([case["prompt"] for case in CASES], greedy(8))
    assert tokens(outputs) == [answer[:8] for answer in expected()]


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 20},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 2048},
        {"kv_cache_policy": "contiguous"},
        {"block_size": 5, "threads": 2},
    ],
    ids=["chunked", "whole", "contiguous", "odd pages, two threads"],
)
def test_however_prompts_are_cut_and_kept(options):
    with build(max_num_seqs=20, **options) as engine:
        assert tokens(engine.generate(prompts(SPLIT), greedy(64 - SPLIT))) == expected(SPLIT)


def test_in_a_pool_so_small_that_requests_are_preempted():
    with build(max_num_seqs=20, max_model_len=128, num_gpu_blocks_override=30) as engine:
        assert tokens(engine.generate(prompts(), greedy(64))) == expected()
        assert engine.stats().num_preemptions > 0
        assert engine.stats().kv_cache_usage == 0.0


@pytest.mark.parametrize("seats", [20, 3])
def test_steps_that_overlap(monkeypatch, seats):
    """As on a GPU, which computes on its own: what is built for it, on a CPU that does not."""
    monkeypatch.setattr("aios_serve.build.is_asynchronous", lambda device: True)
    with build(max_num_seqs=seats) as engine:
        assert tokens(engine.generate(prompts(), greedy(64))) == expected()
        assert engine.stats().kv_cache_usage == 0.0


@pytest.mark.gpu
def test_on_a_cuda_device():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    with build(device="cuda", max_num_seqs=20) as engine:
        assert tokens(engine.generate(prompts(), greedy(64))) == expected()
