"""Sampling defaults from a model's files."""

from __future__ import annotations

import json

import pytest

from aios_model.errors import CheckpointError
from aios_model.generation_config import GenerationDefaults
from aios_model.weights.hub import ModelFiles, resolve_model


def defaults(root, content):
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (root / "generation_config.json").write_text(text)
    return GenerationDefaults.from_files(ModelFiles(name="m", root=root, format="safetensors", weight_paths=()))


def test_every_recommended_value_is_read(tmp_path):
    content = {
        "do_sample": True,
        "eos_token_id": [7, 9],
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.05,
        "max_new_tokens": 2048.0,
        "transformers_version": "4.51.0",
    }
    assert defaults(tmp_path, content) == GenerationDefaults(
        eos_token_ids=(7, 9),
        temperature=0.7,
        top_p=0.8,
        top_k=20,
        min_p=0.05,
        repetition_penalty=1.05,
        max_new_tokens=2048,
    )


def test_a_missing_file_and_null_values_leave_everything_open(tmp_path):
    assert defaults(tmp_path, None) == GenerationDefaults()
    assert defaults(tmp_path, {"temperature": None, "eos_token_id": None}) == GenerationDefaults()


def test_one_end_of_sequence_id_need_not_be_a_list(tmp_path):
    assert defaults(tmp_path, {"eos_token_id": 0}).eos_token_ids == (0,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"temperature": "hot"}, "temperature must be a number >= 0, got 'hot'"),
        ({"temperature": -1}, "temperature"),
        ('{"temperature": NaN}', "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"repetition_penalty": True}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [True]}, "eos_token_id"),
        ("[1]", "JSON object"),
        ("{", "cannot be read"),
        ('{"a":' + "[" * 100_000, "cannot be read"),
    ],
)
def test_a_damaged_value_is_refused_with_its_name(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        defaults(tmp_path, content)


def test_gguf_metadata_may_carry_defaults_too():
    metadata = {"general.sampling.temp": 0.6, "general.sampling.top_k": 40, "general.sampling.penalty_repeat": 1.1}
    expected = GenerationDefaults(temperature=0.6, top_k=40, repetition_penalty=1.1)
    assert GenerationDefaults.from_gguf(metadata) == expected


def test_the_bundled_model_recommends_nothing():
    assert GenerationDefaults.from_files(resolve_model(None)) == GenerationDefaults()
