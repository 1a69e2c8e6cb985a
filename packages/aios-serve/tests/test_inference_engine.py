"""InferenceEngine: on a scripted engine, and (slow) on the bundled model."""

from __future__ import annotations

import importlib.util
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aios_kvcache.errors import PoolTooSmallError
from aios_model.errors import AiosError, ConfigError, InvalidRequestError, ModelNotFoundError
from aios_model.sampling.params import SamplingParams
from aios_sched.errors import QueueFullError
from aios_serve.config import EngineConfig
from aios_serve.engine import InferenceEngine
from aios_serve.errors import RequestFailedError
from aios_serve.outputs import RequestOutput

spec = importlib.util.spec_from_file_location("scripted", Path(__file__).with_name("scripted.py"))
scripted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripted)


def make(**options):
    config = EngineConfig(**{"max_num_seqs": 4, "max_num_queued_reqs": None, **options})
    built = scripted.build_scripted(config, lambda stage, fraction: None)
    return InferenceEngine.from_built(config, built, scripted.read_scripted(config, built.files))


@pytest.fixture
def engine():
    with make() as engine:
        yield engine


def texts(outputs):
    return [choice.text for output in outputs for choice in output.outputs]


def assert_idle(engine):
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    assert engine._sinks == {}
    assert engine._processor.num_open_requests == engine._processor.num_open_choices == 0


def test_replicas_are_refused_with_what_to_use_instead():
    with pytest.raises(ConfigError, match=r"data_parallel=2.*--data-parallel-size"):
        InferenceEngine(data_parallel=2)


def test_outputs_come_in_the_order_of_the_prompts(engine):
    prompts = [f"{number}-" for number in range(30)]
    params = [SamplingParams(max_tokens=1 + 7 * number % 13) for number in range(30)]
    outputs = engine.generate(prompts, params)
    for prompt, each, output in zip(prompts, params, outputs, strict=True):
        assert output.prompt == prompt
        assert output.prompt_token_ids == list(prompt.encode())
        assert output.finished
        assert output.outputs[0].text == (prompt * 13)[: each.max_tokens]
        assert output.outputs[0].finish_reason == "length"
    assert_idle(engine)


@pytest.mark.parametrize(
    "prompts", ["abc", [97, 98, 99], ["abc"], [[97, 98, 99]], [(97, 98, 99)]], ids=lambda prompts: str(prompts)
)
def test_a_prompt_may_be_text_or_ids_alone_or_in_a_list(engine, prompts):
    (output,) = engine.generate(prompts, SamplingParams(max_tokens=4))
    assert isinstance(output, RequestOutput)
    assert output.outputs[0].text == "abca"


def test_no_prompts_give_no_outputs(engine):
    assert engine.generate([]) == []


def test_n_choices_stop_each_by_itself(engine):
    (output,) = engine.generate("ab.", SamplingParams(n=3, max_tokens=9, stop=".", logprobs=1))
    assert texts([output]) == ["ab"] * 3
    assert {choice.stop_reason for choice in output.outputs} == {"."}
    assert output.outputs[2].cumulative_logprob == -1.5
    assert_idle(engine)


@pytest.mark.parametrize(
    ("prompts", "params", "param", "words"),
    [
        (["ok", ""], SamplingParams(), "prompt", "empty"),
        (["ok", "x" * 128], SamplingParams(), "prompt", "128 tokens"),
        (["ok", [0, 257]], SamplingParams(), "prompt", "257"),
        (["ok", [0, -1]], SamplingParams(), "prompt", "-1"),
        (["ok", [0, 1.5]], SamplingParams(), "prompt", "integers"),
        (["ok", 3], SamplingParams(), "prompt", "int"),
        (["ok", "x" * 120], SamplingParams(max_tokens=9), "max_tokens", "at most 8"),
        (["ok", "x" * 120], SamplingParams(max_tokens=None, min_tokens=9), "min_tokens", "at most 8"),
        (["ok"], SamplingParams(stop_token_ids=[257]), "stop_token_ids", "257"),
        (["ok"], SamplingParams(logprobs=21), "logprobs", "20"),
        (["ok", "ok"], [SamplingParams()], None, "2 prompts came with 1"),
    ],
)
def test_a_bad_request_is_refused_before_anything_runs(engine, prompts, params, param, words):
    with pytest.raises(InvalidRequestError, match=words) as refusal:
        engine.generate(prompts, params)
    assert refusal.value.param == param
    assert engine.stats().num_steps == 0
    assert_idle(engine)


