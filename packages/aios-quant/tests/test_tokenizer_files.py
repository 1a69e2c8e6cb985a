"""The tokenizer and the sampling defaults that go with a converted model."""

from __future__ import annotations

import json

import pytest
import transformers

from aios_model.generation_config import GenerationDefaults
from aios_model.tokenizer.tokenizer import Tokenizer
from aios_model.weights.hub import resolve_model
from aios_quant.writing.tokenizer_files import token_ids, write_tokenizer

TEXTS = [
    "Hello, world!",
    "  two spaces\n\n\tand tabs ",
    "1234 + 5 = 6",
    "naïve café 图书馆 🙂",
    "<|im_start|>user\nhi<|im_end|>",
    "",
]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder that the bundled model's tokenizer was written to."""
    folder = tmp_path_factory.mktemp("written")
    files = resolve_model(None)
    write_tokenizer(files, folder, max_length=8192)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **token_ids(files)}))
    return folder


def test_our_reader_gets_the_tokenizer_of_the_gguf_file_back(written):
    before = Tokenizer.from_files(resolve_model(None))
    after = Tokenizer.from_files(resolve_model(str(written), tokenizer_only=True))
    for text in TEXTS:
        assert after.encode(text) == before.encode(text)
        assert after.decode(before.encode(text)) == before.decode(before.encode(text))
    assert after.encode_chat(MESSAGES) == before.encode_chat(MESSAGES)
    assert after.bos_token_id == before.bos_token_id
    assert set(after.eos_token_ids) == set(before.eos_token_ids)
    assert after.special_token_ids == before.special_token_ids


def test_transformers_reads_the_same_tokenizer(written):
    ours = Tokenizer.from_files(resolve_model(None))
    theirs = transformers.AutoTokenizer.from_pretrained(written)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)
    chat = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert chat == ours.apply_chat_template(MESSAGES)
    assert theirs.eos_token_id in ours.eos_token_ids


def test_sampling_defaults_are_read_back(written):
    files = resolve_model(str(written), tokenizer_only=True)
    before, after = GenerationDefaults.from_files(resolve_model(None)), GenerationDefaults.from_files(files)
    assert after.temperature == before.temperature
    assert set(after.eos_token_ids) == set(Tokenizer.from_files(resolve_model(None)).eos_token_ids)


def test_a_folder_is_copied_as_it_is(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("llama2")
    (source / "LICENSE").write_text("free")
    (source / "additional_chat_templates").mkdir(exist_ok=True)
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    write_tokenizer(resolve_model(str(source)), tmp_path, max_length=128)
    for name in ("tokenizer.json", "generation_config.json", "LICENSE", "additional_chat_templates/tool_use.jinja"):
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes()
    assert not list(tmp_path.glob("*.safetensors"))
    assert not (tmp_path / "config.json").exists()
