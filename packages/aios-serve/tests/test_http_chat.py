"""`/v1/chat/completions`, answered in one piece."""

from __future__ import annotations

import pytest

from aios_model.generation_config import GenerationDefaults

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("path", [PATH, "/v1/completions"])
@pytest.mark.parametrize(
    ("header", "fields", "session"),
    [
        ("s", {"prompt_cache_key": "k", "user": "u"}, "s"),
        (None, {"prompt_cache_key": "k", "user": "u"}, "k"),
        (None, {"user": "u"}, "u"),
        (None, {}, ""),
    ],
)
async def test_a_session_is_named_by_header_cache_key_or_user(client, engine, path, header, fields, session):
    headers = {} if header is None else {"X-Session-Id": header}
    response = await client.post(path, json={"messages": HELLO, "prompt": "a"} | fields, headers=headers)
    assert response.status_code == 200
    assert engine.calls[0].session == session


async def test_answer_has_the_shape_of_openai(client, engine):
    answer = (await client.post(PATH, json={"model": "org/tiny", "messages": HELLO})).json()
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1_700_000_000
    prompt = b"<user>Hi<assistant>"
    assert answer == {
        "object": "chat.completion",
        "model": "org/tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello!", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": 6,
            "total_tokens": len(prompt) + 6,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }
    assert bytes(engine.calls[0].prompt) == prompt
    assert engine.calls[0].request_id.startswith("chatcmpl-")


async def test_every_sampling_field_reaches_the_engine(client, engine):
    fields = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1.5,
        "frequency_penalty": -1,
        "repetition_penalty": 1.1,
        "seed": -5,
        "min_tokens": 2,
        "stop": ["a", "b"],
        "stop_token_ids": [5],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "logit_bias": {"65": -100, "66": 2.5},
        "allowed_token_ids": [65, 66],
        "bad_words": ["bad"],
        "skip_special_tokens": False,
    }
    body = {"messages": HELLO, "max_tokens": 9, "logprobs": True, "top_logprobs": 3, "priority": 4, "cache_salt": "s"}
    assert (await client.post(PATH, json=body | fields)).status_code == 200
    [call] = engine.calls
    expected = fields | {"stop": ("a", "b"), "stop_token_ids": (5,), "allowed_token_ids": (65, 66)}
    expected |= {"bad_words": ("bad",), "logit_bias": {65: -100.0, 66: 2.5}, "max_tokens": 9, "logprobs": 3}
    assert {name: getattr(call.params, name) for name in expected} == expected
    assert (call.priority, call.cache_salt) == (4, "s")


async def test_null_means_not_given(client, engine):
    body = {"messages": HELLO, "temperature": None, "n": None, "stop": None, "stream": None, "logit_bias": None}
    assert (await client.post(PATH, json=body)).status_code == 200
    assert engine.calls[0].params.temperature == 1.0


async def test_defaults_come_from_the_generation_config_and_yield_to_the_request(client, engine):
    engine.generation_defaults = GenerationDefaults(temperature=0.6, top_k=20, max_new_tokens=30)
    await client.post(PATH, json={"messages": HELLO, "top_k": 5})
    params = engine.calls[0].params
    assert (params.temperature, params.top_k, params.max_tokens) == (0.6, 5, 30)


async def test_max_tokens_defaults_to_the_context_left(client, engine):
    await client.post(PATH, json={"messages": HELLO})
    assert engine.calls[0].params.max_tokens == engine.max_model_len - len(engine.calls[0].prompt)


async def test_max_completion_tokens_wins_over_max_tokens(client, engine):
    await client.post(PATH, json={"messages": HELLO, "max_completion_tokens": 5, "max_tokens": 6})
    assert engine.calls[0].params.max_tokens == 5


async def test_max_tokens_beyond_the_context_is_refused_with_the_numbers(client, engine):
    response = await client.post(PATH, json={"messages": HELLO, "max_tokens": 256})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "256" in error["message"]
    assert "19" in error["message"]
    assert engine.calls == []


