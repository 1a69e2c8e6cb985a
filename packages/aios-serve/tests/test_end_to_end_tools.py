"""Tools by the official `openai` client over a real connection: the server process around a scripted engine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

openai = pytest.importorskip("openai")

pytestmark = pytest.mark.slow  # a process
PROGRAM = Path(__file__).with_name("scripted_server.py")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
QUESTION = {"role": "user", "content": "How warm is Paris?"}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ANSWER = "<think>\nI have to ask.\n</think>\n\nOne moment.\n" + CALL


@pytest.fixture(scope="module")
def url():
    pieces = [ANSWER[start : start + 5] for start in range(0, len(ANSWER), 5)]
    options = {"engine": {"pieces": pieces}, "server": {"port": 0}, "template": "THINKING_WITH_TOOLS"}
    process = subprocess.Popen([sys.executable, str(PROGRAM), json.dumps(options)], stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        while not (found := re.search(r"listening on (http://\S+);", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        reader = threading.Thread(target=process.stderr.read, daemon=True)
        reader.start()
        yield found[1]
    finally:
        process.terminate()
        assert process.wait(30) == 0
        reader.join(5)
        process.stderr.close()


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=30, max_retries=5) as client:
        yield client


def test_a_loop_of_call_and_result(client):
    answer = client.chat.completions.create(model="tiny", messages=[QUESTION], tools=[WEATHER])
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "One moment."
    assert (
        choice.message.model_extra["reasoning"] == choice.message.model_extra["reasoning_content"] == "I have to ask."
    )
    [call] = choice.message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("\nI have to ask.\n")
    result = {"role": "tool", "tool_call_id": call.id, "content": "31 degrees"}
    client.chat.completions.create(model="tiny", messages=[QUESTION, choice.message, result], tools=[WEATHER])


def test_the_clients_accumulator_puts_a_stream_together(client):
    with client.chat.completions.stream(model="tiny", messages=[QUESTION], tools=[WEATHER]) as stream:
        kinds = [event.type for event in stream]
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "One moment."
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Paris"}'
    assert kinds.count("tool_calls.function.arguments.delta") > 1
    assert kinds.count("tool_calls.function.arguments.done") == 1


def test_responses_stream_the_same(client):
    tool = {"type": "function", **WEATHER["function"], "strict": False}
    with client.responses.stream(model="tiny", input=QUESTION["content"], tools=[tool]) as stream:
        for _ in stream:
            pass
        response = stream.get_final_response()
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    assert response.output_text == "One moment."
    assert json.loads(response.output[-1].arguments) == {"city": "Paris"}
    whole = client.responses.create(model="tiny", input=QUESTION["content"], tools=[tool])
    assert [item.type for item in whole.output] == [item.type for item in response.output]


def test_bad_tools_are_the_clients_own_error(client):
    bad = {"type": "function", "function": {"name": "no spaces"}}
    with pytest.raises(openai.BadRequestError, match=r"tools\[0\].function.name") as caught:
        client.chat.completions.create(model="tiny", messages=[QUESTION], tools=[bad])
    assert caught.value.param.startswith("tools")
