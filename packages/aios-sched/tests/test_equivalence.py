"""The same tokens, whatever happens around a request: with the real decoder, pages and sampler, in float64.

Two layers of random weights; the oracle is `aios_model.generate`, which knows neither pages nor batches. In float64 the
order of a sum moves a logit by 1e-15, while the two largest differ by 1e-6 and more, so any difference is a bug in the
bookkeeping.
"""

from __future__ import annotations

import os
import random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from aios_kvcache.block_manager import BlockManager
from aios_kvcache.page_mover import PageMover
from aios_kvcache.paged_cache import PagedKVCache
from aios_kvcache.tier_sizing import TierPlan
from aios_kvcache.tiers import PageTiers
from aios_model.decoder import DecoderModel
from aios_model.families import find_hf_family
from aios_model.generate import generate_tokens
from aios_model.loader import load_weights, parameter_shapes
from aios_model.sampling.device_sampler import DeviceSampler
from aios_model.sampling.params import SamplingParams
from aios_model.sampling.sampler import Sampler
from aios_model.weights.safetensors import SafetensorsSource
from aios_sched.config import SchedulerConfig
from aios_sched.engine import Engine
from aios_sched.executor import LocalExecutor
from aios_sched.model_runner import ModelRunner
from aios_sched.overlapped_executor import OverlappedExecutor
from aios_sched.policy.fcfs import FCFSQueue
from aios_sched.request import Request
from aios_sched.scheduler import Scheduler

VOCAB_SIZE, MAX_MODEL_LEN, EOS = 300, 64, 0
RAW_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
    "rms_norm_eps": 1e-5,
}


def build_model(folder, device, *, broken_token=None):
    config = find_hf_family(RAW_CONFIG).read_hf(RAW_CONFIG)
    decoder = DecoderModel(config).eval()
    generator = torch.Generator().manual_seed(1)
    # Larger than models are initialised, or this one would hardly look at its context.
    tensors = {
        name: torch.ones(shape) if name.endswith("norm.weight") else torch.randn(shape, generator=generator) * 0.25
        for name, shape in parameter_shapes(decoder).items()
    }
    if broken_token is not None:
        tensors["model.embed_tokens.weight"][broken_token] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    source = SafetensorsSource([folder / "model.safetensors"])
    load_weights(decoder, source, file_format="safetensors", dtype=torch.float64, device=torch.device(device))
    return SimpleNamespace(config=config, decoder=decoder, eos_token_ids=(EOS,))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads gain nothing on matrices this small, and lose much where others use the cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def model(request, tmp_path_factory):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return build_model(tmp_path_factory.mktemp("model"), request.param)


def build_engine(
    model,
    *,
    num_blocks=60,
    block_size=4,
    max_num_batched_tokens=64,
    enable_prefix_caching=True,
    executor=LocalExecutor,
    tiers=None,
    expected_output="none",  # else admission would foresee the pressure that is to be provoked here
    overlap=False,
    **options,
):
    decoder = model.decoder
    config = SchedulerConfig(
        max_num_seqs=8,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=MAX_MODEL_LEN,
        expected_output=expected_output,
        schedule_ahead=overlap,
        **options,
    )
    pages = BlockManager(
        num_blocks=num_blocks,
        block_size=block_size,
        enable_prefix_caching=enable_prefix_caching,
        tiers=tiers and PageTiers(num_host_pages=tiers.num_host_pages, num_disk_pages=tiers.num_disk_pages),
    )
    cache = PagedKVCache(
        model.config, num_blocks=num_blocks, block_size=block_size, dtype=decoder.dtype, device=decoder.device
    )
    mover = tiers and PageMover(cache.page_tensors, tiers)
    sampler = (DeviceSampler if overlap else Sampler)(vocab_size=VOCAB_SIZE, device=decoder.device)
    runner = ModelRunner(decoder, cache, sampler, mover=mover)
    return Engine(Scheduler(config, pages, FCFSQueue()), OverlappedExecutor(runner) if overlap else executor(runner))


