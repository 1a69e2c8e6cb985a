"""From a constraint to masks: which texts llguidance is made to accept, and what is refused."""

import importlib.util
import json
import re
from contextlib import suppress
from pathlib import Path
from random import Random

import jsonschema
import numpy as np
import pytest

from aios_model.sampling.structured import StructuredOutputsParams
from aios_model.tokenizer.tokenizer import Tokenizer
from aios_model.weights.hub import resolve_model
from aios_serve.structured.errors import GrammarError
from aios_serve.structured.grammar import new_matcher, probe
from aios_serve.structured.vocabulary import Vocabulary


def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


scripted = load("scripted")
EOS, VOCAB_SIZE, byte_tokenizer = scripted.EOS, scripted.VOCAB_SIZE, scripted.byte_tokenizer
random_schema = load("structured_cases").random_schema


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def llguidance_tokenizer(tokenizer):
    return Vocabulary.of(tokenizer, eos_token_ids=(EOS,), vocab_size=VOCAB_SIZE).build()


@pytest.fixture
def accepts(llguidance_tokenizer):
    """Whether a text is a whole output under a constraint."""

    def check(text, **constraint):
        matcher = new_matcher(StructuredOutputsParams(**constraint), llguidance_tokenizer)
        token_ids = list(text.encode())
        return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()

    return check


def allowed_ids(matcher):
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


@pytest.mark.parametrize("text", ['{"a":1,"b":[1,2]}', '{"a": 1, "b": [1, 2]}', '{"a":1, "b": [1,2]}'])
def test_one_space_may_follow_commas_and_colons(accepts, text):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"items": {"type": "integer"}}}}
    assert accepts(text, json=schema)
    assert accepts(text, json=schema, disable_any_whitespace=True) is (" " not in text)


@pytest.mark.parametrize(
    "text",
    ['{"a":  1}', '{ "a": 1}', '{"a" : 1}', '{"a": 1 }', '{"a":\n1}', '{"a":\t1}', ' {"a": 1}', '{"a": 1} ', "{ }"],
)
def test_no_other_whitespace_is_part_of_json(accepts, text):
    for constraint in ({"json": {"type": "object"}}, {"json_object": True}):
        assert not accepts(text, **constraint)
    # Whatever a schema says about that.
    flexible = {"type": "object", "x-guidance": {"whitespace_flexible": True}}
    assert not accepts(text, json=flexible)


def test_a_json_object_is_any_object_and_nothing_else(accepts):
    assert accepts('{"a": {"b": [1, null, "x"]}}', json_object=True)
    assert accepts("{}", json_object=True)
    assert not accepts("[1]", json_object=True)
    assert not accepts('"a"', json_object=True)


def test_properties_come_in_the_order_of_the_schema(accepts):
    properties = {"z": {"type": "integer"}, "a": {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "required": ["z", "a"]}
    assert accepts('{"z":1,"a":2}', json=schema)
    assert not accepts('{"a":2,"z":1}', json=schema)


@pytest.mark.parametrize(
    ("expression", "matching", "others"),
    [
        (r"(a+)+b", ["ab", "aaaab"], ["b", "aa", "abb", "xab"]),
        (r"^[a-z]+/\d{2}$", ["ab/12"], ["ab/123", "Ab/12"]),
        (r"a/b|c\/d", ["a/b", "c/d"], ["a\\/b"]),
        (r"é{2}|日", ["éé", "日"], ["é"]),
        ("x\ny", ["x\ny"], ["xy"]),
        (r".*", ["", "anything"], ["two\nlines"]),
        (r"(?i)yes", ["YES", "yes"], ["no"]),
        ('"[^"]*"', ['"a b"'], ['"a"b"']),
    ],
)
def test_the_whole_output_matches_an_expression(accepts, expression, matching, others):
    assert all(accepts(text, regex=expression) for text in matching)
    assert not any(accepts(text, regex=expression) for text in others)


def test_choices_are_taken_literally(accepts):
    random = Random(7)
    alphabet = 'ab"\\\n\t\r/é日😀 \x00\x7f\u2028{}|[]()<>$^.*+?-%'
    for _ in range(100):
        choices = ["".join(random.choices(alphabet, k=random.randint(1, 6))) for _ in range(random.randint(1, 4))]
        assert all(accepts(choice, choice=choices) for choice in choices)
        other = "".join(random.choices(alphabet, k=3))
        assert accepts(other, choice=choices) is (other in choices)


@pytest.mark.parametrize(
    "grammar",
    [
        'start: sum\nsum: NUMBER | sum "+" NUMBER\nNUMBER: /[0-9]+/',
        'root ::= sum\nsum ::= number | number "+" sum\nnumber ::= [0-9]+',
    ],
)
def test_grammars_are_lark_or_gbnf(accepts, grammar):
    assert accepts("1+23+4", grammar=grammar)
    assert not accepts("1+", grammar=grammar)
    assert not accepts("1 + 2", grammar=grammar)


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"json": {"type": "strin"}}, "Invalid type: strin"),
        ({"json": {"uniqueItems": True}}, "uniqueItems"),
        ({"json": {"not": {"type": "string"}}}, "not"),
        ({"json": {"$ref": "#"}}, "no text satisfies it"),
        ({"json": {"$ref": "https://example.org/schema.json"}}, "not present"),
        ({"json": {"$ref": "#/nowhere"}}, "nowhere"),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 2}}, "minimum"),
        ({"json": {"type": "string", "format": "colour"}}, "Unknown format: colour"),
        ({"json": {"properties": {f"p{i}": {} for i in range(2000)}}}, "Current row has"),
        ({"grammar": 'start: "a" other'}, "other"),
        ({"grammar": 'root ::= "a" other'}, "other"),
        ({"grammar": "no grammar"}, "Expected ::="),
        ({"grammar": "start: start"}, "no text satisfies it"),
        ({"grammar": "start: <|nothing|>"}, "unknown special token"),
        ({"grammar": "root ::= " + "(" * 50_000}, "recursion"),
        ({"grammar": "start: " + "(" * 50_000}, "nested"),
    ],
)
def test_what_cannot_be_kept_to_is_refused_with_the_reason(llguidance_tokenizer, constraint, reason):
    params = StructuredOutputsParams(**constraint)
    with pytest.raises(GrammarError, match=re.escape(reason)) as caught:
        probe(new_matcher(params, llguidance_tokenizer), params)
    message = str(caught.value)
    assert caught.value.param == params.param
    assert message.startswith(f"{params.param} cannot be honoured: ")
    assert len(message) < 500
    assert "x-guidance" not in message
    assert "no_forcing" not in message or params.kind == "grammar"