def test_without_params_the_models_defaults_apply(engine):
    (output,) = engine.generate("ab")
    assert output.outputs[0].text == "ab" * 8  # max_tokens 16


def test_chat_goes_through_the_template_and_may_fill_the_context(engine):
    conversation = [{"role": "user", "content": "ab"}, {"role": "user", "content": "c"}]
    (output,) = engine.chat(conversation)
    assert output.prompt == "abc"
    assert len(output.outputs[0].token_ids) == scripted.MAX_MODEL_LEN - 3
    assert texts(engine.chat([conversation, conversation], SamplingParams(max_tokens=3))) == ["abc", "abc"]
    with pytest.raises(InvalidRequestError):
        engine.chat([])


def test_a_failing_request_leaves_the_others_alone(engine):
    outputs = engine.generate(["ab", f"{scripted.RAISE}cd", "ef"], SamplingParams(max_tokens=4))
    assert texts(outputs) == ["abab", "", "efef"]
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]
    assert "scripted fault" in outputs[1].error
    assert_idle(engine)
    with pytest.raises(RequestFailedError, match="scripted fault"):
        list(engine.stream(scripted.RAISE))


def test_streams_add_up_to_what_generate_returns(engine):
    params = SamplingParams(n=2, max_tokens=9, stop="éa", logprobs=0)
    (whole,) = engine.generate("abéc", params)
    streamed = RequestOutput.empty(request_id="0", prompt_token_ids=[], num_choices=2)
    for delta in engine.stream("abéc", params):
        streamed.add(delta)
    assert streamed.outputs == whole.outputs
    assert_idle(engine)


def test_streams_and_batches_may_be_interleaved(engine):
    first = engine.stream("ab", SamplingParams(max_tokens=6))
    second = engine.stream("cd", SamplingParams(max_tokens=4))
    got = [next(first), next(second), next(second)]
    assert texts(engine.generate(["xy"], SamplingParams(max_tokens=10))) == ["xyxyxyxyxy"]
    got = [*got, *second, *first]
    assert "".join(delta.deltas[0].text for delta in got) == "acd" + "cd" + "babab"
    assert_idle(engine)


def test_pages_can_be_watched(engine):
    with engine.record_pages(max_events=50) as recorder:
        engine.generate([[5] * 40, [5] * 40], SamplingParams(max_tokens=4))
    states = recorder.trace().at(recorder.num_events)
    assert recorder.num_events > 0
    assert not any(states.owners)
    num_events = recorder.num_events
    engine.generate("again")
    assert recorder.num_events == num_events


def test_leaving_a_stream_early_frees_its_pages(engine):
    stream = engine.stream("ab", SamplingParams(max_tokens=100))
    next(stream)
    assert engine.stats().num_running == 1
    stream.close()
    assert_idle(engine)


def test_a_full_queue_makes_the_rest_wait():
    with make(max_num_seqs=2, max_num_queued_reqs=1) as engine:
        outputs = engine.generate(["ab"] * 20, SamplingParams(max_tokens=4))
        assert texts(outputs) == ["abab"] * 20
        with pytest.raises(QueueFullError):
            engine.generate("ab", SamplingParams(n=4))
        assert_idle(engine)


