"""The schema of answers that are held to calls: what it admits, the parsers read back."""

from __future__ import annotations

import copy
import json

import llguidance
import pytest

from aios_serve.tool_calls.constraint import forced_calls_schema
from aios_serve.tool_calls.forced import NamedCallParser, RequiredCallsParser
from aios_serve.tool_calls.pieces import CallArguments, CallEnd, CallStart
from aios_serve.tool_calls.tools import ToolChoice

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
PATH = {
    "type": "object",
    "$defs": {"point": POINT, "path": {"type": "array", "items": {"$ref": "#/$defs/point"}}},
    "properties": {"path": {"$ref": "#/$defs/path"}},
    "required": ["path"],
    "additionalProperties": False,
}
OTHER_POINT = {"type": "object", "definitions": {"point": {"type": "string"}}}
OTHER_POINT["properties"] = {"at": {"$ref": "#/definitions/point"}}
TREE = {
    "type": "object",
    "properties": {"leaf": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#"}}},
}
TREE["additionalProperties"] = False
TOOLS = [
    {"type": "function", "function": {"name": "draw", "parameters": PATH}},
    {"type": "function", "function": {"name": "go", "parameters": OTHER_POINT}},
    {"type": "function", "function": {"name": "grow", "parameters": TREE}},
    {"type": "function", "function": {"name": "stop"}},
]


def schema(mode, name=None, **options):
    tools = copy.deepcopy(TOOLS)
    result = forced_calls_schema(tools, ToolChoice(mode, name), **options)
    assert tools == TOOLS
    return result


def admits(schema, value):
    """Whether llguidance lets this JSON through, byte by byte, to the end."""
    tokenizer = llguidance.LLTokenizer("byte")
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
    matcher = llguidance.LLMatcher(tokenizer, grammar)
    assert not matcher.is_error(), matcher.get_error()
    text = json.dumps(value, separators=(",", ":"))
    return matcher.consume_tokens(tokenizer.tokenize_str(text)) and matcher.is_accepting()


CALLS = [
    {"name": "draw", "parameters": {"path": [{"x": 1}, {"x": -2}]}},
    {"name": "go", "parameters": {"at": "home"}},
    {"name": "grow", "parameters": {"leaf": 1, "children": [{"children": [{"leaf": 2}]}]}},
    {"name": "stop", "parameters": {}},
]


def test_required_admits_calls_and_nothing_else():
    required = schema("required")
    assert admits(required, CALLS)
    assert all(admits(required, [call]) for call in CALLS)
    assert not admits(required, [])
    assert not admits(required, [{"name": "nobody", "parameters": {}}])
    assert not admits(required, [{"name": "draw", "parameters": {"path": ["home"]}}])
    assert not admits(required, [{"name": "go", "parameters": {"at": {"x": 1}}}])
    assert not admits(required, [{"name": "stop", "parameters": {"x": 1}}])
    assert not admits(required, [{"name": "grow", "parameters": {"children": [{"x": 1}]}}])


def test_without_parallel_calls_there_is_one():
    single = schema("required", parallel=False)
    assert admits(single, CALLS[:1])
    assert not admits(single, CALLS)


def test_a_named_function_admits_its_arguments():
    assert admits(schema("named", "draw"), CALLS[0]["parameters"])
    assert not admits(schema("named", "draw"), {})
    assert admits(schema("named", "stop"), {})


@pytest.mark.parametrize("mode", ["auto", "none"])
def test_a_free_choice_has_no_schema(mode):
    assert schema(mode) is None


def test_what_is_admitted_is_read_back():
    parser = RequiredCallsParser()
    pieces = [*parser.push(json.dumps(CALLS)), *parser.finish()]
    assert [piece.name for piece in pieces if isinstance(piece, CallStart)] == ["draw", "go", "grow", "stop"]
    arguments = [json.loads(piece.text) for piece in pieces if isinstance(piece, CallArguments)]
    assert arguments == [call["parameters"] for call in CALLS]
    named = NamedCallParser("draw")
    text = json.dumps(CALLS[0]["parameters"])
    assert [*named.push(text), *named.finish()] == [
        CallStart(0, "draw"),
        CallArguments(0, text),
        CallEnd(0, complete=True),
    ]
