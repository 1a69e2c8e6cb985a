"""What a request may ask of its output: one constraint, well formed, of bounded size."""

import json
import pickle
import subprocess
import sys

import pytest

from aios_model.errors import InvalidRequestError
from aios_model.sampling import SamplingParams, StructuredOutputsParams
from aios_model.sampling.structured import MAX_CHOICES_LISTED, MAX_CONSTRAINT_BYTES, MAX_SCHEMA_DEPTH


def test_a_schema_is_kept_as_text_with_its_members_in_order():
    schema = {"type": "object", "properties": {"z": {"const": "é"}, "a": {"type": "integer"}}}
    params = StructuredOutputsParams(json=schema)
    assert params.json == json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    assert StructuredOutputsParams(json=json.dumps(schema, indent=2)) == params
    assert (params.kind, params.param) == ("json", "structured_outputs.json")


def test_constraints_are_hashable_and_picklable_and_survive_as_mappings():
    params = StructuredOutputsParams(choice=["a", "b", "a"])
    assert params.choice == ("a", "b")
    assert {params: 1}[pickle.loads(pickle.dumps(params))] == 1
    sampling = SamplingParams(structured_outputs={"choice": ["a", "b"], "regex": None})  # type: ignore[arg-type]
    assert sampling.structured_outputs == params
    assert sampling.changes_logits


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, "", "none of them"),
        ({"json_object": False}, "", "none of them"),
        ({"regex": "a", "choice": ["a"]}, "", "regex and choice"),
        ({"json": {}, "json_object": True}, "", "json and json_object"),
        ({"json": "{"}, "json", "not valid JSON"),
        ({"json": "[1]"}, "json", "must be a JSON schema"),
        ({"json": 3}, "json", "must be a JSON schema"),
        ({"json": {"const": {1, 2}}}, "json", "cannot be written"),
        ({"json": {"minimum": float("nan")}}, "json", "cannot be written"),
        ({"json": {"const": "\ud800"}}, "json", "UTF-8"),
        ({"json": "[" * 100_000}, "json", "not valid JSON"),
        ({"json": {"enum": [f"value {i}" for i in range(100_000)]}}, "json", "bytes"),
        ({"regex": ""}, "regex", "empty"),
        ({"regex": 1}, "regex", "string"),
        ({"regex": "a" * (MAX_CONSTRAINT_BYTES + 1)}, "regex", "bytes"),
        ({"regex": "é" * (MAX_CONSTRAINT_BYTES // 2 + 1)}, "regex", "bytes"),
        ({"grammar": "  \n"}, "grammar", "empty"),
        ({"choice": []}, "choice", "1 to"),
        ({"choice": "ab"}, "choice", "list of strings"),
        ({"choice": ["a", 1]}, "choice", "strings only"),
        ({"choice": ["a", ""]}, "choice", "none of them empty"),
        ({"choice": [str(i) for i in range(MAX_CHOICES_LISTED + 1)]}, "choice", "1 to"),
        ({"json_object": 1}, "json_object", "true or false"),
        ({"json_object": True, "disable_any_whitespace": "no"}, "disable_any_whitespace", "true or false"),
    ],
)
def test_malformed_constraints_are_refused_by_name(fields, param, message):
    with pytest.raises(InvalidRequestError, match=message) as caught:
        StructuredOutputsParams(**fields)
    assert caught.value.param == "structured_outputs" + (f".{param}" if param else "")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", ["regex", [1], {"regexp": "a"}])
def test_sampling_params_take_constraints_and_mappings_of_known_fields_only(value):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(structured_outputs=value)
    assert caught.value.param == "structured_outputs"


def test_schemas_may_nest_as_deep_as_the_limit_and_no_deeper():
    def nested(depth):
        schema: dict = {}
        for _ in range(depth - 1):
            schema = {"not": schema}
        return schema

    assert StructuredOutputsParams(json=nested(MAX_SCHEMA_DEPTH))
    for depth in (MAX_SCHEMA_DEPTH + 1, 1000, 100_000):
        with pytest.raises(InvalidRequestError, match="nests deeper"):
            StructuredOutputsParams(json=nested(depth))


def test_constraints_are_described_without_importing_torch():
    code = (
        "import sys\n"
        "from aios_model.sampling import SamplingParams, StructuredOutputsParams\n"
        "SamplingParams(structured_outputs=StructuredOutputsParams(json={'type': 'object'}))\n"
        "assert 'torch' not in sys.modules and 'llguidance' not in sys.modules, 'heavy import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