def test_ctrl_c_aborts_what_is_in_flight_and_the_engine_goes_on(engine, monkeypatch):
    steps = []
    real_step = engine._port.step

    def interrupted_step():
        steps.append(len(steps))
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)  # arrives inside the step, and must not cut it short
        return real_step()

    monkeypatch.setattr(engine._port, "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(["ab"] * 6, SamplingParams(max_tokens=50))
    assert engine.stats().num_steps == 3
    assert_idle(engine)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert texts(engine.generate("ab", SamplingParams(max_tokens=2))) == ["ab"]


def test_a_closed_engine_says_so(engine):
    engine.close()
    engine.close()
    with pytest.raises(InvalidRequestError, match="closed"):
        engine.generate("ab")


def test_a_progress_bar_goes_to_stderr(engine, capsys):
    engine.generate(["ab"] * 3, SamplingParams(max_tokens=2), progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "3/3" in captured.err


def test_options_that_cannot_be_honoured_are_refused_before_anything_is_loaded():
    script = (
        "import sys\n"
        "from aios_serve import InferenceEngine\n"
        "try:\n"
        "    InferenceEngine(model='m', tensor_parallel=0, max_batch_size=64, kv_cache_policy='paged')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "tensor_parallel=0" in done.stdout
    with pytest.raises(ConfigError, match="mean the same"):
        InferenceEngine(max_batch_size=4, max_num_seqs=4)


# A real model of two layers with random weights, in float64: bookkeeping, not luck.


TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
PROMPTS = [" ".join([word] * length) for word, length in (("one", 1), ("red", 5), ("time", 17), ("house", 40))]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    return {"model": folder, "tokenizer": "bundled", "load_format": "dummy", "dtype": "float64", "threads": 1}


@pytest.fixture(scope="module")
def expected(tiny_model):
    with InferenceEngine(**tiny_model, max_batch_size=1, enable_prefix_caching=False) as engine:
        return [output.outputs[0].token_ids for output in engine.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 7, "max_batch_size": 4},
        {"kv_cache_policy": "contiguous", "max_model_len": 96, "max_batch_size": 2},
        {"enable_chunked_prefill": False, "max_model_len": 96},
        {"num_gpu_blocks_override": 24, "block_size": 4, "max_model_len": 96, "max_batch_size": 4},
        {"kv_cache_memory_bytes": 200_000, "block_size": 1},
    ],
    ids=lambda options: ",".join(options) or "defaults",
)
def test_no_option_of_the_engine_changes_the_tokens(tiny_model, expected, options):
    with InferenceEngine(**tiny_model, **options) as engine:
        for _ in range(2):
            assert [output.outputs[0].token_ids for output in engine.generate(PROMPTS, GREEDY)] == expected
        assert (engine.stats().num_preemptions > 0) == ("num_gpu_blocks_override" in options)
        assert_idle(engine)


def test_the_engine_describes_what_was_built(tiny_model):
    with InferenceEngine(**tiny_model, max_batch_size=3, max_model_len=100, served_model_name="t") as engine:
        info = engine.info
    assert (info.model_name, info.dtype, info.device, info.threads) == ("t", "float64", "cpu", 1)
    assert (info.max_model_len, info.max_num_seqs, info.max_num_batched_tokens) == (100, 3, 256)
    assert (info.block_size, info.num_blocks) == (16, 3 * 7)
    assert (
        info.num_kv_bytes == (1 + 21) * 16 * 2 * 2 * 2 * 8 * 8
    )  # pages x tokens x layers x (K, V) x heads x size x bytes


@pytest.mark.parametrize(
    ("asked", "kept", "head_bytes"),
    [("float32", "float32", 32), ("bfloat16", "bfloat16", 16), ("int8", "int8", 12), ("fp8_e4m3", "fp8", 8)],
)
def test_torch_attends_over_pages_of_any_type_with_the_same_tokens_however_they_are_cut(
    tiny_model, asked, kept, head_bytes
):
    answers = []
    for options in ({}, {"max_num_batched_tokens": 7, "max_batch_size": 4, "block_size": 5}):
        with InferenceEngine(**tiny_model, kv_cache_dtype=asked, max_model_len=96, **options) as engine:
            info = engine.info
            assert info.kv_dtype == kept
            assert info.num_kv_bytes == (1 + info.num_blocks) * info.block_size * 2 * 2 * 2 * head_bytes
            answers.append([output.outputs[0].token_ids for output in engine.generate(PROMPTS, GREEDY)])
    assert answers[0] == answers[1]


KV_BYTES_PER_TOKEN = 2 * 2 * 2 * 8 * 8  # layers x (K, V) x heads x size x bytes


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair", "prefix"])
@pytest.mark.parametrize(
    "pool", [{"num_gpu_blocks_override": 6}, {"kv_cache_memory_bytes": 7 * 16 * KV_BYTES_PER_TOKEN}]
)
def test_the_smallest_pool_finishes_requests_as_long_as_the_context(tiny_model, pool, policy):
    """96 tokens are six pages of 16, and bytes count the null page, too. One alone fills the pool; here are nine."""
    options = {"max_model_len": 96, "scheduling_policy": policy, "max_batch_size": 4}
    draw = random.Random(str(pool))
    prompts = [[draw.randrange(1000, 40000) for _ in range(length)] for length in (1, 15, 16, 17, 40, 64, 80, 94, 95)]
    params = [SamplingParams(temperature=0, max_tokens=96 - len(prompt), ignore_eos=True) for prompt in prompts]
    with InferenceEngine(**tiny_model, **options, **pool) as engine:
        assert engine.info.num_blocks == 6
        outputs = [output.outputs[0] for output in engine.generate(prompts, params)]
        assert engine.stats().num_preemptions > 0
        assert_idle(engine)
    assert [len(output.token_ids) for output in outputs] == [96 - len(prompt) for prompt in prompts]
    assert {output.finish_reason for output in outputs} == {"length"}


@pytest.mark.parametrize(
    ("pool", "error", "words"),
    [
        (
            {"num_gpu_blocks_override": 5},
            ConfigError,
            ["num_gpu_blocks_override=5", "max_model_len=96", "needs 6 pages of 16", "hold 80 tokens"],
        ),
        (
            {"kv_cache_memory_bytes": 7 * 16 * KV_BYTES_PER_TOKEN - 1},
            PoolTooSmallError,
            ["one sequence of 96 tokens", f"{KV_BYTES_PER_TOKEN} bytes a token", "context that fits is 80 tokens"],
        ),
    ],
)
def test_one_page_or_byte_fewer_is_refused_before_weights_are_read(tiny_model, monkeypatch, pool, error, words):
    monkeypatch.setattr("aios_serve.model_part.load_decoder", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(error) as refusal:
        InferenceEngine(**tiny_model, max_model_len=96, **pool)
    assert all(word in str(refusal.value) for word in words)


def test_a_model_or_a_pool_that_does_not_fit_is_refused_with_the_numbers(tiny_model, tmp_path):
    with pytest.raises(AiosError, match="max_model_len"):
        InferenceEngine(**tiny_model, max_model_len=256, num_gpu_blocks_override=2)
    with pytest.raises(ConfigError, match="257"):
        InferenceEngine(**tiny_model, max_model_len=257)
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        InferenceEngine(model=tmp_path / "nowhere")


# The real thing: the bundled model, built once.


@pytest.fixture(scope="module")
def bundled():
    with InferenceEngine(max_batch_size=4, max_model_len=512, max_num_batched_tokens=64, threads=1) as engine:
        yield engine


@pytest.mark.slow
def test_the_courses_call_answers(bundled):
    outputs = bundled.generate(
        ["The capital of France is", "Two plus two is"], SamplingParams(temperature=0, max_tokens=6)
    )
    assert outputs[0].outputs[0].text.startswith(" Paris")
    assert all(0 < len(output.outputs[0].token_ids) <= 6 for output in outputs)
    assert bundled.stats().kv_cache_usage == 0.0


@pytest.mark.slow
def test_greedy_tokens_are_the_same_alone_in_a_batch_and_from_the_cache(bundled):
    prompts = [
        f"Question {number}: what is the meaning of the word number {number} of this sentence?" for number in range(4)
    ]
    params = SamplingParams(temperature=0, max_tokens=8)
    together = texts(bundled.generate(prompts, params))
    alone = [texts(bundled.generate(prompt, params))[0] for prompt in prompts]
    assert alone == together
    (again,) = bundled.generate(prompts[0], params)
    assert again.num_cached_tokens >= bundled.info.block_size
    assert again.outputs[0].text == alone[0]


@pytest.mark.slow
def test_a_seed_repeats_and_its_choices_differ(bundled):
    params = SamplingParams(n=3, seed=11, temperature=1.5, max_tokens=8)
    first, second = (texts(bundled.generate("Once upon a time", params)) for _ in range(2))
    assert first == second
    assert len(set(first)) > 1


@pytest.mark.slow
def test_chat_ends_by_itself_without_showing_the_end_token(bundled):
    (output,) = bundled.chat(
        [{"role": "user", "content": "What is the capital of France? Answer with one word."}],
        SamplingParams(temperature=0, max_tokens=40, logprobs=2),
    )
    choice = output.outputs[0]
    assert choice.finish_reason == "stop"
    assert "Paris" in choice.text
    assert "<|im_end|>" not in choice.text
    assert choice.token_ids[-1] in bundled.tokenizer.eos_token_ids
    assert len(choice.logprobs) == len(choice.token_ids)
    assert all(entry.logprob <= entry.top[0][1] <= 0 for entry in choice.logprobs)
