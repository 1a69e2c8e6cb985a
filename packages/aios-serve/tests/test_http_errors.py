"""Every error has one shape, a fitting status, and a message that helps."""

from __future__ import annotations

import json
import time

import pytest

from aios_sched.errors import QueueFullError
from aios_serve.async_engine import EngineState

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO = [{"role": "user", "content": "Hi"}]
JSON = {"content-type": "application/json"}


def error_of(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


async def test_unknown_route_is_404(client):
    assert error_of(await client.get("/v1/nothing"), 404)["code"] == "not_found"


async def test_routes_do_not_redirect(client):
    error_of(await client.post(CHAT + "/", json={"messages": HELLO}), 404)


async def test_wrong_method_is_405_and_names_the_right_one(client):
    response = await client.get(CHAT)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b'{"messages": [}', "JSON"),
        (b'{"temperature": NaN}', "JSON"),
        (b'{"temperature": Infinity}', "JSON"),
        (b'{"temperature": 1e999}', "JSON"),
        (b'{"prompt": "\xff\xfe"}', "UTF-8"),
        (b"[1]", "object"),
        (b'"x"', "object"),
        (b'{"a":' * 10_000, "nested"),
        (b'{"messages":' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nested"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
async def test_malformed_bodies_are_400(client, path, body, what):
    assert what in error_of(await client.post(path, content=body, headers=JSON), 400)["message"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"])
async def test_wrong_content_type_is_400(client, content_type):
    body = json.dumps({"messages": HELLO}).encode()
    error = error_of(await client.post(CHAT, content=body, headers={"content-type": content_type}), 400)
    assert "application/json" in error["message"]


async def test_content_type_may_carry_a_charset(client):
    headers = {"content-type": "application/json; charset=utf-8"}
    response = await client.post(CHAT, content=json.dumps({"messages": HELLO}).encode(), headers=headers)
    assert response.status_code == 200


async def test_declared_body_too_large_is_413_before_it_is_read(make_client):
    client = make_client(max_body_bytes=1000)
    error = error_of(await client.post(CHAT, content=b"x" * 1001, headers=JSON), 413)
    assert "1000 bytes" in error["message"]


async def test_undeclared_body_too_large_is_413_while_it_is_read(make_client):
    read = 0

    async def endless():
        nonlocal read
        while True:
            read += 100
            yield b"x" * 100

    error_of(await make_client(max_body_bytes=1000).post(CHAT, content=endless(), headers=JSON), 413)
    assert read <= 1200


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(name, value) for name in ("n", "max_tokens") for value in (0, -1, 2**63, 10**9, 1.5, "3", True)],
        *[(name, value) for name in ("min_tokens", "seed") for value in (-(2**63) - 1, 2**63, 1.5, "3", True)],
        *[("top_k", value) for value in (-2, 2**63, 1.5, "3")],
        *[("temperature", value) for value in (-0.1, 2.1, "hot", True)],
        *[("top_p", value) for value in (0, 1.1, -1)],
        *[("min_p", value) for value in (-0.1, 1.1)],
        *[(name, value) for name in ("presence_penalty", "frequency_penalty") for value in (-2.1, 2.1)],
        *[("repetition_penalty", value) for value in (0, -1)],
        *[("stop", value) for value in ("", [""], [1], 5, ["a", None])],
        *[("stop_token_ids", value) for value in ([-1], [300], ["a"], [2**63], 5)],
        *[("allowed_token_ids", value) for value in ([], [-1], [300])],
        *[("bad_words", value) for value in ([""], "bad", [1])],
        *[("logit_bias", value) for value in ({"a": 1}, {"-1": 1}, {"300": 1}, {"5": 101}, {"5": "x"}, [1])],
        *[("stream", value) for value in ("yes", 1)],
        *[("priority", value) for value in (2**63, "high")],
        *[("cache_salt", value) for value in ("", "x" * 129, 5)],
        *[("truncate_prompt_tokens", value) for value in (0, -2, "all")],
        *[("ignore_eos", value) for value in ("no", 0)],
        ("stream_options", {"include_usage": "yes"}),
        ("model", 5),
    ],
)
async def test_wrong_values_are_400_and_name_the_field(client, engine, path, field, value):
    response = await client.post(path, json={"messages": HELLO, "prompt": "a", field: value})
    error = error_of(response, 400)
    assert error["param"].split(".")[0] == field
    assert field in error["message"]
    assert engine.calls == []


@pytest.mark.parametrize(("path", "field"), [(CHAT, "top_logprobs"), (COMPLETIONS, "logprobs")])
@pytest.mark.parametrize("value", [-1, 21, 2**63, "3"])
async def test_number_of_logprobs_is_bounded(client, path, field, value):
    body = {"messages": HELLO, "prompt": "a", field: value} | ({"logprobs": True} if path == CHAT else {})
    assert "logprobs" in error_of(await client.post(path, json=body), 400)["message"]


async def test_top_logprobs_need_logprobs(client):
    error_of(await client.post(CHAT, json={"messages": HELLO, "top_logprobs": 2}), 400)


async def test_min_tokens_may_not_exceed_max_tokens(client):
    body = {"messages": HELLO, "min_tokens": 20, "max_tokens": 10}
    assert error_of(await client.post(CHAT, json=body), 400)["param"] == "min_tokens"


