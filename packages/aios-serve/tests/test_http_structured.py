"""`response_format` and `structured_outputs` over HTTP: what reaches the engine, and what is refused."""

import asyncio
import importlib.util
import json
import time
from pathlib import Path

import httpx
import pytest

from aios_model.sampling import StructuredOutputsParams
from aios_serve.app import create_app
from aios_serve.async_engine import AsyncEngine
from aios_serve.config import EngineConfig
from aios_serve.engine_client import ThreadClient
from aios_serve.engine_process import serve
from aios_serve.server_config import ServerConfig
from aios_serve.structured.errors import GrammarError

spec = importlib.util.spec_from_file_location("scripted", Path(__file__).with_name("scripted.py"))
scripted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripted)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"type": "null"}}}
NAMED = {"name": "thing", "schema": SCHEMA}


def body_of(path, **fields):
    prompt = {"messages": [{"role": "user", "content": "hello"}]} if path == CHAT else {"prompt": "hello"}
    return {**prompt, **fields}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": None, "structured_outputs": None}, None),
        ({"response_format": {"type": "text"}, "structured_outputs": {}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, {"json": SCHEMA}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {**NAMED, "strict": True, "description": "x"}}},
            {"json": SCHEMA},
        ),
        ({"structured_outputs": {"json": SCHEMA}}, {"json": SCHEMA}),
        ({"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}}, {"json": SCHEMA}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ("a", "b")}),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, {"grammar": 'start: "a"'}),
        (
            {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
            {"json_object": True, "disable_any_whitespace": True},
        ),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"disable_any_whitespace": True}},
            {"json_object": True, "disable_any_whitespace": True},
        ),
        ({"structured_outputs": {"regex": "a", "structural_tag": None, "unheard_of": 1}}, {"regex": "a"}),
    ],
)
async def test_constraints_reach_the_engine(client, engine, path, fields, expected):
    response = await client.post(path, json=body_of(path, **fields))
    assert response.status_code == 200, response.text
    constraint = None if expected is None else StructuredOutputsParams(**expected)
    assert engine.calls[-1].params.structured_outputs == constraint
    assert engine.checked == [constraint]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": "{}"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "text", "json_schema": NAMED}}, "response_format"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
        ),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"disable_any_whitespace": True}}, "structured_outputs"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " *"}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"enum": [str(i) for i in range(100_000)]}}}, "structured_outputs.json"),
        ({"guided_regex": "a"}, "guided_regex"),
    ],
)
async def test_malformed_or_contradicting_constraints_are_refused(client, engine, path, fields, param):
    response = await client.post(path, json=body_of(path, **fields))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert not engine.calls


async def test_a_schema_nested_a_thousand_deep_is_refused(client, engine):
    schema = '{"properties":{"a":' * 1000 + "{}" + "}}" * 1000
    for field, param in (
        ('"structured_outputs":{"json":%s}', None),
        ('"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":%s}}', None),
    ):
        text = '{"prompt":"a",' + field % schema + "}"
        response = await client.post(COMPLETIONS, content=text, headers={"content-type": "application/json"})
        assert response.status_code == 400, response.text[:300]
        assert "nest" in response.json()["error"]["message"]
        assert param is None
    assert not engine.calls


async def test_what_the_compiler_refuses_is_a_400_that_names_the_field_asked_for(client, engine):
    engine.grammar_error = GrammarError(
        "structured_outputs.json cannot be honoured: Invalid type: strin", param="structured_outputs.json"
    )
    fields = {"response_format": {"type": "json_schema", "json_schema": NAMED}, "stream": True}
    error = (await client.post(CHAT, json=body_of(CHAT, **fields))).json()["error"]
    assert error["param"] == "response_format.json_schema.schema"
    assert error["message"] == "response_format.json_schema.schema cannot be honoured: Invalid type: strin"
    error = (await client.post(CHAT, json=body_of(CHAT, structured_outputs={"json": SCHEMA}))).json()["error"]
    assert error["param"] == "structured_outputs.json"
    assert not engine.calls


async def test_the_document_describes_both_fields(client):
    document = (await client.get("/openapi.json")).json()
    for path in (CHAT, COMPLETIONS):
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        properties = content["schema"]["properties"]
        text = json.dumps([properties["response_format"], properties["structured_outputs"]])
        assert all(word in text for word in ("json_schema", '"schema"', "strict", '"json"', "regex", "choice"))


async def test_others_are_answered_while_a_constraint_compiles_and_it_gets_a_clear_answer():
    engine = AsyncEngine(
        EngineConfig(structured_outputs_timeout=2.0),
        new_client=lambda replica: ThreadClient(lambda channel: serve(channel, scripted.build_scripted)),
        find=scripted.find_scripted,
        read=scripted.read_scripted,
    )
    await engine.start()
    await engine.wait_ready()
    app = create_app(engine, ServerConfig())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        try:
            fine = {"prompt": "hello", "max_tokens": 5, "structured_outputs": {"regex": "hello"}}
            assert (await client.post(COMPLETIONS, json=fine)).status_code == 200  # a process has started
            slow = {**fine, "structured_outputs": {"regex": "(a|b*c)?" * 20_000}}
            compiling = asyncio.create_task(client.post(COMPLETIONS, json=slow))
            await asyncio.sleep(0.05)
            num_answered = 0
            while not compiling.done():
                started = time.monotonic()
                assert (await client.get("/health")).status_code == 200
                assert (await client.post(COMPLETIONS, json={"prompt": "other", "max_tokens": 3})).status_code == 200
                constrained = {**fine, "structured_outputs": {"regex": f"hello{num_answered}?"}}
                assert (await client.post(COMPLETIONS, json=constrained)).status_code == 200
                assert time.monotonic() - started < 1.5
                num_answered += 1
            assert num_answered >= 2
            response = await compiling
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "structured_outputs.regex"
            assert "takes longer than 2 s to compile" in response.json()["error"]["message"]
        finally:
            await engine.shutdown()
