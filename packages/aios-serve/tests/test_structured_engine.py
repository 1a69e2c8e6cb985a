"""Structured outputs of the bundled model, and requests that wait for their grammar beside the steps of others."""

import importlib.util
import json
from concurrent.futures import Future
from pathlib import Path
from random import Random
from types import SimpleNamespace

import jsonschema
import pytest

from aios_model.errors import InvalidRequestError
from aios_serve import InferenceEngine, SamplingParams
from aios_serve.channel import ChannelClosedError
from aios_serve.engine_loop import EngineLoop
from aios_serve.messages import Abort, AddRequest, ChildRequest, Heartbeat, RequestFailed

spec = importlib.util.spec_from_file_location("structured_cases", Path(__file__).with_name("structured_cases.py"))
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)


def generate(engine, prompts, params):
    return [output.outputs[0] for output in engine.generate(prompts, params)]


def test_outputs_validate_and_are_the_same_alone_batched_and_preempted():
    schemas = [cases.random_schema(Random(seed)) for seed in range(6)]
    params = [
        SamplingParams(temperature=0.7 * (seed % 2), seed=seed, max_tokens=80, structured_outputs={"json": schema})
        for seed, schema in enumerate(schemas)
    ]
    prompts = [f"A JSON document, number {seed}: " for seed in range(6)]
    with InferenceEngine(max_model_len=128, max_num_seqs=6) as engine:
        together = generate(engine, prompts, params)
        alone = [generate(engine, [prompt], each)[0] for prompt, each in zip(prompts, params, strict=True)]
    with InferenceEngine(max_model_len=128, max_num_seqs=6, num_gpu_blocks_override=9) as small:
        crowded = generate(small, prompts, params)
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    assert [each.token_ids for each in together] == [each.token_ids for each in crowded]
    finished = [
        (each.text, schema) for each, schema in zip(together, schemas, strict=True) if each.finish_reason == "stop"
    ]
    assert len(finished) >= 4
    for text, schema in finished:
        jsonschema.validate(json.loads(text), schema)


def test_min_tokens_gives_way_and_ignore_eos_shows_in_no_text():
    choice = {"structured_outputs": {"choice": ["yes", "no"]}, "temperature": 0}
    with InferenceEngine(max_model_len=64, max_num_seqs=2) as engine:
        short, on = generate(
            engine,
            ["Yes or no? "] * 2,
            [
                SamplingParams(min_tokens=30, max_tokens=40, **choice),
                SamplingParams(ignore_eos=True, max_tokens=12, **choice),
            ],
        )
        assert short.text in ("yes", "no")
        assert (short.finish_reason, len(short.token_ids) < 8) == ("stop", True)
        assert (on.text, on.finish_reason, len(on.token_ids)) == (short.text, "length", 12)
        with pytest.raises(InvalidRequestError, match="unclosed group"):
            engine.generate(["x"], SamplingParams(structured_outputs={"regex": "(a"}))
        with pytest.raises(InvalidRequestError, match="end-of-sequence"):
            engine.generate(["x"], SamplingParams(allowed_token_ids=[50], **choice))


class Port:
    """Holds back what is being prepared; writes down what it is told."""

    def __init__(self):
        self.futures: dict[str, Future] = {}
        self.added: list[tuple[str, list[str]]] = []
        self.has_unfinished = False

    def prepare(self, message):
        return self.futures.setdefault(message.key, Future()) if message.key != "plain" else None

    def add(self, message):
        self.added.append((message.key, [child.engine_id for child in message.children]))

    def abort(self, engine_ids):
        pass

    def check(self):
        pass

    def stats(self):
        return SimpleNamespace()


class Channel:
    """Plays back batches of commands; callables are called in their turn."""

    def __init__(self, script):
        self.script = script
        self.sent: list = []

    def receive(self, timeout):
        if not self.script:
            raise ChannelClosedError
        batch = self.script.pop(0)
        return batch() or [] if callable(batch) else batch

    def send(self, event):
        self.sent.append(event)


def request(key, num_children=1):
    return AddRequest(
        key=key,
        children=[ChildRequest(engine_id=f"{key}-{index}", seed=index) for index in range(num_children)],
        prompt_token_ids=[1],
        params=SamplingParams(),
        eos_token_ids=(2,),
        arrival_time=0.0,
    )


def test_requests_wait_for_their_grammar_and_others_pass_them():
    port = Port()
    channel = Channel(
        [
            [request("slow", 2), request("broken"), request("gone"), request("plain")],
            [Abort(engine_ids=["slow-0", "gone-0"])],
            lambda: port.futures["broken"].set_exception(InvalidRequestError("no", param="structured_outputs")),
            lambda: port.futures["slow"].set_result(None),
            lambda: port.futures["gone"].set_result(None),
        ]
    )
    with pytest.raises(ChannelClosedError):
        EngineLoop(port, channel).run()
    assert port.added == [("plain", ["plain-0"]), ("slow", ["slow-1"])]
    [failed] = [event for event in channel.sent if not isinstance(event, Heartbeat)]
    assert isinstance(failed, RequestFailed)
    assert (failed.key, failed.kind, failed.param) == ("broken", "invalid", "structured_outputs")
