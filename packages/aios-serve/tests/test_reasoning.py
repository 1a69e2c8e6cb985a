"""Thoughts apart from answers, however the text is cut, and what they cost in tokens."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios_serve.reasoning.registry import detect_reasoning_parser, reasoning_format
from aios_serve.reasoning.splitter import ReasoningSplitter, ThinkMarkers
from aios_serve.reasoning.token_counter import ReasoningTokenCounter
from aios_serve.tool_calls.pieces import Reasoning, Text, merged

XML = ThinkMarkers()


def split(text_pieces, *, is_open=False, markers=XML):
    splitter = ReasoningSplitter(markers, is_open=is_open)
    pieces = [piece for text in text_pieces for piece in splitter.push(text)]
    return merged([*pieces, *splitter.finish()])


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("<think>\nWell.\n</think>\n\nYes.", False, [Reasoning("Well."), Text("Yes.")]),
        ("\n<think>Well.</think>Yes.", False, [Reasoning("Well."), Text("Yes.")]),
        ("Well.\n</think>\n\nYes.", True, [Reasoning("Well."), Text("Yes.")]),
        ("<think>\nWell.</think>Yes.", True, [Reasoning("Well."), Text("Yes.")]),
        ("\n</think>\n\nYes.", True, [Text("Yes.")]),
        ("<think>Never closed ", False, [Reasoning("Never closed")]),
        ("Never closed</thi", True, [Reasoning("Never closed</thi")]),
        ("No thoughts.", False, [Text("No thoughts.")]),
        (" Say <think>x</think>.", False, [Text(" Say <think>x</think>.")]),
        ("<think>a</think>b</think>c<think>", False, [Reasoning("a"), Text("b</think>c<think>")]),
        ("<think>", False, []),
        ("<thin", False, [Text("<thin")]),
        ("", False, []),
    ],
)
def test_thoughts_and_answer_are_told_apart(text, is_open, expected):
    assert split([text], is_open=is_open) == expected
    assert split(list(text), is_open=is_open) == expected


@settings(max_examples=500, deadline=None)
@given(
    parts=st.lists(st.sampled_from(["<think>", "</think>", "<thi", "</", "\n", " ", "so", "ä", "<"]), max_size=10),
    is_open=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_pieces_do_not_depend_on_how_the_text_was_cut(parts, is_open, seed):
    text, rng = "".join(parts), random.Random(seed)
    whole = split([text], is_open=is_open)
    assert split(list(text), is_open=is_open) == whole
    assert split(re.findall(rf".{{1,{rng.randint(1, 9)}}}", text, re.DOTALL), is_open=is_open) == whole


def test_thoughts_come_while_they_are_written():
    splitter = ReasoningSplitter(XML, is_open=False)
    assert splitter.push("<think>\nFirst ") == [Reasoning("First")]
    assert splitter.push("this</th") == [Reasoning(" this")]
    assert splitter.push("ere, then</think>") == [Reasoning("</there, then")]
    assert splitter.push("\n\nYes") == [Text("Yes")]
    assert splitter.push(" and no ") == [Text(" and no ")]


def count(tokens, *, is_open=False, step=1):
    counter = ReasoningTokenCounter(XML, lambda token: tokens[token].encode(), is_open=is_open)
    for start in range(0, len(tokens), step):
        counter.push(range(start, min(start + step, len(tokens))))
    return counter.num_tokens


@pytest.mark.parametrize("step", [1, 2, 100])
@pytest.mark.parametrize(
    ("tokens", "is_open", "expected"),
    [
        (["<think>", "\n", "so", " so", "</think>", "Yes", "."], False, 3),
        (["\n", "<think>", "so", "</think>", "Yes"], False, 1),
        (["so", " so", "</think>", "Yes"], True, 2),
        (["<think>", "so", "</think>", "Yes"], True, 1),
        (["<th", "ink", ">", "a", "b", "c.</", "think", ">", "Yes"], False, 2),
        (["<think>", "a", "b", "c"], False, 3),
        (["Yes", "<think>", "a"], False, 0),
        (["<think>", *["x"] * 500, "</think>", *["y"] * 500], False, 500),
        (["</think>", "Yes"], True, 0),
    ],
)
def test_tokens_of_thoughts_are_counted_without_the_markers(tokens, is_open, expected, step):
    assert count(tokens, is_open=is_open, step=step) == expected


class Words:
    """A tokenizer whose ids are indices of words."""

    def __init__(self, *words):
        self.words = words

    def decode(self, token_ids, *, skip_special_tokens):
        assert not skip_special_tokens
        return "".join(self.words[token] for token in token_ids)


@pytest.mark.parametrize(
    ("parser", "prompt", "is_open"),
    [
        ("qwen3", ["<assistant>\n"], False),
        ("qwen3", ["<assistant>\n", "<think>", "\n"], True),
        ("qwen3", ["<assistant>\n", "<think>", "\n\n", "</think>", "\n\n"], False),
        ("qwen3", ["what is ", "<think>", "?", "<assistant>\n"], False),
        ("deepseek_r1", ["<assistant>"], True),
        ("deepseek_r1", ["<assistant>", "<think>", "</think>"], False),
        ("mistral", ["[/INST]"], False),
        ("mistral", ["[/INST]", "[THINK]"], True),
    ],
)
def test_the_end_of_the_prompt_says_whether_thoughts_are_open(parser, prompt, is_open):
    assert reasoning_format(parser).is_open_after(range(len(prompt)), Words(*prompt)) is is_open


def test_the_format_is_told_by_the_chat_template():
    assert detect_reasoning_parser("{{ content.split('</think>')[-1] }}") == "qwen3"
    assert detect_reasoning_parser("[THINK] [/THINK]") == "mistral"
    assert detect_reasoning_parser("{{ content }}") is None
