"""The bundled model on several ranks: the tokens of one device, whatever happens around a request.

Nine query heads on three kv heads: no even share for two ranks, or four. Sums over ranks round otherwise than those of
one device, so where two tokens are within 1e-3 of each other either may win; anything else is a bug.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import bundled_oracle
import checkpoints
import pytest

from aios_model.errors import ConfigError
from aios_model.native import native_status
from aios_model.weights.bundled import find_bundled_model
from aios_parallel.errors import RankFailedError
from aios_serve import InferenceEngine, SamplingParams
from aios_serve.assembly import scheduler_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not native_status().available, reason=native_status().reason),
]

LENGTH, MARGIN = 40, 1e-3
# Inputs and pages stay floats: what is rounded may fall to either side of a tie, and then no margin means anything.
BACKENDS = {
    "float32": {"dtype": "float32"},
    "as stored": {"quantization": "as-stored-a16", "kv_cache_dtype": "float32"},
    "int8": {"quantization": "int8-a16", "kv_cache_dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16", "quantization": "none", "kv_cache_dtype": "float32"},
}


@pytest.fixture(autouse=True)
def crowded(monkeypatch) -> None:
    """Admission that expects no output: otherwise it would foresee the pressure that these tests are to make."""

    def careless(*args, **options):
        return replace(scheduler_config(*args, **options), expected_output="none")

    for root in ("build", "build_parallel"):
        monkeypatch.setattr(f"aios_serve.{root}.scheduler_config", careless)


def build(**options) -> InferenceEngine:
    given = {"device": "cpu", "threads": 1, "max_model_len": 256, "num_gpu_blocks_override": 20, "max_num_seqs": 8}
    return InferenceEngine(**{**given, **options})


def prompts() -> list[list[int]]:
    """Some begin alike, and together they need more pages than there are."""
    cases = [case["prompt_token_ids"] + case["token_ids"] for case in bundled_oracle.greedy_cases()]
    shared = cases[0] + cases[1]
    return [shared[:40], *(case[:45] for case in cases[2:7]), shared[:32] + cases[7][:9], shared[:45]]


def run(engine: InferenceEngine):
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=2)
    return [output.outputs[0] for output in engine.generate(prompts(), params)]


@cache
def expected(backend: str):
    with build(**BACKENDS[backend], num_gpu_blocks_override=400) as engine:
        return run(engine)


def margin(output, place: int) -> float:
    (_, first), (_, second) = output.logprobs[place].top
    return first - second


def check(engine: InferenceEngine, backend: str) -> None:
    for got, wanted in zip(run(engine), expected(backend), strict=True):
        if got.token_ids != wanted.token_ids:
            pairs = zip(got.token_ids, wanted.token_ids, strict=True)
            place = next(place for place, (a, b) in enumerate(pairs) if a != b)
            assert margin(wanted, place) < MARGIN, (place, margin(wanted, place), got.token_ids, wanted.token_ids)
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.prefix_cache_hits > 0
    assert stats.kv_cache_usage == 0


@pytest.mark.parametrize(
    ("backend", "tensor", "pipeline"),
    [
        ("float32", 2, 1),
        ("as stored", 2, 1),
        ("as stored", 3, 1),
        ("as stored", 4, 1),
        ("as stored", 1, 3),
        ("as stored", 2, 2),
        ("int8", 2, 1),
        ("bfloat16", 2, 1),
    ],
)
def test_tokens_are_those_of_one_device(backend, tensor, pipeline) -> None:
    with build(**BACKENDS[backend], tensor_parallel=tensor, pipeline_parallel=pipeline) as engine:
        assert (engine.info.tensor_parallel, engine.info.pipeline_parallel) == (tensor, pipeline)
        check(engine, backend)


@pytest.mark.parametrize("options", [{}, {"quantization": "int8", "kv_cache_dtype": "int8"}], ids=["default", "int8"])
def test_answers_of_a_group_do_not_depend_on_what_else_happens(options) -> None:
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    with build(tensor_parallel=2, **options) as engine:
        alone = [engine.generate([prompt], params)[0].outputs[0].token_ids for prompt in prompts()]
        together = [output.outputs[0].token_ids for output in engine.generate(prompts(), params)]
        assert together == alone
        assert engine.stats().num_preemptions > 0


@pytest.mark.parametrize(
    "options", [{"expert_parallel": True}, {}, {"pipeline_parallel": 2, "expert_parallel": True}], ids=str
)
def test_experts_on_ranks_give_the_tokens_of_one_device(tmp_path, options) -> None:
    folder = checkpoints.save_safetensors(checkpoints.random_model("qwen3-moe", seed=3), tmp_path, sharded=False)
    tokenizer = str(find_bundled_model())
    prompts = [[5, 7, 11, 13, 17], [19, 23, 29], [31, 37, 41, 43]]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    given = {"model": folder, "tokenizer": tokenizer, "max_model_len": 64, "quantization": "int8-a16"}
    given["kv_cache_dtype"] = "float32"
    with build(**given) as engine:
        wanted = [output.outputs[0].token_ids for output in engine.generate(prompts, params)]
    with build(**given, tensor_parallel=2, **options) as engine:
        assert [output.outputs[0].token_ids for output in engine.generate(prompts, params)] == wanted
        load = engine.expert_load()
    # Layers 0 and 2 have six experts, three for each token; the last token of an answer is never computed.
    num_tokens = sum(map(len, prompts)) + len(prompts) * (12 - 1)
    counted = {layer: (len(tokens), sum(tokens)) for layer, tokens in load.tokens.items()}
    assert counted == {0: (6, 3 * num_tokens), 2: (6, 3 * num_tokens)}
    assert sum(load.by_rank(2)) == 2 * 3 * num_tokens
    assert 1.0 <= load.imbalance(2) <= 2.0


def test_the_courses_own_call() -> None:
    with InferenceEngine(tensor_parallel=2, max_batch_size=64, kv_cache_policy="paged", max_model_len=128) as engine:
        outputs = engine.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=8))
        assert "Paris" in outputs[0].outputs[0].text
        whole = engine.info
    with InferenceEngine(max_model_len=128) as engine:
        assert whole.num_weight_bytes < 1.02 * engine.info.num_weight_bytes  # each rank holds its share
        assert whole.threads == engine.info.threads or whole.threads == 2


def test_a_contiguous_pool_is_shared_too() -> None:
    with build(tensor_parallel=2, kv_cache_policy="contiguous", num_gpu_blocks_override=4, max_num_seqs=4) as engine:
        params = SamplingParams(temperature=0, max_tokens=4)
        assert "Paris" in engine.generate(["The capital of France is"], params)[0].outputs[0].text


def test_a_model_that_cannot_be_cut_so_is_refused_before_anything_starts() -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match="10 ranks cannot share 9 attention heads; use tensor parallelism of 9"):
        build(tensor_parallel=10)
    with pytest.raises(ConfigError, match="30 layers cannot make 31 pipeline stages"):
        build(pipeline_parallel=31)
    with pytest.raises(ConfigError, match="llama has no experts"):
        build(tensor_parallel=2, expert_parallel=True)
    assert time.monotonic() - started < 3


def test_what_a_rank_refuses_reaches_the_caller() -> None:
    with pytest.raises(ConfigError, match=r"rank \d.*max_model_len"):
        build(tensor_parallel=2, num_gpu_blocks_override=None, kv_cache_memory_bytes=1 << 20)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_generation_within_seconds(how) -> None:
    engine = build(tensor_parallel=2, rank_timeout=2.0)
    ranks = _children()
    assert len(ranks) == 2
    threading.Timer(1.0, os.kill, (ranks[1], how)).start()
    started = time.monotonic()
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    with pytest.raises(RankFailedError, match="rank 1"):
        engine.generate(["1 2 3 4"] * 200, params)
    assert time.monotonic() - started < 1 + 5
    engine.close()
    assert _children() == []


def _children() -> list[int]:
    """Processes of ranks that this one has started."""
    children = Path(f"/proc/self/task/{threading.main_thread().native_id}/children").read_text()
    return [pid for pid in map(int, children.split()) if "rank_process" in _command(pid)]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_swapped_pages_give_the_same_bits_on_ranks(tmp_path) -> None:
    with build(tensor_parallel=2, num_gpu_blocks_override=400) as engine:
        roomy = [output.token_ids for output in run(engine)]
    tiers = {"kv_offloading_size": 4 << 20, "kv_offloading_disk_size": 99 << 20, "kv_offloading_path": str(tmp_path)}
    with build(tensor_parallel=2, num_gpu_blocks_override=16, preemption_mode="swap", **tiers) as engine:
        assert engine.info.num_host_pages > 0
        for _ in range(2):
            assert [output.token_ids for output in run(engine)] == roomy
        stats = engine.stats()
        assert min(stats.num_preemptions, stats.num_pages_stored, stats.tier_cache_hits) > 0
        assert (stats.num_pages_lost, stats.num_failed_steps, stats.kv_cache_usage) == (0, 0, 0.0)
    assert list(tmp_path.iterdir()) == []
