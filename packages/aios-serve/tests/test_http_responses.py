"""`/v1/responses` by the official client against the application: items and events, tools, thoughts, refusals."""

from __future__ import annotations

import json

import pytest
from chat_templates import HERMES, THINKING_WITH_TOOLS, byte_tokenizer

from aios_serve.errors import RequestFailedError

openai = pytest.importorskip("openai")

PATH = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture
async def responses(client):
    async with openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=client, max_retries=0) as user:
        yield user.responses


@pytest.fixture(autouse=True)
def hermes(engine):
    engine.tokenizer = byte_tokenizer(HERMES)
    engine.max_model_len = 4096


def prompt_of(engine):
    return bytes(token for token in engine.calls[-1].prompt if token < 256).decode()


async def events_of(responses, **options):
    stream = await responses.create(model="tiny", stream=True, **{"input": "Hi"} | options)
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    return events


async def test_text_in_text_out(responses, engine):
    response = await responses.create(model="tiny", input="Hi", instructions="Be brief.", metadata={"a": "b"})
    assert response.output_text == "Hello!"
    assert (response.status, response.model, response.metadata) == ("completed", "tiny", {"a": "b"})
    assert response.id.startswith("resp_")
    [message] = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert prompt_of(engine) == "<system>Be brief.<user>Hi<assistant>"
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (
        len(prompt_of(engine)),
        6,
        usage.input_tokens + 6,
    )
    assert usage.input_tokens_details.cached_tokens == 2
    assert usage.output_tokens_details.reasoning_tokens == 0


async def test_sampling_reaches_the_engine(responses, engine):
    response = await responses.create(model="tiny", input="Hi", temperature=0.25, top_p=0.5, max_output_tokens=7)
    params = engine.calls[-1].params
    assert (params.temperature, params.top_p, params.max_tokens) == (0.25, 0.5, 7)
    assert (response.temperature, response.top_p, response.max_output_tokens) == (0.25, 0.5, 7)


async def test_a_stream_has_the_events_of_a_message(responses):
    events = await events_of(responses)
    assert [event.type for event in events[2:]] == [
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello!"
    assert events[2].item.content == []
    assert events[-4].text == events[-3].part.text == events[-2].item.content[0].text == "Hello!"
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {events[2].item.id}
    assert events[-1].response.output_text == "Hello!"
    assert events[-1].response.usage.output_tokens == 6
    assert events[-1].response.id == events[0].response.id


async def test_the_clients_own_accumulator_understands_the_stream(responses, engine):
    engine.tokenizer = byte_tokenizer(THINKING_WITH_TOOLS)
    engine.pieces = ["<think>Look ", "it up.</think>", "Wait.\n", CALL[:30], CALL[30:60], CALL[60:]]
    async with responses.stream(model="tiny", input="How warm is Paris?", tools=[WEATHER]) as stream:
        async for _ in stream:
            pass
        response = await stream.get_final_response()
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    assert response.output_text == "Wait."
    assert response.output[2].arguments == '{"city": "Paris"}'
    assert response.output[2].parsed_arguments == {"city": "Paris"}


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_and_thoughts_are_items(responses, engine, stream):
    engine.tokenizer = byte_tokenizer(THINKING_WITH_TOOLS)
    engine.pieces = ["<think>Look it up.</think>", CALL[:58], CALL[58:]]
    options = {"input": "How warm?", "tools": [WEATHER]}
    if stream:
        events = await events_of(responses, **options)
        kinds = [event.type for event in events]
        assert kinds.count("response.function_call_arguments.delta") == 2
        assert kinds.index("response.reasoning_text.delta") < kinds.index("response.function_call_arguments.delta")
        done = next(event for event in events if event.type == "response.function_call_arguments.done")
        assert (done.name, done.arguments) == ("get_weather", '{"city": "Paris"}')
        response = events[-1].response
    else:
        response = await responses.create(model="tiny", **options)
    thoughts, call = response.output
    assert (thoughts.type, thoughts.content[0].text) == ("reasoning", "Look it up.")
    assert (call.type, call.name, call.arguments) == ("function_call", "get_weather", '{"city": "Paris"}')
    assert call.call_id.startswith("call_")
    assert response.status == "completed"
    assert response.usage.output_tokens_details.reasoning_tokens == len("Look it up.")


async def test_a_conversation_goes_back_as_items(responses, engine):
    engine.pieces = ["Wait.", CALL]
    first = await responses.create(model="tiny", input="How warm is Paris?", tools=[WEATHER])
    call = next(item for item in first.output if item.type == "function_call")
    engine.pieces = ["31 degrees."]
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "How warm is Paris?"}]},
        *first.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": "31"},
    ]
    second = await responses.create(model="tiny", input=items, tools=[WEATHER])
    assert second.output_text == "31 degrees."
    assert prompt_of(engine).endswith(
        '<user>How warm is Paris?<assistant>Wait.<tool_call>{"name": "get_weather", "city": "Paris"}</tool_call>'
        "<tool>31<assistant>"
    )
    assert json.dumps({"type": "function", "function": {k: v for k, v in WEATHER.items() if k != "type"}}) in prompt_of(
        engine
    )


