from __future__ import annotations

import dataclasses
import math
import pickle
import subprocess
import sys

import pytest

from aios_model.errors import InvalidRequestError
from aios_model.generation_config import GenerationDefaults
from aios_model.sampling.bad_words import BadWordMatcher, resolve_bad_words
from aios_model.sampling.params import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)

INTEGER_FIELDS = ("n", "top_k", "max_tokens", "min_tokens", "seed", "logprobs")
REAL_FIELDS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
BOOLEAN_FIELDS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")
ID_LIST_FIELDS = ("stop_token_ids", "allowed_token_ids")
HUGE = pytest.param(10**5000, id="a number of 5001 digits")


def refuse(param: str, value: object, **others: object) -> str:
    """Asserts that the field is refused by name and returns the message."""
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{param: value, **others})
    assert caught.value.param == param
    assert param in str(caught.value)
    assert len(str(caught.value)) < 300
    return str(caught.value)


@pytest.mark.parametrize("field", INTEGER_FIELDS)
@pytest.mark.parametrize("value", [1.0, 0.5, math.nan, math.inf, "1", True, [1], 2**63, -(2**63) - 1, HUGE])
def test_integer_fields_refuse_what_is_no_integer_in_range(field, value):
    refuse(field, value)


@pytest.mark.parametrize("field", REAL_FIELDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", True, None, [1.0], -3, 2**63, HUGE])
def test_real_fields_refuse_what_is_no_finite_number_in_range(field, value):
    refuse(field, value)


@pytest.mark.parametrize("field", BOOLEAN_FIELDS)
@pytest.mark.parametrize("value", [1, 0, None, "true"])
def test_flags_refuse_what_is_no_boolean(field, value):
    refuse(field, value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.01),
        ("temperature", 2.01),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("presence_penalty", 2.01),
        ("presence_penalty", -2.01),
        ("frequency_penalty", 2.01),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e7),
        ("n", 0),
        ("n", 10**9),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("min_tokens", -1),
        ("logprobs", -1),
        ("logprobs", 1025),
    ],
)
def test_values_beyond_a_bound_are_refused_with_value_and_bound(field, value):
    message = refuse(field, value)
    assert repr(value) in message
    assert "between" in message or "above" in message


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", (0, 2, 0.7)),
        ("top_p", (1e-9, 1)),
        ("min_p", (0, 1)),
        ("presence_penalty", (-2, 2)),
        ("frequency_penalty", (-2, 2)),
        ("repetition_penalty", (1e-9, 1.3)),
        ("n", (1, MAX_CHOICES)),
        ("max_tokens", (1, None)),
        ("logprobs", (0, 20, None)),
        ("seed", (0, -(2**63), 2**63 - 1, None)),
    ],
)
def test_values_at_the_bounds_are_kept(field, values):
    for value in values:
        assert getattr(SamplingParams(**{field: value}), field) == value


def test_numbers_are_kept_as_floats():
    assert isinstance(SamplingParams(temperature=1).temperature, float)


def test_top_k_minus_one_means_off_and_seed_minus_one_means_none():
    params = SamplingParams(top_k=-1, seed=-1)
    assert params.top_k == 0
    assert params.seed is None


def test_min_tokens_above_max_tokens_are_refused_and_fine_without_max_tokens():
    assert "16" in refuse("min_tokens", 17)
    assert SamplingParams(min_tokens=17, max_tokens=None).min_tokens == 17
    assert SamplingParams(min_tokens=17, max_tokens=17).max_tokens == 17


def test_stop_accepts_one_string_or_many_and_drops_repetitions():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b", "a"]).stop == ("a", "b")
    assert SamplingParams(stop=None).stop == ()


@pytest.mark.parametrize("field", ["stop", "bad_words"])
@pytest.mark.parametrize("value", ["", [""], ["a", ""], [1], [None], 5, {"a": 1}, ["x" * 1025], b"ab"])
def test_string_lists_refuse_what_is_no_short_string(field, value):
    refuse(field, value)


