"""Stop strings in streamed text, against a plain search of the whole text."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aios_model.errors import InvalidRequestError
from aios_model.tokenizer.stop_strings import StopScan, StopStringMatcher


def stream(stop, chunks, *, include_in_output=False):
    """Everything emitted, and the stop string that ended it."""
    matcher = StopStringMatcher(stop, include_in_output=include_in_output)
    emitted = ""
    for chunk in chunks:
        scan = matcher.push(chunk)
        emitted += scan.text
        if scan.matched is not None:
            return emitted, scan.matched
    return emitted + matcher.finish(), None


def search(stop, text, *, include_in_output=False):
    """The plain reference: the occurrence that ends first, the longest of those that end there."""
    found = [(text.find(word) + len(word), -len(word), word) for word in stop if word in text]
    if not found:
        return text, None
    end, _, word = min(found)
    return text[: end if include_in_output else end - len(word)], word


def cut(text, borders):
    points = sorted({0, len(text), *(border % (len(text) + 1) for border in borders)})
    return [text[start:end] for start, end in pairwise(points)]


@st.composite
def stops_and_text(draw):
    """Stop strings over few letters, and a text made mostly of their beginnings, so that near misses are common."""
    stop = draw(st.lists(st.text("ab", min_size=1, max_size=6), max_size=4))
    beginnings = [word[:end] for word in stop for end in range(1, len(word) + 1)]
    return stop, "".join(draw(st.lists(st.sampled_from([*beginnings, "a", "b", "c"]), max_size=12)))


@given(stops_and_text(), st.lists(st.integers(0, 1000), max_size=40), st.booleans())
def test_any_cut_of_the_text_gives_what_a_search_of_the_whole_gives(stop_and_text, borders, include_in_output):
    stop, text = stop_and_text
    expected = search(stop, text, include_in_output=include_in_output)
    assert stream(stop, cut(text, borders), include_in_output=include_in_output) == expected


@given(stops_and_text())
def test_no_more_is_held_back_than_may_become_a_stop_string(stop_and_text):
    stop, text = stop_and_text
    matcher = StopStringMatcher(stop)
    emitted = ""
    for end, character in enumerate(text, start=1):
        scan = matcher.push(character)
        emitted += scan.text
        if scan.matched is not None:
            return
        ends = [text[start:end] for start in range(end + 1)]
        held = next(tail for tail in ends if not tail or any(word.startswith(tail) for word in stop))
        assert emitted == text[: end - len(held)]


def test_the_stop_string_that_is_complete_first_wins_whatever_its_place_in_the_list():
    assert stream(["STOP", "END"], ["one END two STOP"]) == ("one ", "END")
    assert stream(["\n\n", "\n"], ["one\n\ntwo"]) == ("one", "\n")
    assert stream(["bc", "abc"], ["xabc"]) == ("x", "abc")


def test_a_stop_string_is_found_across_token_borders():
    matcher = StopStringMatcher(["</answer>"])
    assert matcher.push("42</ans") == StopScan("42")
    assert matcher.push("wer") == StopScan("")
    assert matcher.push("> and more") == StopScan("", "</answer>")


def test_a_stop_string_may_begin_within_a_false_start():
    assert stream(["aab"], "aaab") == ("a", "aab")
    assert stream(["abcabd"], "abcabcabd") == ("abc", "abcabd")


def test_a_false_start_is_given_back():
    matcher = StopStringMatcher(["</answer>"])
    assert matcher.push("a</ans") == StopScan("a")
    assert matcher.push("wered") == StopScan("</answered")
    assert matcher.push(" <") == StopScan(" ")
    assert matcher.finish() == "<"
    assert matcher.finish() == ""


def test_what_follows_a_match_is_dropped():
    matcher = StopStringMatcher(["."], include_in_output=True)
    assert matcher.push("Yes. No.") == StopScan("Yes.", ".")
    assert matcher.push("Perhaps.") == StopScan("", ".")
    assert matcher.finish() == ""


def test_without_stop_strings_everything_passes_at_once():
    assert StopStringMatcher([]).push("anything") == StopScan("anything")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InvalidRequestError, match="empty") as error:
        StopStringMatcher(["a", ""])
    assert error.value.param == "stop"


def test_time_is_linear_however_much_of_a_stop_string_the_text_repeats():
    def seconds(num_chars):
        matcher = StopStringMatcher(["a" * num_chars + "b"])
        start = time.thread_time()
        for _ in range(num_chars):
            matcher.push("a")
        for _ in range(10):
            matcher.push("c" + "a" * (num_chars // 10))
        return time.thread_time() - start

    seconds(100)
    # A search from the start of what is held back would take 16² times as long, not 16.
    assert seconds(32_000) < 64 * max(seconds(2_000), 1e-3)
