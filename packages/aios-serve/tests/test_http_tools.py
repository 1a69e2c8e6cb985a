"""`tools` in chat completions: what reaches the template, what comes back, whole and streamed, and what is refused."""

from __future__ import annotations

import json

import pytest
from chat_templates import HERMES, LLAMA, MISTRAL, byte_tokenizer

from aios_model.errors import InvalidRequestError

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "How warm is Paris?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
WANTED = {"messages": HELLO, "tools": [WEATHER, TIME]}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'

MIDDLE = CALL.index('is"')
HALVES = CALL[30:MIDDLE], CALL[MIDDLE:]


@pytest.fixture(autouse=True)
def hermes(engine):
    engine.tokenizer = byte_tokenizer(HERMES)
    engine.max_model_len = 4096
    engine.pieces = ["One moment.\n", CALL[:30], *HALVES]


def prompt_of(engine):
    return bytes(token for token in engine.calls[-1].prompt if token < 256).decode()


def error_of(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]


async def chat(client, **fields):
    response = await client.post(CHAT, json=WANTED | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def stream(client, **fields):
    """The deltas of the first choice put together, and its finish reason."""
    response = await client.post(CHAT, json=WANTED | fields | {"stream": True})
    assert response.status_code == 200, response.text
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    message, reason = {"content": "", "reasoning": "", "tool_calls": []}, None
    for event in events:
        for choice in json.loads(event)["choices"]:
            delta, reason = choice["delta"], choice["finish_reason"] or reason
            message["content"] += delta.get("content") or ""
            message["reasoning"] += delta.get("reasoning") or ""
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(message["tool_calls"])
                    message["tool_calls"].append({"id": call["id"], "type": call["type"], **call["function"]})
                else:
                    message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return message, reason, [json.loads(event) for event in events]


async def test_a_call_comes_back_as_a_call_with_the_text_before_it(client):
    answer = await chat(client)
    [choice] = answer["choices"]
    message = choice["message"]
    assert message["content"] == "One moment."
    [call] = message["tool_calls"]
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    assert choice["finish_reason"] == "tool_calls"


async def test_a_streamed_call_comes_name_first_and_argument_by_argument(client):
    message, reason, events = await stream(client)
    assert message["content"] == "One moment."
    [call] = message["tool_calls"]
    assert (call["name"], call["arguments"], call["type"]) == ("get_weather", '{"city": "Paris"}', "function")
    assert reason == "tool_calls"
    deltas = [event["choices"][0]["delta"] for event in events]
    arguments = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls", [])]
    assert len(arguments) > 1
    assert next(d for d in deltas if "tool_calls" in d)["tool_calls"][0]["function"]["name"] == "get_weather"


async def test_a_call_alone_has_no_content(client, engine):
    engine.pieces = [CALL]
    assert (await chat(client))["choices"][0]["message"]["content"] is None


async def test_several_calls_have_numbers_and_ids_of_their_own(client, engine):
    engine.pieces = list(CALL + "\n" + CALL.replace("get_weather", "get_time"))
    calls = (await chat(client))["choices"][0]["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["get_weather", "get_time"]
    assert calls[0]["id"] != calls[1]["id"]
    message, _, _ = await stream(client)
    assert [call["name"] for call in message["tool_calls"]] == ["get_weather", "get_time"]


async def test_parallel_calls_can_be_turned_off(client, engine):
    engine.pieces = [CALL + CALL]
    assert len((await chat(client, parallel_tool_calls=False))["choices"][0]["message"]["tool_calls"]) == 1
    message, _, _ = await stream(client, parallel_tool_calls=False)
    assert len(message["tool_calls"]) == 1


async def test_choices_are_parsed_apart(client):
    choices = (await chat(client, n=3))["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["tool_calls"] * 3
    assert len({choice["message"]["tool_calls"][0]["id"] for choice in choices}) == 3


async def test_tools_reach_the_template_as_they_came(client, engine):
    await chat(client)
    assert json.dumps(WEATHER) in prompt_of(engine)
    assert json.dumps(TIME) in prompt_of(engine)


async def test_tool_choice_none_neither_tells_of_tools_nor_looks_for_calls(client, engine):
    answer = await chat(client, tool_choice="none")
    assert "get_weather" not in prompt_of(engine)
    assert answer["choices"][0]["message"]["content"] == "One moment.\n" + CALL
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_without_tools_calls_are_text(client):
    answer = (await client.post(CHAT, json={"messages": HELLO})).json()
    assert answer["choices"][0]["message"]["content"] == "One moment.\n" + CALL


@pytest.mark.parametrize("arguments", ['{"city": "Rome"}', {"city": "Rome"}])
async def test_calls_and_their_results_go_back_through_the_template(client, engine, arguments):
    calls = [{"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}]
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "31 degrees"},
    ]
    await chat(client, messages=messages)
    rendered = '<assistant><tool_call>{"name": "get_weather", "city": "Rome"}</tool_call><tool>31 degrees<assistant>'
    assert prompt_of(engine).endswith(rendered)


async def test_an_answer_can_be_sent_back_as_it_came(client):
    message = (await chat(client))["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "31"}
    await chat(client, messages=[*HELLO, message, result])


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
async def test_a_call_cut_off_is_a_call_only_if_the_answer_reached_its_longest(client, engine, finish_reason):
    engine.pieces, engine.finish_reason = ["Hm. " + CALL[:MIDDLE]], finish_reason
    choice = (await chat(client))["choices"][0]
    assert choice["finish_reason"] == finish_reason
    if finish_reason == "stop":
        assert choice["message"]["content"] == "Hm. " + CALL[:MIDDLE]
        assert "tool_calls" not in choice["message"]
    else:
        assert choice["message"]["content"] == "Hm."
        assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Par'
    message, reason, _ = await stream(client)
    assert (message["content"], message["tool_calls"][0]["arguments"]) == ("Hm.", '{"city": "Par')
    assert reason == finish_reason


async def test_malformed_calls_stay_in_the_content(client, engine):
    engine.pieces = ["<tool_call>", "get_weather(Paris)", "</tool_call>"]
    choice = (await chat(client))["choices"][0]
    assert choice["message"]["content"] == "<tool_call>get_weather(Paris)</tool_call>"
    assert choice["finish_reason"] == "stop"
    assert (await stream(client))[0]["content"] == "<tool_call>get_weather(Paris)</tool_call>"


async def test_a_stop_string_is_reported_as_ever(client, engine):
    engine.pieces, engine.stop_reason = ["Text <tool"], "END"
    choice = (await chat(client, stop=["END"]))["choices"][0]
    assert (choice["message"]["content"], choice["stop_reason"]) == ("Text <tool", "END")


async def test_logprobs_of_held_back_text_come_with_what_follows(client, engine):
    engine.pieces = ["Hi <to", "ols>"]
    message, _, events = await stream(client, logprobs=True)
    assert message["content"] == "Hi <tools>"
    tokens = [
        entry["token"] for event in events for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert "".join(tokens) == "Hi <tools>"


async def test_llama_and_mistral_formats_are_told_by_the_template(client, engine):
    engine.tokenizer = byte_tokenizer(LLAMA, special_tokens=["<|python_tag|>"])
    engine.pieces = ['{"name": "get_weather", "parameters": {"city": "Paris"}}']
    assert (await chat(client))["choices"][0]["finish_reason"] == "tool_calls"
    assert engine.calls[-1].params.skip_special_tokens is False  # or the tag would be left out of the text
    engine.tokenizer = byte_tokenizer(MISTRAL)
    engine.pieces = ['[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]']
    message = (await chat(client))["choices"][0]["message"]
    assert len(message["tool_calls"][0]["id"]) == 9
    assert engine.calls[-1].params.skip_special_tokens is True
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "31"}
    await chat(client, messages=[*HELLO, message, result])


async def test_ids_of_other_servers_are_shortened_for_templates_that_count(client, engine):
    engine.tokenizer = byte_tokenizer(MISTRAL)
    calls = [{"id": "call_0123456789", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}]
    messages = [
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": calls[0]["id"], "content": "9"},
    ]
    await chat(client, messages=[*HELLO, *messages])
    prompt = prompt_of(engine)
    short = prompt.partition("[TOOL_CALLS]get_time")[2][:9]
    assert f"<tool{short}>9" in prompt


async def test_the_parser_can_be_chosen(make_client, engine):
    engine.pieces = ['[TOOL_CALLS]get_weather{"city": "Paris"}']
    async with make_client(tool_call_parser="mistral") as client:
        assert (await chat(client))["choices"][0]["finish_reason"] == "tool_calls"


async def test_auto_can_be_turned_off_by_the_operator(make_client):
    async with make_client(enable_auto_tool_choice=False) as client:
        error = error_of(await client.post(CHAT, json=WANTED), 400)
        assert error["param"] == "tool_choice"
        await chat(client, tool_choice="none")


async def test_a_template_that_tells_no_format_needs_the_option(client, engine):
    engine.tokenizer = byte_tokenizer("{{ tools }}{{ messages[0].content }}")
    error = error_of(await client.post(CHAT, json=WANTED), 400)
    assert "--tool-call-parser" in error["message"]
    assert error["param"] == "tool_choice"


@pytest.mark.parametrize("options", [{"tool_call_parser": "hermes"}, {}])
async def test_a_template_without_a_notion_of_tools_is_said_so(make_client, engine, options):
    engine.tokenizer = byte_tokenizer()
    async with make_client(**options) as client:
        error = error_of(await client.post(CHAT, json=WANTED), 400)
        assert (error["param"], "knows of no tools" in error["message"]) == ("tools", True)
        calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
        messages = [*HELLO, {"role": "assistant", "tool_calls": calls}]
        error = error_of(await client.post(CHAT, json={"messages": messages}), 400)
        assert (error["param"], "knows of no tool calls" in error["message"]) == ("messages", True)
    assert engine.calls == []


async def test_required_holds_the_model_to_a_list_of_calls(client, engine):
    engine.pieces = [
        '[{"name": "get_',
        'weather", "parameters": {"city": "Paris"}}, {"name": "get_time", "parameters": {}}]',
    ]
    choice = (await chat(client, tool_choice="required"))["choices"][0]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather", "get_time"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    schema = json.loads(engine.calls[-1].params.structured_outputs.json)
    assert engine.checked == [engine.calls[-1].params.structured_outputs]
    assert schema["$defs"]["get_weather"] == WEATHER["function"]["parameters"]
    assert "maxItems" not in schema
    message, reason, _ = await stream(client, tool_choice="required", parallel_tool_calls=False)
    assert [call["arguments"] for call in message["tool_calls"]] == ['{"city": "Paris"}']
    assert reason == "tool_calls"
    assert json.loads(engine.calls[-1].params.structured_outputs.json)["maxItems"] == 1


async def test_a_named_function_holds_the_model_to_its_arguments(client, engine):
    engine.pieces = ['{"ci', 'ty": "Paris"}']
    named = {"type": "function", "function": {"name": "get_weather"}}
    choice = (await chat(client, tool_choice=named))["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert json.loads(engine.calls[-1].params.structured_outputs.json) == WEATHER["function"]["parameters"]
    message, _, _ = await stream(client, tool_choice=named)
    assert message["tool_calls"][0]["arguments"] == '{"city": "Paris"}'


async def test_calls_can_be_forced_whatever_format_the_model_was_trained_on(client, engine):
    engine.tokenizer = byte_tokenizer("{{ tools }}{{ messages[0].content }}")
    engine.pieces = ['[{"name": "get_time", "parameters": {}}]']
    assert (await chat(client, tool_choice="required"))["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_schema_that_cannot_be_compiled_blames_the_tools(client, engine, monkeypatch):
    async def check(self, params):
        raise InvalidRequestError("structured_outputs.json: no such keyword", param="structured_outputs.json")

    monkeypatch.setattr(type(engine), "check_structured_outputs", check)
    error = error_of(await client.post(CHAT, json=WANTED | {"tool_choice": "required"}), 400)
    assert error["param"] == "tools"
    assert "parameters of the tools: no such keyword" in error["message"]


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("form", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"regex": "a"}}])
async def test_calls_and_another_form_exclude_each_other(client, choice, form):
    error = error_of(await client.post(CHAT, json=WANTED | form | {"tool_choice": choice}), 400)
    assert error["param"] == "tool_choice"
    await chat(client, tool_choice="none", **form)


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ("get_weather", "list"),
        ([WEATHER, WEATHER], r"tools\[1\].function.name: 'get_weather' is there twice"),
        ([{"type": "web_search"}], r"tools\[0\].type"),
        (["f"], r"tools\[0\]"),
        ([{"type": "function"}], r"tools\[0\].function"),
        ([{"type": "function", "function": {}}], "name"),
        ([{"type": "function", "function": {"name": "no spaces"}}], "no spaces"),
        ([{"type": "function", "function": {"name": "x" * 129}}], "128"),
        ([{"type": "function", "function": {"name": "f", "description": 5}}], "description"),
        ([{"type": "function", "function": {"name": "f", "strict": "yes"}}], "strict"),
        ([{"type": "function", "function": {"name": "f", "parameters": []}}], "JSON schema"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}], "object"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"properties": []}}}], "properties"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": 1}}}}], "properties.a"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"required": "a"}}}], "required"),
        ([{"type": "function", "function": {"name": f"f{index}"}} for index in range(129)], "129 tools"),
        ([{"type": "function", "function": {"name": "f", "description": "x" * 300_000}}], "bytes"),
    ],
)
async def test_bad_tools_are_refused_with_their_number(client, engine, tools, words):
    import re

    error = error_of(await client.post(CHAT, json={"messages": HELLO, "tools": tools}), 400)
    assert error["param"].startswith("tools")
    assert re.search(words, error["message"])
    assert engine.calls == []