@pytest.mark.parametrize("field", ID_LIST_FIELDS)
@pytest.mark.parametrize("value", [[-1], [2**31], [2**63], [1.0], ["1"], [True], [None], "12", 3, {3}])
def test_token_id_lists_refuse_what_is_no_token_id(field, value):
    refuse(field, value)


@pytest.mark.parametrize("value", [[[]], [[1], []], [1], [[-1]], [["a"]], [[1] * 1025], "ab"])
def test_bad_word_sequences_refuse_what_is_no_list_of_token_ids(value):
    refuse("bad_words_token_ids", value)


@pytest.mark.parametrize(
    "value",
    [
        [1],
        "a",
        {"x": 1},
        {-1: 1},
        {"-1": 1},
        {1.0: 1},
        {True: 1},
        {1: "2"},
        {1: math.nan},
        {1: 101},
        {1: None},
        {2**63: 1},
    ],
)
def test_logit_bias_refuses_what_is_no_map_from_token_ids_to_bounded_numbers(value):
    refuse("logit_bias", value)


def test_logit_bias_takes_the_string_keys_of_json_and_is_copied():
    given = {"50": -100, 7: 2}
    params = SamplingParams(logit_bias=given)
    given[8] = 1
    assert params.logit_bias == {50: -100.0, 7: 2.0}
    assert SamplingParams(logit_bias={}).logit_bias is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", [str(i) for i in range(MAX_STOP_STRINGS + 1)]),
        ("stop_token_ids", list(range(MAX_STOP_TOKEN_IDS + 1))),
        ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 0.0)),
        ("logit_bias", dict.fromkeys(range(10**6), 0.0)),
        ("allowed_token_ids", range(MAX_ALLOWED_TOKEN_IDS + 1)),
        ("bad_words", [str(i) for i in range(MAX_BAD_WORDS + 1)]),
        ("bad_words_token_ids", [[i] for i in range(2 * MAX_BAD_WORDS + 1)]),
    ],
)
def test_long_lists_are_refused_with_both_numbers(field, value):
    assert str(len(value)) in refuse(field, value)


def test_empty_allowed_token_ids_are_refused():
    assert "empty" in refuse("allowed_token_ids", [])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop_token_ids", [3, 100]),
        ("logit_bias", {100: 1.0}),
        ("allowed_token_ids", [100]),
        ("bad_words_token_ids", [[1, 100, 2]]),
    ],
)
def test_token_ids_at_the_output_width_are_refused_for_that_model(field, value):
    params = SamplingParams(**{field: value})
    params.validate_for(vocab_size=101)
    with pytest.raises(InvalidRequestError, match=r"100.*0 to 99") as caught:
        params.validate_for(vocab_size=100)
    assert caught.value.param == ("bad_words" if field == "bad_words_token_ids" else field)


def test_logprobs_are_bounded_by_what_the_server_reports():
    SamplingParams(logprobs=20).validate_for(vocab_size=100)
    with pytest.raises(InvalidRequestError, match="between 0 and 20, not 21"):
        SamplingParams(logprobs=21).validate_for(vocab_size=100)
    SamplingParams(logprobs=21).validate_for(vocab_size=100, max_logprobs=50)


def test_greedy_allows_several_choices():
    assert SamplingParams(temperature=0, n=4).is_greedy


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (9e-6, True), (1e-5, False), (1e-3, False), (1, False)])
def test_only_vanishing_temperatures_are_greedy(temperature, greedy):
    assert SamplingParams(temperature=temperature).is_greedy is greedy


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": 0.5},
        {"logprobs": 0},
        {"min_tokens": 1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {1: 1}},
        {"allowed_token_ids": [1]},
        {"bad_words_token_ids": [[1]]},
        {"structured_outputs": {"regex": "a"}},
    ],
)
def test_argmax_suffices_only_for_plain_greedy_requests(option):
    assert SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.5, seed=1, n=2, stop="x").needs_only_argmax
    assert not SamplingParams(**{"temperature": 0, **option}).needs_only_argmax


