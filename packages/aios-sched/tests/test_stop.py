from __future__ import annotations

import pytest

from aios_sched.stop import Stop, check_stop

EOS, END = 0, 7


@pytest.fixture
def stop_after(lab):
    """What `check_stop` says once a request has these output tokens."""

    def check(output, *, max_model_len=64, prompt=(1, 2, 3), **params):
        params = {"max_tokens": 8, "ignore_eos": False, **params}
        request = lab.make_request("r", list(prompt), **params)
        if request.max_tokens is None:
            request.max_tokens = max_model_len - len(prompt)
        for token_id in output:
            request.append_token(token_id)
        return check_stop(request, max_model_len=max_model_len)

    return check


def test_ordinary_token_goes_on(stop_after):
    assert stop_after([5]) is None


def test_end_of_sequence_stops_without_naming_a_token(stop_after):
    assert stop_after([5, EOS]) == Stop(reason="stop", token_id=None)


def test_stop_token_stops_and_is_named(stop_after):
    assert stop_after([5, END], stop_token_ids=(END,)) == Stop(reason="stop", token_id=END)


def test_only_the_newest_token_is_looked_at(stop_after):
    assert stop_after([END, 5], stop_token_ids=(END,)) is None


def test_end_of_sequence_is_an_ordinary_token_when_it_is_to_be_ignored(stop_after):
    assert stop_after([EOS], ignore_eos=True) is None


def test_end_of_sequence_ignored_but_listed_as_stop_token_stops(stop_after):
    assert stop_after([EOS], ignore_eos=True, stop_token_ids=(EOS,)) == Stop(reason="stop", token_id=EOS)


def test_last_token_allowed_ends_by_length(stop_after):
    assert stop_after([5, 5], max_tokens=3) is None
    assert stop_after([5, 5, 5], max_tokens=3) == Stop(reason="length")


def test_stop_token_beats_length(stop_after):
    assert stop_after([5, 5, EOS], max_tokens=3) == Stop(reason="stop")


def test_stop_token_counts_only_behind_min_tokens(stop_after):
    assert stop_after([5, EOS], min_tokens=2) is None
    assert stop_after([5, 5, EOS], min_tokens=2) == Stop(reason="stop")


def test_length_ends_even_when_min_tokens_hides_the_stop_token(stop_after):
    assert stop_after([5, EOS], min_tokens=2, max_tokens=2) == Stop(reason="length")


def test_full_context_ends_by_length(stop_after):
    assert stop_after([5], max_tokens=None, max_model_len=5) is None
    assert stop_after([5, 5], max_tokens=None, max_model_len=5) == Stop(reason="length")


def test_a_complete_form_ends_before_min_tokens(stop_after):
    """The sampler draws a stop token that early only where the form leaves nothing else."""
    assert stop_after([5, EOS], min_tokens=2, structured_outputs={"regex": "a"}) == Stop(reason="stop")