async def test_a_deeply_nested_schema_is_refused(client):
    schema: dict = {}
    for _ in range(200):
        schema = {"properties": {"a": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert "deep" in error_of(await client.post(CHAT, json={"messages": HELLO, "tools": [tool]}), 400)["message"]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("sometimes", "auto"),
        (5, "auto"),
        ({"type": "function", "function": {"name": "nobody"}}, "nobody"),
        ({"type": "allowed_tools", "allowed_tools": {}}, "allowed_tools"),
        ({"type": "function"}, "function"),
    ],
)
async def test_bad_tool_choices_are_refused(client, choice, words):
    error = error_of(await client.post(CHAT, json=WANTED | {"tool_choice": choice}), 400)
    assert error["param"] == "tool_choice"
    assert words in error["message"]


async def test_required_needs_tools(client):
    error = error_of(await client.post(CHAT, json={"messages": HELLO, "tool_choice": "required"}), 400)
    assert error["param"] == "tool_choice"


@pytest.mark.parametrize(
    "calls",
    [
        "f()",
        [{"id": "x"}],
        [{"id": "x", "type": "magic", "function": {"name": "f", "arguments": "{}"}}],
        [{"id": "x", "type": "function", "function": {"name": "f", "arguments": "not JSON"}}],
        [{"id": "x", "type": "function", "function": {"name": "f", "arguments": 5}}],
    ],
)
async def test_bad_calls_in_messages_are_refused(client, calls):
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": calls}]
    assert error_of(await client.post(CHAT, json={"messages": messages}), 400)["param"].startswith("messages")


async def test_only_the_assistant_calls(client):
    calls = [{"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    messages = [{"role": "user", "content": "x", "tool_calls": calls}]
    assert error_of(await client.post(CHAT, json={"messages": messages}), 400)["param"].startswith("messages")


async def test_tokenize_counts_tools(client, engine):
    body = {"messages": HELLO, "tools": [WEATHER]}
    with_tools = (await client.post("/tokenize", json=body)).json()["count"]
    assert with_tools > (await client.post("/tokenize", json={"messages": HELLO})).json()["count"] + 100
    await chat(client, tools=[WEATHER])
    assert len(engine.calls[-1].prompt) == with_tools
