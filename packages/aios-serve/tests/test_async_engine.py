"""AsyncEngine over a scripted engine: in a process of its own, in a thread, and (slow) on the bundled model."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import time
from contextlib import aclosing
from pathlib import Path

import pytest

from aios_model.errors import InvalidRequestError, ModelNotFoundError
from aios_model.sampling.params import SamplingParams
from aios_sched.errors import QueueFullError
from aios_serve.async_engine import AsyncEngine, EngineState
from aios_serve.config import EngineConfig
from aios_serve.engine_client import ProcessClient, ThreadClient
from aios_serve.engine_process import serve
from aios_serve.errors import EngineDeadError, EngineDrainingError, EngineLoadingError, RequestFailedError
from aios_serve.outputs import RequestOutput

SCRIPT = Path(__file__).with_name("scripted.py")
spec = importlib.util.spec_from_file_location("scripted", SCRIPT)
scripted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripted)


def in_thread(config):
    return scripted_engine(
        config, lambda replica: ThreadClient(lambda channel: serve(channel, scripted.build_scripted))
    )


def in_process(config, **options):
    return scripted_engine(config, lambda replica: ProcessClient(command=[sys.executable, str(SCRIPT)]), **options)


def scripted_engine(config, new_client, **options):
    find, read = scripted.find_scripted, scripted.read_scripted
    return AsyncEngine(config, new_client=new_client, find=find, read=read, **options)


@pytest.fixture(params=["thread", "process"])
async def engine(request):
    config = EngineConfig(max_num_seqs=4)
    engine = in_thread(config) if request.param == "thread" else in_process(config)
    await engine.start()
    await engine.wait_ready()
    yield engine
    await engine.shutdown()


@pytest.fixture
async def process_engine():
    engine = in_process(EngineConfig(max_num_seqs=4, heartbeat_timeout=1.0))
    await engine.start()
    await engine.wait_ready()
    yield engine
    await engine.shutdown()


async def whole(engine, text, params, **options):
    output = RequestOutput.empty(request_id="", prompt_token_ids=[], num_choices=params.n)
    async for delta in engine.generate(list(text.encode()), params, **options):
        output.add(delta)
    return output


async def text_of(engine, text, **params):
    return (await whole(engine, text, SamplingParams(**params))).outputs[0].text


async def until(condition, timeout=5.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.01)


async def assert_idle(engine):
    """No request anywhere, and every page free: within two heartbeats."""
    assert engine.num_open_requests == 0
    await until(lambda: engine.stats().num_running == engine.stats().num_waiting == 0)
    await until(lambda: engine.stats().kv_cache_usage == 0)


async def test_many_requests_at_once_get_their_own_answers(engine):
    prompts = [f"{number}-é-" for number in range(40)]
    texts = await asyncio.gather(*(text_of(engine, prompt, max_tokens=12) for prompt in prompts))
    for prompt, text in zip(prompts, texts, strict=True):
        assert text.rstrip("\ufffd") == (prompt * 12).encode()[:12].decode(errors="ignore")
    await assert_idle(engine)
    assert engine.is_healthy()
    assert engine.state is EngineState.READY
    assert engine.state_detail == ""
    assert (engine.model_name, engine.max_model_len, engine.vocab_size) == ("scripted", 128, 257)


async def test_n_choices_and_stop_strings_end_in_the_engine_too(engine):
    params = SamplingParams(n=3, max_tokens=100, stop=".", logprobs=0)
    output = await whole(engine, f"ab.{scripted.SLOW}", params)
    assert [choice.text for choice in output.outputs] == ["ab"] * 3
    assert output.outputs[0].logprobs[0].top == ((97, -0.5),)
    assert output.finished
    await assert_idle(engine)
    assert engine.stats().generation_tokens < 30


async def test_the_prefix_cache_is_reported_and_can_be_reset(engine):
    prompt = "a long enough prompt"
    params = SamplingParams(max_tokens=2)
    assert (await whole(engine, prompt, params)).num_cached_tokens == 0
    assert (await whole(engine, prompt, params)).num_cached_tokens == 16
    assert (await whole(engine, prompt, params, cache_salt="mine")).num_cached_tokens == 0
    assert await engine.reset_prefix_cache()
    assert (await whole(engine, prompt, params)).num_cached_tokens == 0


@pytest.mark.parametrize("leave", ["aclose", "cancel", "break"])
async def test_a_reader_that_leaves_frees_the_pages(engine, leave):
    started = asyncio.Event()

    async def read():
        async with aclosing(engine.generate([97, ord(scripted.SLOW)], SamplingParams(max_tokens=100))) as stream:
            async for _ in stream:
                started.set()
                if leave == "break":
                    return
                if leave == "aclose":
                    await stream.aclose()
                    return

    task = asyncio.create_task(read())
    await started.wait()
    if leave == "cancel":
        task.cancel()
    await asyncio.wait([task])
    assert task.cancelled() == (leave == "cancel")
    await assert_idle(engine)
    assert engine.stats().generation_tokens < 50


async def test_a_generator_that_is_never_read_opens_nothing(engine):
    stream = engine.generate([97], SamplingParams())
    assert engine.num_open_requests == 0
    await stream.aclose()


async def test_a_slow_reader_gets_everything_in_few_deltas(engine):
    deltas = []
    async for delta in engine.generate([97, 98], SamplingParams(max_tokens=64)):
        deltas.append(delta)
        await asyncio.sleep(0.05)
    assert "".join(delta.deltas[0].text for delta in deltas) == "ab" * 32
    assert len(deltas) < 32


async def test_aborting_one_id_leaves_ids_that_begin_like_it(engine):
    slow = f"{scripted.SLOW}x"
    tasks = {
        name: asyncio.create_task(whole(engine, slow, SamplingParams(max_tokens=40, n=2), request_id=name[:2]))
        for name in ("a", "a again", "ab")
    }
    tasks["a again"].cancel()
    await asyncio.wait([tasks["a again"]])
    tasks["a again"] = asyncio.create_task(whole(engine, slow, SamplingParams(max_tokens=40), request_id="a"))
    await until(lambda: engine.num_open_requests == 3 and engine.stats().num_running > 0)
    assert await engine.abort("a") == 2
    assert await engine.abort("nobody") == 0
    outputs = dict(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))
    assert {choice.finish_reason for choice in outputs["a"].outputs} == {"abort"}
    assert {choice.finish_reason for choice in outputs["a again"].outputs} == {"abort"}
    assert [choice.finish_reason for choice in outputs["ab"].outputs] == ["length"] * 2
    await assert_idle(engine)


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], {}, "prompt"),
        ([97] * 128, {}, "prompt"),
        ([257], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([2**63], {}, "prompt"),
        (["a"], {}, "prompt"),
        ([97], {"max_tokens": 128}, "max_tokens"),
        ([97], {"logprobs": 21}, "logprobs"),
        ([97], {"logit_bias": {257: 1}}, "logit_bias"),
    ],
)
async def test_a_bad_request_never_reaches_the_engine(engine, prompt, params, param):
    with pytest.raises(InvalidRequestError) as refusal:
        engine.check_request(prompt, SamplingParams(**params))
    assert refusal.value.param == param
    with pytest.raises(InvalidRequestError) as refusal:
        await anext(engine.generate(prompt, SamplingParams(**params)))
    assert refusal.value.param == param
    assert engine.stats().num_steps == 0


async def test_a_fault_in_the_engine_fails_that_request_only(engine):
    other = asyncio.create_task(text_of(engine, f"ab{scripted.SLOW}", max_tokens=12))
    with pytest.raises(RequestFailedError, match="scripted fault") as failure:
        await whole(engine, scripted.RAISE, SamplingParams(n=2), request_id="mine")
    assert failure.value.request_id == "mine"
    assert await other == f"ab{scripted.SLOW}" * 4
    await assert_idle(engine)


async def test_the_queue_is_bounded():
    engine = in_thread(EngineConfig(max_num_seqs=1, max_num_queued_reqs=2))
    await engine.start()
    await engine.wait_ready()
    slow = f"{scripted.SLOW}x"
    running = [asyncio.create_task(text_of(engine, slow, max_tokens=20)) for _ in range(3)]
    await until(lambda: engine.num_open_requests == 3)
    with pytest.raises(QueueFullError, match="try again"):
        engine.check_request([97], SamplingParams())
    with pytest.raises(QueueFullError):
        await text_of(engine, slow)
    with pytest.raises(InvalidRequestError, match="n=4"):
        engine.check_request([97], SamplingParams(n=4))
    assert await asyncio.gather(*running) == [slow * 10] * 3
    await engine.shutdown()


class Recorder:
    def __init__(self):
        self.steps, self.tokens, self.finished = [], [], []

    def on_step(self, *, stats, num_tokens, replica):
        self.steps.append(num_tokens)

    def on_tokens(self, *, num_tokens, seconds, first, replica):
        assert seconds >= 0
        self.tokens.append((num_tokens, first))

    def on_finished(self, timing):
        self.finished.append(timing)


async def test_listeners_hear_of_every_token_and_every_end(engine):
    recorder = Recorder()
    engine.subscribe(recorder)
    await whole(engine, "abc", SamplingParams(n=2, max_tokens=5), request_id="full")
    async with aclosing(engine.generate([ord(scripted.SLOW)], SamplingParams(max_tokens=99), request_id="left")) as it:
        await anext(it)
    with pytest.raises(RequestFailedError):
        await whole(engine, scripted.RAISE, SamplingParams(), request_id="failed")
    full, left, failed = recorder.finished
    assert (full.request_id, full.finish_reason, full.num_prompt_tokens) == ("full", "length", 3)
    assert full.num_generation_tokens == 10
    assert full.queue_seconds is not None
    assert full.prefill_seconds is not None
    assert full.queue_seconds + full.prefill_seconds == pytest.approx(full.first_token_seconds)
    assert (left.request_id, left.finish_reason) == ("left", "abort")
    assert (failed.request_id, failed.finish_reason, failed.first_token_seconds) == ("failed", "error", None)
    assert sum(first for _, first in recorder.tokens) == 3
    assert sum(recorder.steps) >= 2 * 3 - 3 + 2 * 4  # two prompts less what they share, then the tokens fed back


async def test_a_listener_that_fails_harms_nobody(engine, caplog):
    class Broken:
        def on_step(self, *, stats, num_tokens, replica):
            raise RuntimeError("broken gauge")

        on_finished = on_step

    recorder = Recorder()
    engine.subscribe(Broken())
    engine.subscribe(recorder)
    assert await text_of(engine, "ab", max_tokens=4) == "abab"
    assert len(recorder.finished) == 1
    assert "broken gauge" in caplog.text
    assert engine.is_healthy()


async def test_draining_lets_open_requests_finish_and_takes_no_new_ones(engine):
    slow = f"{scripted.SLOW}x"
    running = asyncio.create_task(text_of(engine, slow, max_tokens=20))
    await until(lambda: engine.num_open_requests == 1)
    drained = asyncio.create_task(engine.drain(10))
    await asyncio.sleep(0)
    assert engine.state is EngineState.DRAINING
    with pytest.raises(EngineDrainingError):
        engine.check_request([97], SamplingParams())
    assert await drained is True
    assert await running == slow * 10
    assert engine.is_healthy()


async def test_draining_aborts_what_takes_too_long(engine):
    running = asyncio.create_task(whole(engine, scripted.SLOW, SamplingParams(max_tokens=120)))
    await until(lambda: engine.num_open_requests == 1)
    assert await engine.drain(0.1) is False
    assert (await running).outputs[0].finish_reason == "abort"
    await assert_idle(engine)


async def test_shutdown_ends_everything_and_can_be_repeated(engine):
    running = asyncio.create_task(whole(engine, scripted.SLOW, SamplingParams(max_tokens=120)))
    await until(lambda: engine.num_open_requests == 1)
    await engine.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        await running
    await engine.shutdown()
    assert engine.state is EngineState.DEAD
    assert not engine.is_healthy()
    assert engine.replicas[0].client is None
    with pytest.raises(EngineDeadError):
        engine.check_request([97], SamplingParams())


async def test_interrupts_from_the_terminal_do_not_reach_the_engine(process_engine):
    engine = process_engine
    for each in (signal.SIGINT, signal.SIGTERM):
        os.kill(engine.replicas[0].client.pid, each)
    assert await text_of(engine, "ab", max_tokens=2) == "ab"


async def test_an_idle_engine_stays_healthy_by_its_heartbeat(process_engine):
    engine = process_engine
    for _ in range(15):
        await asyncio.sleep(0.1)
        assert engine.is_healthy()


async def test_before_it_is_ready_the_engine_says_what_it_does():
    engine = in_thread(EngineConfig(served_model_name="name"))
    assert engine.model_name == "name"
    assert engine.stats() is None
    with pytest.raises(EngineLoadingError, match="start"):
        await engine.wait_ready()
    for attribute in ("tokenizer", "info", "max_model_len", "vocab_size", "generation_defaults"):
        with pytest.raises(EngineLoadingError, match="try again"):
            getattr(engine, attribute)
    with pytest.raises(EngineLoadingError):
        engine.check_request([97], SamplingParams())
    await engine.start()
    assert engine.state is EngineState.LOADING
    await engine.shutdown()
    with pytest.raises(EngineDeadError):
        await engine.wait_ready()


async def test_progress_of_loading_is_told_as_it_comes():
    details = []

    def build(config, progress):
        for share in (0.25, 0.5):
            progress("loading weights", share)
            details.append(share)
            time.sleep(0.1)
        return scripted.build_scripted(config, progress)

    engine = scripted_engine(EngineConfig(), lambda replica: ThreadClient(lambda channel: serve(channel, build)))
    await engine.start()
    await until(lambda: engine.state_detail == "loading weights 50%")
    assert not engine.is_healthy()
    await engine.wait_ready()
    await engine.shutdown()


async def test_what_prevents_loading_is_raised_with_its_type_or_its_reason(tmp_path):
    engine = AsyncEngine(EngineConfig(model=str(tmp_path / "nothing")))
    await engine.start()
    with pytest.raises(ModelNotFoundError, match="nothing"):
        await engine.wait_ready()
    assert engine.state is EngineState.DEAD
    assert "nothing" in engine.state_detail
    await engine.shutdown()

    def build(config, progress):
        raise RuntimeError("secret path")

    engine = scripted_engine(EngineConfig(), lambda replica: ThreadClient(lambda channel: serve(channel, build)))
    await engine.start()
    with pytest.raises(EngineDeadError, match="loading failed: RuntimeError") as failure:
        await engine.wait_ready()
    assert "secret" not in str(failure.value)
    await engine.shutdown()


async def test_an_engine_process_that_cannot_start_is_reported():
    engine = scripted_engine(
        EngineConfig(), lambda replica: ProcessClient(command=[sys.executable, "-c", "raise SystemExit(7)"])
    )
    await engine.start()
    with pytest.raises(EngineDeadError, match="status 7"):
        await engine.wait_ready()
    await engine.shutdown()


async def test_an_engine_process_that_talks_nonsense_is_dropped():
    script = "import socket, sys; socket.socket(fileno=int(sys.argv[-1])).sendall(b'HTTP/1.1 200 OK')"
    engine = scripted_engine(EngineConfig(), lambda replica: ProcessClient(command=[sys.executable, "-c", script]))
    await engine.start()
    with pytest.raises(EngineDeadError, match="no message"):
        await engine.wait_ready()
    await engine.shutdown()


def test_the_module_leaves_torch_alone():
    script = (
        "import sys\n"
        "import aios_serve.async_engine, aios_serve.config, aios_serve.outputs, aios_serve.errors, aios_serve.engine\n"
        "from aios_serve.served_model import ServedModel, find_model\n"
        "from aios_serve.config import EngineConfig\n"
        "ServedModel.read(EngineConfig(), find_model(EngineConfig()))\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'fastapi' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# The real thing: the bundled model, built once.


@pytest.fixture(scope="module")
def config():
    return EngineConfig(max_num_seqs=4, max_model_len=512, max_num_batched_tokens=64, threads=1, dtype="float32")


@pytest.mark.slow
async def test_a_question_is_answered_and_torch_stays_in_the_other_process(config):
    engine = AsyncEngine(config)
    details = set()
    await engine.start()
    ready = asyncio.create_task(engine.wait_ready())
    while not ready.done():
        details.add(engine.state_detail.rstrip("0123456789%"))
        await asyncio.sleep(0.01)
    await ready
    assert {"importing torch", "loading weights "} <= details
    assert engine.info.import_seconds > 0
    prompt = engine.tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    params = SamplingParams(temperature=0, max_tokens=30)
    output = RequestOutput.empty(request_id="", prompt_token_ids=prompt)
    async for delta in engine.generate(prompt, params):
        output.add(delta)
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"
    await assert_idle(engine)
    await engine.shutdown()