async def test_too_long_a_prompt_is_refused_with_the_numbers(client):
    response = await client.post(PATH, json={"messages": [{"role": "user", "content": "x" * 300}]})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages")
    assert "maximum context length is 256 tokens" in error["message"]
    assert "317" in error["message"]


@pytest.mark.parametrize(("limit", "kept"), [(10, 10), (-1, 256 - 50)])
async def test_truncate_prompt_tokens_keeps_the_end(client, engine, limit, kept):
    content = "x" * 300
    body = {"messages": [{"role": "user", "content": content}], "truncate_prompt_tokens": limit, "max_tokens": 50}
    assert (await client.post(PATH, json=body)).status_code == 200
    assert len(engine.calls[0].prompt) == kept
    assert bytes(engine.calls[0].prompt).endswith(b"<assistant>"[-kept:])


async def test_n_choices_come_back_in_order(client):
    answer = (await client.post(PATH, json={"messages": HELLO, "n": 3, "temperature": 0})).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 18
    assert answer["usage"]["prompt_tokens"] == 19


async def test_text_parts_are_joined_and_developer_speaks_as_system(client, engine):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "42", "tool_call_id": "x"},
    ]
    await client.post(PATH, json={"messages": messages})
    assert bytes(engine.calls[0].prompt) == b"<system>Be brief.<user>a\nb<assistant><tool>42<assistant>"


async def test_template_kwargs_reach_the_template(client, engine):
    await client.post(PATH, json={"messages": HELLO, "chat_template_kwargs": {"enable_thinking": False}})
    assert bytes(engine.calls[0].prompt) == b"<user>Hi[enable_thinking=False]<assistant>"


@pytest.mark.parametrize("name", ["tools", "add_generation_prompt", "chat_template"])
async def test_template_kwargs_cannot_replace_what_the_server_sets(client, name):
    response = await client.post(PATH, json={"messages": HELLO, "chat_template_kwargs": {name: 1}})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "chat_template_kwargs")


async def test_continue_final_message_ends_the_prompt_with_its_text(client, engine):
    messages = [*HELLO, {"role": "assistant", "content": "Well, "}]
    response = await client.post(PATH, json={"messages": messages, "continue_final_message": True})
    assert response.status_code == 200
    assert bytes(engine.calls[0].prompt) == b"<user>Hi<assistant>Well,"


async def test_generation_prompt_can_be_left_out(client, engine):
    await client.post(PATH, json={"messages": HELLO, "add_generation_prompt": False})
    assert bytes(engine.calls[0].prompt) == b"<user>Hi"


async def test_logprobs_name_each_token_with_its_alternatives(client):
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2}
    content = (await client.post(PATH, json=body)).json()["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == "Hello!"
    assert content[0] == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "A", "logprob": -65.0, "bytes": [65]},
            {"token": "B", "logprob": -66.0, "bytes": [66]},
        ],
    }
    assert content[-1]["logprob"] == -9999.0  # minus infinity has no JSON


async def test_logprobs_without_alternatives(client):
    content = (await client.post(PATH, json={"messages": HELLO, "logprobs": True})).json()["choices"][0]["logprobs"]
    assert content["content"][0]["top_logprobs"] == []


async def test_stop_reason_and_finish_reason_are_passed_on(client, engine):
    engine.finish_reason, engine.stop_reason = "stop", "END"
    choice = (await client.post(PATH, json={"messages": HELLO, "stop": "END"})).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "END")


async def test_long_prompts_are_tokenized_off_the_event_loop(client, engine, monkeypatch):
    import threading

    threads = []

    def encode_chat(self, messages, **kwargs):
        threads.append(threading.current_thread())
        return [1, 2, 3]

    monkeypatch.setattr(type(engine.tokenizer), "encode_chat", encode_chat)
    await client.post(PATH, json={"messages": [{"role": "user", "content": "x" * 50_000}]})
    await client.post(PATH, json={"messages": HELLO})
    assert threads[0] is not threading.main_thread()
    assert threads[1] is threading.main_thread()
