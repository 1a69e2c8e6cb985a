"""Thoughts in chat completions: apart from the answer, whole and streamed, counted, and together with tools."""

from __future__ import annotations

import json

import pytest
from chat_templates import THINKING, THINKING_WITH_TOOLS, byte_tokenizer

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Is 7 prime?"}]
TOOL = {"type": "function", "function": {"name": "is_prime", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(autouse=True)
def thinking(engine):
    engine.tokenizer = byte_tokenizer(THINKING)
    engine.pieces = ["<think>", "\nOnly 1", " and 7.", "\n</thi", "nk>\n\nYes", "."]


def prompt_of(engine):
    return bytes(token for token in engine.calls[-1].prompt if token < 256).decode()


async def message_of(client, **fields):
    response = await client.post(CHAT, json={"messages": HELLO} | fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]


async def deltas_of(client, **fields):
    response = await client.post(CHAT, json={"messages": HELLO, "stream": True} | fields)
    assert response.status_code == 200, response.text
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    return [choice["delta"] for event in events for choice in json.loads(event)["choices"]]


async def test_thoughts_have_fields_of_their_own_under_both_names(client):
    message = await message_of(client)
    assert message["reasoning"] == message["reasoning_content"] == "Only 1 and 7."
    assert message["content"] == "Yes."


async def test_thoughts_are_streamed_as_they_come(client):
    deltas = await deltas_of(client)
    assert [delta["reasoning"] for delta in deltas if "reasoning" in delta] == ["Only 1", " and 7."]
    assert all(delta["reasoning"] == delta["reasoning_content"] for delta in deltas if "reasoning" in delta)
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes."


async def test_thoughts_are_counted(client):
    body = {"messages": HELLO}
    usage = (await client.post(CHAT, json=body)).json()["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": len("\nOnly 1 and 7.\n")}
    streamed = await client.post(CHAT, json=body | {"stream": True, "stream_options": {"include_usage": True}})
    assert json.loads(streamed.text.splitlines()[-4].removeprefix("data: "))["usage"] == usage


async def test_thoughts_that_the_prompt_opened_need_no_marker(client, engine):
    engine.pieces = ["Only 1 and 7.</think>Yes."]
    message = await message_of(client, chat_template_kwargs={"open_thinking": True})
    assert prompt_of(engine).endswith("<think>\n")
    assert (message["reasoning"], message["content"]) == ("Only 1 and 7.", "Yes.")


async def test_thoughts_that_the_prompt_closed_are_over(client, engine):
    engine.pieces = ["Yes."]
    message = await message_of(client, chat_template_kwargs={"enable_thinking": False})
    assert prompt_of(engine).endswith("</think>\n\n")
    assert (message["content"], "reasoning" in message) == ("Yes.", False)


async def test_thoughts_that_are_never_closed_leave_no_content(client, engine):
    engine.pieces, engine.finish_reason = ["<think>Hm, ", "let me see "], "length"
    message = await message_of(client)
    assert (message["content"], message["reasoning"]) == (None, "Hm, let me see")


async def test_deepseek_begins_with_thoughts_unless_told_otherwise(make_client, engine):
    engine.pieces = ["Only 1 and 7.</think>Yes."]
    async with make_client(reasoning_parser="deepseek_r1") as client:
        assert (await message_of(client))["reasoning"] == "Only 1 and 7."


async def test_the_split_can_be_turned_off(make_client):
    async with make_client(reasoning_parser="none") as client:
        assert (await message_of(client))["content"].startswith("<think>")


async def test_thoughts_can_be_left_out(client):
    message = await message_of(client, include_reasoning=False)
    assert (message["content"], "reasoning" in message) == ("Yes.", False)
    assert not any("reasoning" in delta for delta in await deltas_of(client, include_reasoning=False))


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
async def test_thoughts_go_back_to_the_template_under_either_name(client, engine, name):
    await message_of(client, messages=[*HELLO, {"role": "assistant", "content": "Yes.", name: "Easy."}, *HELLO])
    assert "<assistant>Yes.(Easy.)" in prompt_of(engine)


async def test_special_tokens_around_thoughts_are_shown_to_the_parser(client, engine):
    engine.tokenizer = byte_tokenizer(THINKING, special_tokens=["<think>", "</think>"])
    assert (await message_of(client))["content"] == "Yes."
    assert engine.calls[-1].params.skip_special_tokens is False


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_a_call_behind_thoughts(client, engine, size):
    engine.tokenizer, engine.max_model_len = byte_tokenizer(THINKING_WITH_TOOLS), 1000
    text = '<think>Ask <tool_call>.</think>\n\n<tool_call>{"name": "is_prime", "arguments": {"n": 7}}</tool_call>'
    engine.pieces = [text[start : start + size] for start in range(0, len(text), size)]
    message = await message_of(client, tools=[TOOL])
    assert (message["reasoning"], message["content"]) == ("Ask <tool_call>.", None)
    assert message["tool_calls"][0]["function"] == {"name": "is_prime", "arguments": '{"n": 7}'}
    deltas = await deltas_of(client, tools=[TOOL])
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "Ask <tool_call>."
    calls = [call["function"] for delta in deltas for call in delta.get("tool_calls", [])]
    assert "".join(call["arguments"] for call in calls) == '{"n": 7}'


async def test_a_stop_string_within_thoughts_ends_the_answer(client, engine):
    engine.pieces, engine.stop_reason = ["<think>So", " then"], "STOP"
    response = (await client.post(CHAT, json={"messages": HELLO, "stop": ["STOP"]})).json()["choices"][0]
    assert (response["message"]["reasoning"], response["finish_reason"]) == ("So then", "stop")


async def test_a_form_that_is_asked_for_leaves_no_room_for_thoughts(client, engine):
    engine.pieces = ['{"prime": true}']
    options = {"chat_template_kwargs": {"open_thinking": True}, "response_format": {"type": "json_object"}}
    message = await message_of(client, **options)
    assert (message["content"], "reasoning" in message) == ('{"prime": true}', False)