@pytest.mark.parametrize(
    "body",
    [
        {"logit_bias": {str(token): 1 for token in range(1_000_000)}},
        {"logit_bias": {str(token): "x" for token in range(500_000)}},
        {"stop_token_ids": ["x"] * 1_000_000},
        {"stop": ["x"] * 1_000_000},
        {"messages": [{"role": "nobody"}] * 300_000},
    ],
    ids=["logit_bias", "wrong logit_bias", "stop_token_ids", "stop", "messages"],
)
async def test_a_million_items_are_refused_quickly(make_client, body):
    client = make_client(max_body_bytes=100_000_000)
    content = json.dumps({"messages": HELLO} | body).encode()
    started = time.process_time()
    response = await client.post(CHAT, content=content, headers=JSON)
    assert time.process_time() - started < 2
    error_of(response, 400)
    assert len(response.content) < 2000


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "Hi",
        ["Hi"],
        [{"content": "no role"}],
        [{"role": "king", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}],
    ],
)
async def test_malformed_messages_are_400(client, messages):
    assert error_of(await client.post(CHAT, json={"messages": messages}), 400)["param"].startswith("messages")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_id": "x"}},
        {"type": "video_url", "video_url": {"url": "file:///etc/passwd"}},
    ],
)
async def test_other_modalities_are_refused_by_name(client, part):
    error = error_of(await client.post(CHAT, json={"messages": [{"role": "user", "content": [part]}]}), 400)
    assert part["type"] in error["message"]


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        *[
            (path, field, value)
            for path in (CHAT, COMPLETIONS)
            for field, value in (
                ("prompt_logprobs", 0),
                ("use_beam_search", True),
                ("length_penalty", 0.5),
                ("best_of", 3),
                ("guided_json", {}),
                ("return_token_ids", True),
                ("prompt_embeds", "x"),
            )
        ],
        (COMPLETIONS, "suffix", "x"),
        (CHAT, "functions", [{"name": "f"}]),
        (CHAT, "chat_template", "{{ 1 }}"),
        (CHAT, "documents", [{"text": "x"}]),
        (CHAT, "modalities", ["text", "audio"]),
        (CHAT, "audio", {"voice": "x"}),
        ("/tokenize", "chat_template", "{{ 1 }}"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(client, engine, path, field, value):
    body = {"messages": HELLO, "prompt": "a", field: value}
    error = error_of(await client.post(path, json=body), 400)
    assert error["code"] == "unsupported_parameter"
    assert error["param"] == field
    assert field in error["message"]
    assert engine.calls == []


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "structured_outputs": {}},
        {"best_of": 1, "use_beam_search": False, "length_penalty": 1.0, "prompt_logprobs": None},
        {"suffix": "", "modalities": ["text"], "store": False, "metadata": {}, "user": "me"},
        {"something_new": {"a": [1]}},
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_fields_that_ask_for_nothing_and_unknown_ones_are_accepted(client, path, fields):
    response = await client.post(path, json={"messages": HELLO, "prompt": "a"} | fields)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize"])
async def test_unknown_model_is_404_and_lists_what_is_served(client, path):
    response = await client.post(path, json={"model": "gpt-9", "messages": HELLO, "prompt": "a"})
    error = error_of(response, 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "org/tiny" in error["message"]
    assert "gpt-9" in error["message"]


async def test_template_error_is_400_with_the_templates_words(client):
    response = await client.post(CHAT, json={"messages": [{"role": "user", "content": "refuse me"}]})
    error = error_of(response, 400)
    assert error["code"] == "chat_template_error"
    assert "does not like" in error["message"]


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (EngineState.LOADING, "engine_loading"),
        (EngineState.DRAINING, "engine_draining"),
        (EngineState.RESTARTING, "engine_restarting"),
        (EngineState.DEAD, "engine_dead"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
async def test_engine_that_takes_no_requests_is_503_with_retry_after(client, engine, path, state, code):
    engine.state, engine.state_detail = state, "loading weights 41%"
    response = await client.post(path, json={"messages": HELLO, "prompt": "a", "tokens": [1]})
    error = error_of(response, 503)
    assert error["code"] == code
    assert int(response.headers["retry-after"]) >= 1
    assert ("41%" in error["message"]) == (state is EngineState.LOADING)  # reasons of a death are for the log


async def test_full_queue_is_503_with_retry_after(client, engine):
    engine.error = QueueFullError("1024 requests wait")
    response = await client.post(CHAT, json={"messages": HELLO})
    assert error_of(response, 503)["code"] == "queue_full"
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_hopelessly_long_a_text_is_refused_before_it_is_tokenized(client, engine, path, monkeypatch):
    monkeypatch.setattr(type(engine.tokenizer), "encode_batch", lambda *_, **__: pytest.fail("tokenized"))
    monkeypatch.setattr(type(engine.tokenizer), "encode_chat", lambda *_, **__: pytest.fail("tokenized"))
    text = "x" * 5_000_000
    response = await client.post(path, json={"messages": [{"role": "user", "content": text}], "prompt": text})
    error = error_of(response, 400)
    assert error["code"] == "context_length_exceeded"
    assert "5000000 characters" in error["message"]


async def test_unexpected_error_is_500_without_details_and_is_logged(client, engine, caplog):
    engine.error = KeyError("/srv/secret/file.py")
    error = error_of(await client.post(CHAT, json={"messages": HELLO}), 500)
    assert "/srv" not in error["message"]
    assert error["code"] == "internal_error"
    assert "/srv/secret/file.py" in caplog.text


async def test_server_goes_on_after_an_error(client, engine):
    engine.error = RuntimeError("once")
    await client.post(CHAT, json={"messages": HELLO})
    engine.error = None
    assert (await client.post(CHAT, json={"messages": HELLO})).status_code == 200