async def test_an_answer_cut_off_is_incomplete(responses, engine):
    engine.finish_reason = "length"
    response = await responses.create(model="tiny", input="Hi", max_output_tokens=3)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    events = await events_of(responses, max_output_tokens=3)
    assert events[-1].type == "response.incomplete"
    assert events[-2].item.status == "incomplete"


async def test_what_fails_on_the_way_ends_the_stream_with_an_event(responses, engine):
    engine.error, engine.error_at = RequestFailedError("it broke", request_id="x"), 2
    events = await events_of(responses)
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"


async def test_what_fails_before_the_first_token_is_a_plain_error(responses, engine):
    engine.error = RequestFailedError("it broke", request_id="x")
    with pytest.raises(openai.InternalServerError):
        await responses.create(model="tiny", input="Hi", stream=True)


async def test_malformed_calls_are_text(responses, engine):
    engine.pieces = [CALL.replace("}}", ",}}")]
    response = await responses.create(model="tiny", input="Hi", tools=[WEATHER])
    assert response.output_text == CALL.replace("}}", ",}}")


async def test_logprobs_come_with_the_text(responses):
    options = {"top_logprobs": 2, "include": ["message.output_text.logprobs"]}
    response = await responses.create(model="tiny", input="Hi", **options)
    logprobs = response.output[0].content[0].logprobs
    assert "".join(entry.token for entry in logprobs) == "Hello!"
    assert len(logprobs[0].top_logprobs) == 2
    events = await events_of(responses, **options)
    streamed = [entry for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
    assert "".join(entry.token for entry in streamed) == "Hello!"


async def test_the_form_of_the_text_reaches_the_engine(responses, engine):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}
    response = await responses.create(model="tiny", input="Hi", text={"format": form})
    assert json.loads(engine.calls[-1].params.structured_outputs.json) == schema
    assert response.text.format.name == "answer"
    await responses.create(model="tiny", input="Hi", text={"format": {"type": "json_object"}})
    assert engine.calls[-1].params.structured_outputs.json_object


async def test_calls_can_be_forced(responses, engine):
    engine.pieces = ['{"city": "Paris"}']
    choice = {"type": "function", "name": "get_weather"}
    response = await responses.create(model="tiny", input="Hi", tools=[WEATHER], tool_choice=choice)
    assert (response.output[0].name, response.output[0].arguments) == ("get_weather", '{"city": "Paris"}')


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools"),
        ({"tools": [{"type": "function", "name": "no spaces"}]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "nobody"}}, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}, "tools": [WEATHER]}, "tool_choice"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"temperature": 9.0}, "temperature"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "king", "content": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "x", "name": "f", "arguments": "no"}]}, "input"),
    ],
)
async def test_what_cannot_be_honoured_is_400_by_its_name_here(client, engine, fields, param):
    response = await client.post(PATH, json={"input": "Hi"} | fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param), response.json()
    assert engine.calls == []


@pytest.mark.parametrize(
    "fields",
    [
        {"store": False, "background": False, "truncation": "disabled", "previous_response_id": None},
        {"text": {"format": {"type": "text"}}, "reasoning": {"effort": "low"}, "service_tier": "auto"},
        {"tool_choice": "auto", "tools": [], "something_new": 1},
    ],
)
async def test_fields_that_ask_for_nothing_are_accepted(client, fields):
    response = await client.post(PATH, json={"input": "Hi"} | fields)
    assert response.status_code == 200, response.text


async def test_a_client_that_leaves_a_stream_aborts_it(connect, engine):
    engine.hold = 2
    connection = connect(PATH, {"input": "Hi", "stream": True})
    await connection.wait_for_chunks(4)
    await connection.disconnect()
    assert len(engine.aborted) == 1
    assert engine.num_open_requests == 0


async def test_events_carry_their_names_and_there_is_no_done(client):
    response = await client.post(PATH, json={"input": "Hi", "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.startswith("event: response.created\ndata: {")
    assert "[DONE]" not in response.text


async def test_unknown_models_are_404(responses):
    with pytest.raises(openai.NotFoundError):
        await responses.create(model="gpt-9", input="Hi")