PARAMS = [
    SamplingParams(temperature=0, max_tokens=20),
    SamplingParams(temperature=0, max_tokens=20, logprobs=3),
    SamplingParams(temperature=1.0, seed=7, max_tokens=20),
    SamplingParams(temperature=0.8, top_p=0.9, seed=8, max_tokens=20, min_tokens=10),
    SamplingParams(temperature=1.3, top_k=20, min_p=0.01, seed=9, max_tokens=20, presence_penalty=0.6),
    SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1.3, frequency_penalty=0.4, ignore_eos=True),
]


def prompts():
    rng = random.Random(5)
    shared = [rng.randrange(1, VOCAB_SIZE) for _ in range(13)]
    return [shared[: 13 - i] + [rng.randrange(1, VOCAB_SIZE) for _ in range(1 + 3 * i)] for i in range(len(PARAMS))]


def to_request(index, *, prefix=""):
    params = PARAMS[index]
    return Request(
        request_id=f"{prefix}{index}",
        prompt_token_ids=prompts()[index],
        params=params,
        seed=params.seed or 0,
        eos_token_ids=(EOS,),
    )


def run(engine, requests):
    """Tokens and log probabilities per request."""
    for request in requests:
        engine.add(request)
    found = {request.request_id: ([], []) for request in requests}
    while engine.has_unfinished:
        for output in engine.step():
            assert output.error is None, output.error
            found[output.request_id][0].extend(output.token_ids)
            found[output.request_id][1].extend(output.logprobs)
    assert engine.stats().kv_cache_usage == 0
    return found


def generate_all(model):
    return [list(generate_tokens(model, prompt, params)) for prompt, params in zip(prompts(), PARAMS, strict=True)]


@pytest.fixture(scope="module")
def expected(model):
    return generate_all(model)


def check(found, expected, *, prefix=""):
    for index, tokens in enumerate(expected):
        token_ids, logprobs = found[f"{prefix}{index}"]
        assert token_ids == [token.token_id for token in tokens]
        for mine, theirs in zip(logprobs, tokens, strict=True):
            assert (mine is None) == (theirs.logprobs is None)
            if mine is not None:
                assert mine.logprob == pytest.approx(theirs.logprobs.logprob, abs=1e-9)
                assert [token for token, _ in mine.top] == [token for token, _ in theirs.logprobs.top]


def all_requests(prefix=""):
    return [to_request(index, prefix=prefix) for index in range(len(PARAMS))]


def test_the_oracle_says_something_worth_repeating(expected):
    assert all(len({token.token_id for token in tokens}) >= 4 for tokens in expected)


def test_alone(model, expected):
    found = {}
    for index in range(len(PARAMS)):
        found |= run(build_engine(model), [to_request(index)])
    check(found, expected)


def test_all_at_once(model, expected):
    check(run(build_engine(model, max_num_batched_tokens=512), all_requests()), expected)


