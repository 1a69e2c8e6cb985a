"""Parsers of tool calls: each format, what is malformed, and that pieces do not depend on how the text was cut."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios_serve.tool_calls.forced import NamedCallParser, RequiredCallsParser
from aios_serve.tool_calls.json_scanner import JsonScanner
from aios_serve.tool_calls.pieces import CallArguments, CallEnd, CallStart, Text, merged
from aios_serve.tool_calls.registry import detect_tool_call_parser, make_tool_call_parser, new_call_id

NAMES = ("f", "get_weather")
FORMATS = ("hermes", "llama3_json", "mistral", "required", "named")


def make(name):
    match name:
        case "required":
            return RequiredCallsParser()
        case "named":
            return NamedCallParser("f")
        case _:
            return make_tool_call_parser(name, NAMES)


def parse(name, pieces):
    parser = make(name)
    result = [piece for text in pieces for piece in parser.push(text)]
    return merged([*result, *parser.finish()])


def call(index, name, arguments):
    return [CallStart(index, name), CallArguments(index, arguments), CallEnd(index, complete=True)]


def cut(text, rng):
    borders = sorted(rng.sample(range(len(text) + 1), min(len(text), rng.randint(0, 8)))) if text else []
    return [text[start:end] for start, end in zip([0, *borders], [*borders, len(text)], strict=True)]


# Pieces of which answers are put together at random, right and wrong ones.
FRAGMENTS = {
    "hermes": ["<tool_call>", "</tool_call>", "<tool_", "\n"],
    "llama3_json": ["<|python_tag|>", "<|py", ";", "; ", "\n", "\n  "],
    "mistral": ["[TOOL_CALLS]", "[TOOL", "[", "]", ", ", "f[ARGS]", "f[CALL_ID]a1[ARGS]", "get_weather"],
    "required": ["[", "]", ", "],
    "named": ["\n"],
}
COMMON = [
    '{"name": "f", "arguments": {"a": 1}}',
    '{"name": "get_weather", "parameters": {"city": "S\u00e3o \\"Paulo\\"", "n": [1, {"x": null}]}}',
    '{"arguments": {"late": true}, "name": "f"}',
    '{"name": "f", "arguments": "{\\"in\\": \\"a string\\"}"}',
    '{"name": "f"}',
    '{"name": "nobody", "arguments": {}}',
    '{"name": "f", "arguments": {"a": 1,}}',
    '{"name": "f", "arguments": {"a": "unclosed',
    '{"name": "f", "arguments": {"a": 1}',
    '{"name": 5}',
    '{"a": [1, 2',
    "{}",
    "}",
    "{",
    " ",
    "Hello, ",
    "wörld.",
    "text { with } braces <",
]


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pieces_do_not_depend_on_how_the_text_was_cut(name, data):
    text = "".join(data.draw(st.lists(st.sampled_from(COMMON + FRAGMENTS[name]), max_size=8)))
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    whole = parse(name, [text])
    assert parse(name, list(text)) == whole
    assert parse(name, cut(text, rng)) == whole


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_every_call_is_started_once_and_ended_once_and_complete_arguments_are_objects(name, data):
    text = "".join(data.draw(st.lists(st.sampled_from(COMMON + FRAGMENTS[name]), max_size=8)))
    open_call, arguments, num_calls = False, "", 0
    for piece in parse(name, list(text)):
        match piece:
            case CallStart(index=index):
                assert (open_call, index) == (False, num_calls)
                open_call, arguments = True, ""
            case CallArguments(index=index, text=more):
                assert (open_call, index) == (True, num_calls)
                arguments += more
            case CallEnd(index=index, complete=complete, raw=raw):
                assert (open_call, index) == (True, num_calls)
                if complete:
                    assert isinstance(json.loads(arguments), dict)
                else:
                    assert raw in text
                open_call, num_calls = False, num_calls + 1
            case Text(text=shown):
                assert shown in text
                assert not open_call
    assert not open_call


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral"])
@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="abc {}[]<>\n|_:;\"'", max_size=60))
def test_text_without_calls_comes_through_unchanged(name, text):
    assert parse(name, list(text)) == merged([Text(text)])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "hermes",
            'Wait.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
            '<tool_call>\n{"name": "nobody", "arguments": {}}\n</tool_call>\n\nDone.',
            [Text("Wait."), *call(0, "f", '{"a": 1}'), *call(1, "nobody", "{}"), Text("\n\nDone.")],
        ),
        ("hermes", '<tool_call>{"name": "f"}\n{"name": "g"}', [*call(0, "f", "{}"), *call(1, "g", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}', call(0, "f", "{}")),
        ("hermes", '<tool_call>{"name": "f"}}</tool_call>', [*call(0, "f", "{}"), Text("}")]),
        ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', call(0, "f", '{"a": 1}')),
        (
            "llama3_json",
            '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "get_weather", "parameters": {"b": []}}',
            [*call(0, "f", "{}"), *call(1, "get_weather", '{"b": []}')],
        ),
        ("llama3_json", 'Sure:\n{"name": "f"}\nDone', [Text("Sure:"), *call(0, "f", "{}"), Text("\nDone")]),
        ("llama3_json", '<|python_tag|>{"name": "nobody", "parameters": {}}', call(0, "nobody", "{}")),
        (
            "mistral",
            '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}, {"name": "g", "arguments": {}}]',
            [*call(0, "f", '{"a": 1}'), *call(1, "g", "{}")],
        ),
        (
            "mistral",
            'Wait.[TOOL_CALLS]f[CALL_ID]abc[ARGS]{"a": 1}[TOOL_CALLS]g{"b": 2}',
            [Text("Wait."), *call(0, "f", '{"a": 1}'), *call(1, "g", '{"b": 2}')],
        ),
        (
            "required",
            '[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {}}]',
            [*call(0, "f", '{"a": 1}'), *call(1, "g", "{}")],
        ),
        ("named", ' {"a": {"b": "}"}}\n', call(0, "f", '{"a": {"b": "}"}}')),
    ],
)
def test_calls_are_found_in_each_format(name, text, expected):
    assert parse(name, [text]) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>get_weather(Paris)</tool_call>"),
        ("hermes", '<tool_call>\n{"name": 5, "arguments": {}}\n</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": "no object"}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "argu'),
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
        ("llama3_json", '{"name": "nobody", "parameters": {}}'),
        ("llama3_json", '{"name": "f", "age": 5, "parameters": {}}'),
        ("llama3_json", '<|python_tag|>brave_search.call(query="x")'),
        ("llama3_json", 'A set is written {"name": "f"} here.'),
        ("mistral", "[TOOL_CALLS] []"),
        ("mistral", "[TOOL_CALLS] I would call a function now"),
        ("mistral", "[TOOL_CALLS]" + "x" * 300 + "{}"),
        ("required", "[]"),
        ("named", "no"),
    ],
)
def test_what_is_no_call_stays_text_as_it_was_written(name, text):
    assert parse(name, list(text)) == [Text(text)]


def test_a_call_that_goes_wrong_in_its_arguments_is_incomplete_and_nothing_of_it_is_lost():
    text = 'x <tool_call>{"name": "f", "arguments": {"a": 1,}}</tool_call> y'
    torn = CallEnd(0, complete=False, raw=text[1:-2])
    assert parse("hermes", list(text)) == [
        Text("x"),
        CallStart(0, "f"),
        CallArguments(0, '{"a": 1,}}'),
        torn,
        Text(" y"),
    ]


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral"])
def test_arguments_cut_off_by_the_end_are_incomplete(name):
    marker = {"hermes": "<tool_call>", "llama3_json": "", "mistral": "[TOOL_CALLS]["}[name]
    text = marker + '{"name": "f", "arguments": {"a": "half'
    assert parse(name, [text]) == [
        CallStart(0, "f"),
        CallArguments(0, '{"a": "half'),
        CallEnd(0, complete=False, raw=text),
    ]


def test_arguments_come_while_they_are_written_and_the_name_comes_first():
    parser = make("hermes")
    assert parser.push('<tool_call>{"name": "f", "arguments": ') == []
    assert parser.push('{"ci') == [CallStart(0, "f"), CallArguments(0, '{"ci')]
    assert parser.push('ty": "Par') == [CallArguments(0, 'ty": "Par')]
    assert parser.push('is"}}</tool') == [CallArguments(0, 'is"}'), CallEnd(0, complete=True)]
    assert parser.push("_call>") == parser.finish() == []


def test_no_more_text_is_held_back_than_could_begin_a_call():
    parser = make("hermes")
    assert parser.push("a <tool") == [Text("a")]
    assert parser.push("s> b") == [Text(" <tools> b")]
    parser = make("llama3_json")
    assert parser.push('{"x": ') == []
    assert parser.push("1") == [Text('{"x": 1')]


def test_line_breaks_inside_of_strings_become_escapes():
    [_, arguments, end] = parse("hermes", ['<tool_call>{"name": "f", "arguments": {"code": "a\n\tb"}}</tool_call>'])
    assert json.loads(arguments.text) == {"code": "a\n\tb"}
    assert end.complete


def test_reading_takes_linear_time_whatever_the_text():
    import time

    started = time.perf_counter()
    for name in ("hermes", "mistral", "llama3_json"):
        marker = {"hermes": '<tool_call>{"x', "mistral": "[TOOL_CALLS]x", "llama3_json": '\n{"x'}[name]
        parse(name, [marker * 5_000])
        parser = make(name)
        for _ in range(5_000):
            parser.push(marker)
        parser.finish()
    assert time.perf_counter() - started < 5


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(value=json_values, indent=st.sampled_from([None, 2]), junk=st.integers(0, 10**6), character=st.characters())
def test_the_scanner_agrees_with_json(value, indent, junk, character):
    text = json.dumps(value, indent=indent)
    assert ends(text)
    damaged = text[: junk % len(text)] + character + text[junk % len(text) + 1 :]
    try:
        json.loads(damaged, strict=False, parse_constant=lambda name: 1 / 0)
        valid = True
    except (ValueError, ZeroDivisionError):
        valid = False
    assert ends(damaged) == valid


def ends(text):
    """Whether the scanner finds that `text` is one JSON value; the comma ends a number at the top."""
    scanner = JsonScanner()
    for character in f"[{text}]":
        scanner.push(character)
    return scanner.done


@pytest.mark.parametrize(
    ("template", "parser"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("<tool_call>\n<function=name>", None),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
        ("<|start_header_id|> <|python_tag|>", "llama3_json"),
        ('<|start_header_id|> {"name": function name, "parameters": ...}', "llama3_json"),
        ("{{ message.content }}", None),
    ],
)
def test_the_format_is_told_by_the_chat_template(template, parser):
    assert detect_tool_call_parser(template) == parser


def test_ids_are_new_each_time_and_as_templates_take_them_back():
    assert new_call_id("hermes").startswith("call_")
    assert new_call_id("hermes") != new_call_id("hermes")
    assert len(new_call_id("mistral")) == 9
    assert new_call_id("mistral").isalnum()
