"""Priorities, tenants and time-outs, from the request to the scheduler."""

from __future__ import annotations

import importlib.util
import time
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from aios_model.errors import ConfigError, InvalidRequestError
from aios_model.sampling.params import SamplingParams
from aios_serve.app import create_app
from aios_serve.async_engine import AsyncEngine
from aios_serve.config import EngineConfig
from aios_serve.engine_client import ThreadClient
from aios_serve.engine_process import serve
from aios_serve.outputs import RequestOutput
from aios_serve.server_config import ServerConfig

spec = importlib.util.spec_from_file_location("scripted", Path(__file__).with_name("scripted.py"))
scripted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripted)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODY = {"messages": [{"role": "user", "content": "hello"}], "prompt": "hello"}


@asynccontextmanager
async def running(**options):
    engine = AsyncEngine(
        EngineConfig(max_num_seqs=4, **options),
        new_client=lambda replica: ThreadClient(lambda channel: serve(channel, scripted.build_scripted)),
        find=scripted.find_scripted,
        read=scripted.read_scripted,
    )
    await engine.start()
    await engine.wait_ready()
    try:
        yield engine
    finally:
        await engine.shutdown()


async def output_of(engine, text, **options):
    output = RequestOutput.empty(request_id="", prompt_token_ids=[], num_choices=1)
    async for delta in engine.generate(list(text.encode()), SamplingParams(max_tokens=50), **options):
        output.add(delta)
    return output.outputs[0]


# -- in the engine -----------------------------------------------------------------------------------------------------


async def test_request_past_its_deadline_ends_with_what_it_has():
    async with running() as engine:
        output = await output_of(engine, scripted.SLOW + "bc", deadline=time.monotonic() + 0.3)
        assert output.finish_reason == "timeout"
        assert 0 < len(output.token_ids) < 50
        assert engine.stats().kv_cache_usage == 0


@pytest.mark.parametrize("seconds", [None, 100])
async def test_server_limits_what_a_request_may_take(seconds):
    async with running(request_timeout=0.3) as engine:
        deadline = None if seconds is None else time.monotonic() + seconds
        assert (await output_of(engine, scripted.SLOW + "bc", deadline=deadline)).finish_reason == "timeout"
        assert (await output_of(engine, "fast", deadline=deadline)).finish_reason == "length"


async def test_priority_is_refused_without_the_policy_and_out_of_range_with_it():
    async with running() as engine:
        with pytest.raises(InvalidRequestError, match="--scheduling-policy priority") as caught:
            await output_of(engine, "abc", priority=1)
        assert caught.value.param == "priority"
    async with running(scheduling_policy="priority") as engine:
        assert (await output_of(engine, "abc", priority=1)).finish_reason == "length"
        with pytest.raises(InvalidRequestError, match="does not exist"):
            await output_of(engine, "abc", priority=1000)


async def test_tenant_that_is_not_listed_is_refused():
    async with running(scheduling_policy="fair", tenant_weights={"a": 2.0}) as engine:
        assert (await output_of(engine, "abc", tenant="a")).finish_reason == "length"
        assert (await output_of(engine, "abc")).finish_reason == "length"
        with pytest.raises(InvalidRequestError, match=r"tenant 'b' does not exist") as caught:
            await output_of(engine, "abc", tenant="b")
        assert caught.value.param == "tenant"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheduling_policy": "lottery"}, ["scheduling_policy='lottery'", "fcfs, priority, fair, prefix"]),
        ({"priority_aging_seconds": 3.0}, ["priority_aging_seconds=3.0", "scheduling_policy='priority'"]),
        ({"scheduling_policy": "priority", "priority_aging_seconds": 0.0}, ["priority_aging_seconds=0.0", "positive"]),
        ({"tenant_weights": {"a": 1}}, ["tenant_weights", "scheduling_policy='fair'"]),
        ({"scheduling_policy": "fair", "tenant_weights": {"a": 0}}, ["tenant_weights", "positive"]),
        ({"scheduling_policy": "fair", "tenant_weights": [("a", 1)]}, ["tenant_weights", "dict"]),
        ({"request_timeout": -1.0}, ["request_timeout=-1.0", "positive"]),
    ],
)
def test_options_without_effect_or_sense_are_refused(options, words):
    with pytest.raises(ConfigError) as refusal:
        EngineConfig(**options)
    assert all(word in str(refusal.value) for word in words)


# -- over HTTP ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({}, None),
        ({"timeout": 5}, 5),
        ({"timeout": 2.5, "deadline": 100}, 2.5),
        ({"timeout": 100, "deadline": 7}, 7),
    ],
)
async def test_timeout_and_deadline_reach_the_engine(client, engine, path, fields, seconds):
    if "deadline" in fields:
        fields = fields | {"deadline": time.time() + fields["deadline"]}
    before = time.monotonic()
    assert (await client.post(path, json=BODY | fields)).status_code == 200
    [call] = engine.calls
    assert call.tenant == "default"
    if seconds is None:
        assert call.deadline is None
    else:
        assert seconds - 0.5 < call.deadline - before < seconds + 5


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("field", "value"),
    [("timeout", 0), ("timeout", -1), ("timeout", "5"), ("deadline", 0), ("deadline", 1.7e9), ("deadline", "soon")],
)
async def test_a_deadline_in_the_past_is_400(client, engine, path, field, value):
    response = await client.post(path, json=BODY | {field: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    assert engine.calls == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("options", "fields", "param", "words"),
    [
        ({}, {"priority": 1}, "priority", ["priority", "--scheduling-policy priority"]),
        ({"scheduling_policy": "fair"}, {"priority": -1}, "priority", ["--scheduling-policy priority"]),
        (
            {"scheduling_policy": "priority"},
            {"priority": 101},
            "priority",
            ["101", "does not exist", "-100, the least 100"],
        ),
        ({"scheduling_policy": "priority"}, {"priority": -(2**62)}, "priority", ["does not exist"]),
        (
            {"scheduling_policy": "fair", "tenant_weights": {"key-2": 1.0}},
            {},
            "tenant",
            ["'key-1' does not exist", "key-2"],
        ),
        ({}, {"deadline": 1.7e9}, "deadline", ["deadline=1700000000.000", "in the future"]),
        ({}, {"timeout": 0}, "timeout", ["timeout", "greater than 0"]),
    ],
)
async def test_what_does_not_exist_or_is_past_is_400_and_says_so(path, options, fields, param, words, stream):
    keys = ServerConfig(api_keys=("one", "two"))
    async with running(**options) as engine:
        transport = httpx.ASGITransport(app=create_app(engine, keys))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            headers = {"Authorization": "Bearer one"}
            response = await client.post(path, json=BODY | {"stream": stream} | fields, headers=headers)
            assert response.status_code == 400
            error = response.json()["error"]
            assert (error["param"], error["type"]) == (param, "invalid_request_error")
            assert all(word in error["message"] for word in words), error["message"]
            other = await client.post(path, json=BODY, headers={"Authorization": "Bearer two"})
            assert other.status_code == 200


async def test_each_of_several_keys_is_a_tenant(make_client, engine):
    client = make_client(api_keys=("one", "two"))
    for key in ("two", "one"):
        assert (await client.post(CHAT, json=BODY, headers={"Authorization": f"Bearer {key}"})).status_code == 200
    assert [call.tenant for call in engine.calls] == ["key-2", "key-1"]