@pytest.mark.parametrize(("budget", "block_size"), [(8, 1), (9, 5), (11, 16), (17, 64), (13, 4)])
def test_chunked_at_odd_places(model, expected, budget, block_size):
    engine = build_engine(model, max_num_batched_tokens=budget, block_size=block_size, num_blocks=-(-300 // block_size))
    check(run(engine, all_requests()), expected)


def test_whole_prompts(model, expected):
    check(run(build_engine(model, enable_chunked_prefill=False), all_requests()), expected)


def test_cached(model, expected):
    engine = build_engine(model, num_blocks=120)
    check(run(engine, all_requests("cold ")), expected, prefix="cold ")
    before = engine.stats().prefix_cache_hits
    check(run(engine, all_requests("warm ")), expected, prefix="warm ")
    assert engine.stats().prefix_cache_hits - before >= sum(len(prompt) // 4 * 4 - 4 for prompt in prompts())


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_preempted(model, expected, enable_prefix_caching):
    engine = build_engine(
        model,
        num_blocks=16,
        watermark=0,
        expected_output="none",  # else it would foresee what is to be provoked here
        enable_prefix_caching=enable_prefix_caching,
        max_num_batched_tokens=9,
    )
    check(run(engine, all_requests()), expected)
    assert engine.stats().num_preemptions > 2


def tier_plan(tmp_path, *, host, disk):
    return TierPlan(num_host_pages=host, num_disk_pages=disk, directory=str(tmp_path), page_bytes=1)


@pytest.mark.parametrize(("host", "disk"), [(3, 0), (40, 0), (2, 60)])
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("steps", [1, 3])
def test_swapped(model, expected, enable_prefix_caching, host, disk, steps, tmp_path, lab):
    """Preempted requests get their pages back from host memory and disk, not by computing them again."""
    engine = build_engine(
        model,
        num_blocks=16,
        watermark=0,
        expected_output="none",
        enable_prefix_caching=enable_prefix_caching,
        max_num_batched_tokens=9,
        tiers=tier_plan(tmp_path, host=host, disk=disk),
        executor=lambda runner: lab.DelayedExecutor(runner, max_steps_in_flight=steps),
    )
    check(run(engine, all_requests()), expected)
    stats = engine.stats()
    assert stats.num_preemptions > 2
    if host + disk > 3:  # else there is room for few pages, or for none of a sequence whose pages are all private
        assert stats.num_swap_preemptions > 0
        assert stats.num_pages_fetched > 0
        assert stats.tier_cache_hits > 0 or not enable_prefix_caching
    assert stats.num_pages_lost == 0
    engine._executor._runner.close()


def test_pages_evicted_from_the_pool_are_found_below_it(model, expected, tmp_path):
    engine = build_engine(model, num_blocks=20, tiers=tier_plan(tmp_path, host=4, disk=150))
    check(run(engine, all_requests("cold ")), expected, prefix="cold ")
    check(run(engine, all_requests("warm ")), expected, prefix="warm ")
    pages = engine._scheduler.block_manager
    assert pages.stats.disk_hits > 40
    assert engine.stats().tier_cache_hits == pages.stats.host_hits + pages.stats.disk_hits <= pages.stats.hits
    engine._executor.shutdown()


@pytest.mark.parametrize("harm", ["flip", "cut", "full"])
def test_lost_pages_are_computed_again_and_nothing_else_happens(model, expected, harm, tmp_path, monkeypatch, caplog):
    engine = build_engine(model, num_blocks=20, tiers=tier_plan(tmp_path, host=4, disk=150))
    disk = engine._executor._runner._mover._disk
    if harm == "full":
        monkeypatch.setattr(disk._file, "fileno", lambda: -1)  # nothing can be written, and nothing read
    check(run(engine, all_requests("cold ")), expected, prefix="cold ")
    for slot in range(disk.num_slots):
        disk.wait(slot)
    if harm == "flip":
        size, file = disk.page_bytes, disk._file.fileno()
        for slot in range(0, disk.num_slots, 2):
            place = slot * size + random.randrange(size)
            os.pwrite(file, bytes([os.pread(file, 1, place)[0] ^ 1]), place)
    elif harm == "cut":
        os.truncate(disk._file.fileno(), disk.page_bytes)
    check(run(engine, all_requests("warm ")), expected, prefix="warm ")
    assert engine.stats().num_pages_lost > 0
    assert engine.stats().num_failed_steps == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    monkeypatch.undo()
    engine._executor.shutdown()


def test_several_steps_in_flight(model, expected, lab):
    def executor(runner):
        return lab.DelayedExecutor(runner, max_steps_in_flight=3)

    engine = build_engine(model, num_blocks=20, watermark=0, max_num_batched_tokens=8, executor=executor)
    check(run(engine, all_requests()), expected)
    assert engine._executor.most_in_flight == 3


@pytest.mark.parametrize("options", [{}, {"num_blocks": 16, "watermark": 0}, {"enable_prefix_caching": False}])
def test_steps_that_overlap(model, expected, options):
    """With a GPU, on one: launched behind each other, nobody waits but for results."""
    engine = build_engine(model, overlap=True, max_num_batched_tokens=9, **options)
    check(run(engine, all_requests()), expected)
    assert (engine.stats().num_preemptions > 0) == ("num_blocks" in options)


def test_step_that_fails_once(model, expected):
    """Half-done steps leave nothing behind, in the pages or in the sampler."""

    class FailsNowAndThen:
        vocab_size = VOCAB_SIZE

        def __init__(self, runner):
            self.runner, self.num_steps = runner, 0

        def execute(self, output):
            result = self.runner.execute(output)
            self.num_steps += 1
            if self.num_steps % 9 == 2:
                raise RuntimeError("injected")
            return result

    engine = build_engine(model, executor=lambda runner: LocalExecutor(FailsNowAndThen(runner)))
    check(run(engine, all_requests()), expected)
    assert engine.stats().num_failed_steps > 3


@pytest.mark.parametrize("seed", range(4))
def test_any_schedule(model, expected, seed, lab):
    rng = random.Random(seed)
    block_size = rng.choice([1, 3, 4, 7, 16])
    engine = build_engine(
        model,
        block_size=block_size,
        num_blocks=-(-rng.choice([64, 70, 90, 150]) // block_size),
        max_num_batched_tokens=rng.randint(8, 40),
        enable_prefix_caching=rng.random() < 0.7,
        executor=lambda runner: lab.DelayedExecutor(runner, max_steps_in_flight=rng.choice([1, 2, 3])),
    )
    waiting = [to_request(index, prefix=f"{turn} ") for turn in range(3) for index in range(len(PARAMS))]
    rng.shuffle(waiting)
    aborted, found = set(), {request.request_id: [] for request in waiting}
    while waiting or engine.has_unfinished:
        if waiting and rng.random() < 0.3:
            engine.add(waiting.pop())
        if rng.random() < 0.03:
            aborted |= {output.request_id for output in engine.abort([rng.choice(list(found))])}
        for output in engine.step():
            assert output.error is None
            found[output.request_id] += output.token_ids
    for request_id, token_ids in found.items():
        answer = [token.token_id for token in expected[int(request_id.split()[1])]]
        assert token_ids == (answer[: len(token_ids)] if request_id in aborted else answer)


def test_request_whose_logits_are_not_finite_fails_alone_and_leaves_no_trace_in_its_pages(expected, model, tmp_path):
    used = {token.token_id for tokens in expected for token in tokens}.union(*prompts())
    broken_token = min(set(range(VOCAB_SIZE)) - used)
    model = build_model(tmp_path, model.decoder.device, broken_token=broken_token)
    engine = build_engine(model, num_blocks=60, enable_prefix_caching=False)
    broken = Request(
        request_id="broken",
        prompt_token_ids=[1, 2, broken_token, 3] * 8,
        params=SamplingParams(temperature=0),
        seed=0,
        eos_token_ids=(EOS,),
    )
    engine.add(broken)
    for request in all_requests():
        engine.add(request)
    found, errors = {f"{index}": ([], []) for index in range(len(PARAMS))}, {}
    while engine.has_unfinished:
        for output in engine.step():
            if output.error:
                errors[output.request_id] = output.error
            else:
                found[output.request_id][0].extend(output.token_ids)
                found[output.request_id][1].extend(output.logprobs)
    assert list(errors) == ["broken"]
    assert "NaN or infinite logits for request broken" in errors["broken"]
    check(found, expected)
    # Its pages, full of NaN, are the first to be handed out again.
    check(run(engine, all_requests("next ")), expected, prefix="next ")