def test_params_survive_pickling_replacing_and_asdict():
    params = SamplingParams(logit_bias={1: 2.0}, stop="x", bad_words_token_ids=[[1, 2]], seed=7)
    assert pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, seed=8).logit_bias == {1: 2.0}
    assert SamplingParams(**dataclasses.asdict(params)) == params
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 3  # type: ignore[misc]


DEFAULTS = GenerationDefaults(temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.05)


def test_absent_fields_take_the_models_defaults_and_given_ones_win():
    params = SamplingParams.from_optional({"top_p": 0.5, "temperature": None, "seed": None}, defaults=DEFAULTS)
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.5, 20)
    assert (params.min_p, params.repetition_penalty, params.max_tokens) == (0.0, 1.05, 16)
    assert SamplingParams.from_optional({"max_tokens": None}).max_tokens is None
    assert SamplingParams.from_optional({"top_k": 0, "temperature": 0}, defaults=DEFAULTS).top_k == 0


def test_unknown_fields_are_refused_by_name():
    with pytest.raises(InvalidRequestError, match="best_of") as caught:
        SamplingParams.from_optional({"best_of": 2})
    assert caught.value.param == "best_of"


class WordTokenizer:
    """One token per known piece, longest first, as a byte-pair tokenizer would have it."""

    pieces = (" word", "wo", "rd", "the", " the", " ")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = [99] if add_special_tokens else []
        while text:
            piece = max((p for p in self.pieces if text.startswith(p)), key=len, default=None)
            if piece is None:
                return ids
            ids.append(self.pieces.index(piece))
            text = text[len(piece) :]
        return ids


def test_bad_words_are_banned_with_and_without_a_leading_space():
    params = resolve_bad_words(SamplingParams(bad_words=["word", " the"]), WordTokenizer())
    assert params.bad_words_token_ids == ((1, 2), (0,), (3,), (4,))
    assert resolve_bad_words(params, WordTokenizer()) == params


def test_bad_words_keep_the_sequences_given_as_token_ids():
    params = resolve_bad_words(SamplingParams(bad_words="the", bad_words_token_ids=[[7, 8]]), WordTokenizer())
    assert params.bad_words_token_ids == ((7, 8), (3,), (4,))


def test_a_bad_word_without_tokens_is_refused():
    for word in ("   ", "zzz"):
        with pytest.raises(InvalidRequestError, match="no tokens") as caught:
            resolve_bad_words(SamplingParams(bad_words=[word]), WordTokenizer())
        assert caught.value.param == "bad_words"


def test_params_without_bad_words_need_no_tokenizer():
    params = SamplingParams()
    assert resolve_bad_words(params, None) is params  # type: ignore[arg-type]


def test_a_bad_sequence_bans_its_last_token_only_where_the_others_were_just_generated():
    matcher = BadWordMatcher([(5,), (1, 2), (9, 1, 3), (1, 1, 1)])
    assert matcher.banned([]) == [5]
    assert matcher.banned([1]) == [5, 2]
    assert matcher.banned([9, 1]) == [5, 2, 3]
    assert matcher.banned([1, 1]) == [5, 2, 1]
    assert matcher.banned([1, 9]) == [5]


def test_requests_are_described_without_importing_torch():
    code = (
        "import sys\n"
        "from aios_model.sampling import SamplingParams, SamplingRow, SampledToken, TokenLogprobs, resolve_bad_words\n"
        "from aios_model.sampling import NonFiniteLogitsError, NoTokenLeftError, SamplingError\n"
        "SamplingParams(stop='x').validate_for(vocab_size=10)\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'heavy import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_name_the_package_offers_can_be_imported():
    import aios_model.sampling as sampling

    assert all(getattr(sampling, name) is not None for name in sampling.__all__)
    assert set(sampling.__all__) == set(sampling._MODULES)
    with pytest.raises(AttributeError):
        sampling.no_such_name  # noqa: B018
