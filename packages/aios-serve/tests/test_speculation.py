"""The bundled model with drafts and without: the same tokens, texts, reasons and log probabilities, bit for bit."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import bundled_oracle
import pytest

from aios_model.errors import ConfigError
from aios_model.native import native_status
from aios_serve import InferenceEngine, SamplingParams
from aios_serve.assembly import scheduler_config
from aios_serve.model_part import ModelPart

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not native_status().available, reason=native_status().reason),
]

LENGTH = 40
DRAFTS = {
    "method": "ngram",
    "num_speculative_tokens": 5,
    "adaptive": False,  # many drafts, whether they pay or not
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 1,
}
WAYS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 3},
    "min-p": {"temperature": 1.1, "min_p": 0.05, "seed": 8},
    "penalties": {"temperature": 0, "presence_penalty": 0.4, "frequency_penalty": 0.2, "repetition_penalty": 1.05},
    "sampled penalties": {"temperature": 0.7, "repetition_penalty": 1.1, "seed": 5},
    "bias and bans": {"temperature": 0, "logit_bias": {28: 2.0, 30: -5.0}, "bad_words": ["the", "of the"]},
    "logprobs": {"temperature": 0, "logprobs": 3},
    "sampled logprobs": {"temperature": 0.8, "seed": 1, "logprobs": 0},
    "stop string": {"temperature": 0, "stop": ["and", "the s"]},
    "stop token": {"temperature": 0, "stop_token_ids": [28, 339]},
    "minimum": {"temperature": 0, "min_tokens": 20, "stop_token_ids": [28, 339], "stop": [" the"]},
    "choices": {"temperature": 0.9, "seed": 2, "n": 3},
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


@cache
def prompts() -> list[list[int]]:
    """Some repeat themselves, and so will their answers; some begin alike."""
    cases = [case["prompt_token_ids"] + case["token_ids"] for case in bundled_oracle.greedy_cases()]
    return [cases[2] + cases[3][:20], cases[2] * 2 + cases[2][:9], cases[4][:12] * 5, cases[2] + cases[4]]


def run(engine: InferenceEngine) -> dict[str, list]:
    requests = [(way, prompt) for way in WAYS for prompt in prompts()]
    params = [SamplingParams(**{"max_tokens": LENGTH, **WAYS[way]}) for way, _ in requests]
    outputs = engine.generate([prompt for _, prompt in requests], params)
    found: dict[str, list] = {way: [] for way in WAYS}
    for (way, _), output in zip(requests, outputs, strict=True):
        found[way] += [
            (each.index, each.text, each.token_ids, each.finish_reason, each.stop_reason, each.logprobs)
            for each in output.outputs
        ]
    return found


@cache
def plain(**options) -> dict[str, list]:
    with build(**options) as engine:
        return run(engine)


def check(found: dict[str, list], **options) -> None:
    for way, wanted in plain(**options).items():
        assert found[way] == wanted, way


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_seqs": 1},
        {"threads": 2, "max_num_batched_tokens": 70},
        {"enable_prefix_caching": False, "block_size": 32},
        {"num_gpu_blocks_override": 26, "max_num_seqs": 20},
        {"quantization": "int8"},
    ],
    ids=str,
)
def test_every_way_of_sampling_gives_what_it_gives_without_drafts(options) -> None:
    weights = {name: options[name] for name in options if name == "quantization"}
    with build(speculative=DRAFTS, **options) as engine:
        check(run(engine), **weights)
        stats = engine.stats()
    assert min(stats.num_accepted_tokens, stats.num_draft_tokens - stats.num_accepted_tokens) > 200
    assert stats.num_steps < stats.generation_tokens
    assert stats.kv_cache_usage == 0.0
    assert (stats.num_preemptions > 0) == ("num_gpu_blocks_override" in options)


@pytest.mark.parametrize("adaptive", [False, True])
def test_suffixes_change_nothing(adaptive) -> None:
    with build(speculative={"method": "suffix", "suffix_min_match": 1, "adaptive": adaptive}) as engine:
        check(run(engine))
        stats = engine.stats()
    assert adaptive or stats.num_accepted_tokens > 100  # how many pay is a matter of the machine
    assert stats.kv_cache_usage == 0.0


@pytest.mark.parametrize(
    "drafts",
    [
        {"method": "self", "quantization": "int4"},
        {"method": "early_exit", "num_layers": 27},
        {"method": "draft_model", "model": bundled_oracle.bundled_path, "quantization": "int8"},
    ],
    ids=lambda drafts: drafts["method"],
)
def test_models_that_draft_change_nothing(drafts) -> None:
    if callable(drafts.get("model")):
        drafts = {**drafts, "model": str(drafts["model"]())}
    with build(speculative={"num_speculative_tokens": 2, "adaptive": False, **drafts}) as engine:
        check(run(engine))
        stats = engine.stats()
    assert stats.num_accepted_tokens > stats.num_draft_tokens / 10
    assert stats.kv_cache_usage == 0.0


def test_a_draft_model_with_other_tokens_is_refused(monkeypatch) -> None:
    load = ModelPart.load

    def other(config, files, **options):
        part = load(config, files, **options)
        if config.speculative is None:
            part.decoder.config = replace(part.decoder.config, vocab_size=7)
        return part

    monkeypatch.setattr(ModelPart, "load", other)
    with pytest.raises(ConfigError, match="has 7 tokens and the served one 49152"):
        build(speculative={"method": "self"}, engine_process=False)


def test_early_exit_after_too_many_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="this model has 30, choose 1 to 29"):
        build(speculative={"method": "early_exit", "num_layers": 30}, engine_process=False)


def test_random_drafts_change_nothing(monkeypatch) -> None:
    rng = random.Random()

    class Garbage:
        def propose(self, contexts):
            # Among them tokens that the text holds, so that some are right, and ids that no token has.
            return [
                [rng.choice([rng.choice(context.token_ids), rng.randrange(-1, 60_000)]) for _ in range(4)]
                for context in contexts
            ]

        def forget(self, request_id):
            pass

        def close(self):
            pass

    monkeypatch.setattr("aios_serve.assembly.make_proposer", lambda config: Garbage())
    with build(speculative=DRAFTS) as engine:
        check(run(engine))
        assert engine.stats().num_draft_tokens > 1000


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 3)])
def test_ranks_check_drafts_too(tensor, pipeline) -> None:
    """Several ranks round otherwise than one device, so they are compared with themselves."""
    shape = {"tensor_parallel": tensor, "pipeline_parallel": pipeline}
    with build(speculative=DRAFTS, **shape) as engine:
        check(run(engine), **shape)
        stats = engine.stats()
    assert stats.num_accepted_tokens > 500
