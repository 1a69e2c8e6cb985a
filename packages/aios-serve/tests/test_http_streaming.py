"""Streams: their chunks, their errors, and clients that go away."""

from __future__ import annotations

import asyncio
import json

import pytest

from aios_model.errors import InvalidRequestError
from aios_sched.errors import QueueFullError
from aios_serve.errors import EngineDeadError, RequestFailedError

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO = [{"role": "user", "content": "Hi"}]


def events(text):
    """The JSON of each event, and `[DONE]` as it is."""
    found = [event for event in text.split("\n\n") if event]
    assert all(event.startswith("data: ") for event in found)
    return [event if event == "[DONE]" else json.loads(event) for event in (e.removeprefix("data: ") for e in found)]


async def stream(client, path, **body):
    prompt = {"messages": HELLO} if path == CHAT else {"prompt": "ab"}
    response = await client.post(path, json=prompt | {"stream": True} | body)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response.text)
    assert chunks.pop() == "[DONE]"
    return chunks


async def test_chat_stream_begins_with_the_role_and_ends_with_the_finish_reason(client):
    chunks = await stream(client, CHAT)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {"content": "!"},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert all("usage" not in chunk for chunk in chunks)


async def test_completion_stream(client):
    chunks = await stream(client, COMPLETIONS)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Hel", "lo", "!"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_finish_reason_comes_exactly_once_per_choice(client, path):
    chunks = await stream(client, path, n=3)
    finished = [c["index"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"] is not None]
    assert sorted(finished) == [0, 1, 2]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_usage_comes_last_with_no_choices_if_asked_for(client, path):
    *chunks, usage = await stream(client, path, stream_options={"include_usage": True})
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 6
    assert usage["usage"]["total_tokens"] == usage["usage"]["prompt_tokens"] + 6
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_continuous_usage_counts_up(client, path):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await stream(client, path, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[-4:] == [3, 5, 6, 6]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_stream_options_need_a_stream(client, path):
    body = {"messages": HELLO, "prompt": "a", "stream_options": {"include_usage": True}}
    response = await client.post(path, json=body)
    assert response.status_code == 400
    assert "stream_options" in response.json()["error"]["message"]


async def test_text_that_is_held_back_makes_no_chunk_and_loses_no_logprobs(client, engine):
    engine.pieces = ["", "é", "", "!"]
    chunks = await stream(client, CHAT, logprobs=True)
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", "é", "!"]
    entries = [entry for chunk in chunks[1:] for entry in chunk["choices"][0]["logprobs"]["content"]]
    assert len(entries) == 5  # three tokens with "é", two with "!"


async def test_completion_logprobs_go_on_where_the_last_chunk_ended(client):
    chunks = await stream(client, COMPLETIONS, logprobs=1)
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0, 1, 2], [3, 4], [5]]


async def test_echo_streams_the_prompt_first(client):
    chunks = await stream(client, COMPLETIONS, echo=True)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["ab", "Hel", "lo", "!"]


async def test_non_ascii_and_newlines_survive_the_stream(client, engine):
    engine.pieces = ["日本\n\n", "data: x\r\n", "🙂"]
    chunks = await stream(client, CHAT)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "日本\n\ndata: x\r\n🙂"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequestError("never fits", param="prompt"), 400),
        (QueueFullError("1024 requests wait"), 503),
        (EngineDeadError("killed"), 503),
        (RequestFailedError("boom", request_id="x"), 500),
        (RuntimeError("boom"), 500),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_what_fails_before_the_first_output_is_a_plain_http_error(client, engine, error, status, path):
    engine.error = error
    response = await client.post(path, json={"messages": HELLO, "prompt": "a", "stream": True})
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_what_fails_later_is_an_event_and_done_still_follows(client, engine, path):
    engine.error, engine.error_at = RuntimeError("secret /srv/path"), 2
    response = await client.post(path, json={"messages": HELLO, "prompt": "a", "stream": True})
    *_, error, done = events(response.text)
    assert done == "[DONE]"
    assert error["error"]["type"] == "server_error"
    assert "/srv" not in response.text


async def test_nothing_is_sent_before_the_first_output(connect, engine):
    engine.hold = 0
    connection = connect(CHAT, {"messages": HELLO, "stream": True})
    await engine.held.wait()
    await asyncio.sleep(0.02)
    assert connection.status is None
    engine.go.set()
    await connection.finish()
    assert connection.status == 200
    assert connection.chunks[-1] == b"data: [DONE]\n\n"


async def test_chunks_are_sent_as_they_come(connect, engine):
    engine.hold = 2
    connection = connect(CHAT, {"messages": HELLO, "stream": True})
    await connection.wait_for_chunks(3)  # role, "Hel", "lo"
    assert b"lo" in connection.chunks[2]
    assert not connection.task.done()
    engine.go.set()
    await connection.finish()


async def test_silence_is_broken_by_comments(connect, engine):
    engine.hold = 1
    connection = connect(CHAT, {"messages": HELLO, "stream": True}, keep_alive_interval=0.02)
    await connection.wait_for_chunks(5)
    assert connection.chunks[2:5] == [b": keep-alive\n\n"] * 3
    engine.go.set()
    await connection.finish()
    assert connection.chunks[-1] == b"data: [DONE]\n\n"


@pytest.mark.parametrize("hold", [0, 1, 2])
@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(("path", "prompt"), [(CHAT, "Hi"), (COMPLETIONS, "a"), (COMPLETIONS, ["a", "b", "c"])])
async def test_client_that_goes_away_aborts_its_requests(connect, engine, path, prompt, streamed, hold):
    engine.hold = hold
    connection = connect(path, {"messages": HELLO, "prompt": prompt, "stream": streamed})
    await engine.held.wait()
    if streamed and hold:
        await connection.wait_for_chunks(1)
    await asyncio.sleep(0)
    await connection.disconnect()
    assert engine.num_open_requests == 0
    assert sorted(engine.aborted) == sorted(call.request_id for call in engine.calls)


async def test_client_that_cannot_be_written_to_aborts_its_request(make_client, engine):
    from aios_serve.app import create_app
    from aios_serve.server_config import ServerConfig

    app = create_app(engine, ServerConfig())
    body = json.dumps({"messages": HELLO, "stream": True}).encode()
    asked = False

    async def receive():
        nonlocal asked
        if asked:
            await asyncio.Event().wait()
        asked = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        if message["type"] == "http.response.body":
            raise OSError("connection reset")

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b""}
    with pytest.raises(OSError, match="connection reset"):
        await app(scope, receive, send)
    assert engine.num_open_requests == 0
    assert len(engine.aborted) == 1