def test_hostile_constraints_compile_or_are_refused_soon(llguidance_tokenizer):
    hostile = [
        {"regex": "(a+)+b"},
        {"regex": "a{1000000}"},
        {"regex": "((a{1000}){1000}){1000}"},
        {"regex": "(a?){5000}a{5000}"},
        {"regex": "(.*a){30}"},
        {"regex": "a|" * 100_000 + "b"},
        {"regex": "(" * 100_000},
        {"json": {"enum": [f"value {i}" for i in range(10_000)]}},
        {"json": {"allOf": [{"anyOf": [{"properties": {f"{i}-{j}": {}}} for j in range(5)]} for i in range(9)]}},
        {"json": {"type": "array", "items": {"$ref": "#"}, "minItems": 1}},
        {"json": {"type": "array", "items": {"$ref": "#"}}},
        {"grammar": 'start: a\na: a a | ""'},
    ]
    for constraint in hostile:
        params = StructuredOutputsParams(**constraint)
        with suppress(GrammarError):
            probe(new_matcher(params, llguidance_tokenizer), params)


def test_random_walks_through_random_schemas_end_in_valid_json(llguidance_tokenizer):
    """Whatever a model draws: a uniform one is the worst of them."""
    num_finished = 0
    for seed in range(40):
        random = Random(seed)
        schema = random_schema(random)
        matcher = new_matcher(StructuredOutputsParams(json=schema), llguidance_tokenizer)
        output: list[int] = []
        while not output or output[-1] != EOS:
            output.append(random.choice(allowed_ids(matcher)))
            assert matcher.consume_token(output[-1]), matcher.get_error()
            if len(output) > 2000:
                break
        else:
            num_finished += 1
            jsonschema.validate(json.loads(bytes(output[:-1])), schema)
    assert num_finished >= 30


# Vocabularies --------------------------------------------------------------------------------------------------------


def test_special_tokens_are_no_text(llguidance_tokenizer):
    matcher = new_matcher(StructuredOutputsParams(regex="<eos>|a"), llguidance_tokenizer)
    assert allowed_ids(matcher) == sorted(b"<a")
    assert matcher.try_consume_tokens(list(b"a"))
    assert allowed_ids(matcher) == [EOS]


@pytest.mark.parametrize("vocab_size", [257, 258, 300, 320, 321])
def test_tokens_that_pad_the_output_are_never_allowed(tokenizer, vocab_size):
    built = Vocabulary.of(tokenizer, eos_token_ids=(EOS,), vocab_size=vocab_size).build()
    assert built.vocab_size == vocab_size
    matcher = new_matcher(StructuredOutputsParams(regex="(.|\n)*"), built)
    assert max(allowed_ids(matcher)) == EOS


def test_tokens_beyond_the_output_are_left_out(tokenizer):
    vocabulary = Vocabulary.of(tokenizer, eos_token_ids=(100, EOS), vocab_size=200)
    assert (len(vocabulary.tokens), vocabulary.special_token_ids, vocabulary.eos_token_ids) == (200, [], [100])


def test_the_bundled_model_s_tokens_spell_what_they_decode_to():
    tokenizer = Tokenizer.from_files(resolve_model(None))
    vocabulary = Vocabulary.of(tokenizer, eos_token_ids=tokenizer.eos_token_ids, vocab_size=tokenizer.vocab_size)
    assert set(tokenizer.eos_token_ids) <= set(vocabulary.special_token_ids)
    built = vocabulary.build()
    text = '{"größe": "日本 😀\\n", "x": [1.5, null]}'
    for constraint in ({"json_object": True}, {"regex": "(.|\n)*"}, {"choice": [text]}):
        matcher = new_matcher(StructuredOutputsParams(**constraint), built)
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        for token_id in token_ids:
            assert token_id in allowed_ids(matcher)
            assert matcher.consume_token(token_id)
        assert set(tokenizer.eos_token_ids) <= set(allowed_ids(matcher))
