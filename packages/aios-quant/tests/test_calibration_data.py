"""Text becomes windows of tokens, or an error that says what is wrong with the file."""

from __future__ import annotations

import json

import pytest
import torch

from aios_model.errors import ConfigError
from aios_model.tokenizer.tokenizer import Tokenizer
from aios_model.weights.hub import resolve_model
from aios_quant.calibrate.data import TokenWindows, read_windows


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint) -> Tokenizer:
    return Tokenizer.from_files(resolve_model(str(tiny_checkpoint("llama3"))))


def read(tokenizer, path, **options) -> TokenWindows:
    return read_windows(tokenizer, path, **{"bundled": "calibration", "length": 16, "limit": 100, **options})


@pytest.mark.parametrize("name", ["calibration", "evaluation"])
def test_the_bundled_texts_fill_windows_for_any_tokenizer(tokenizer, name):
    windows = read(tokenizer, None, bundled=name, length=512, limit=4)
    assert windows.tokens_WS.shape == (4, 512)
    assert windows.tokens_WS.dtype == torch.int64
    assert name in windows.name


def test_the_bundled_texts_share_no_document():
    texts = [
        set(resource.read_text(encoding="utf-8").splitlines())
        for resource in (bundled_file("calibration"), bundled_file("evaluation"))
    ]
    assert all(texts)
    assert not texts[0] & texts[1]


def bundled_file(name):
    from importlib.resources import files

    return files("aios_quant.calibrate").joinpath("texts", f"{name}.jsonl")


def test_a_text_file_is_cut_into_whole_windows(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 10)
    windows = read(tokenizer, path, length=30)
    assert windows.tokens_WS.shape == (3, 30)
    assert windows.tokens_WS.flatten().tolist() == tokenizer.encode("abcdefghij" * 10)[:90]


def test_json_lines_hold_texts_and_messages(tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path.write_text(json.dumps({"text": "abc"}) + "\n\n" + json.dumps({"messages": messages}) + "\n")
    # This tokenizer has no chat template, so contents are joined.
    assert read(tokenizer, path, length=9).tokens_WS.tolist() == [tokenizer.encode("abchi\n\nho")]


def test_windows_are_equal_if_and_only_if_their_fingerprints_are(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 10)
    first, again, shorter = read(tokenizer, path), read(tokenizer, path), read(tokenizer, path, length=8)
    assert first.fingerprint == again.fingerprint != shorter.fingerprint


def test_no_more_text_is_read_than_windows_need(tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "a" * 64}) + "\nthis line is not JSON\n")
    assert read(tokenizer, path, length=16, limit=4).tokens_WS.shape == (4, 16)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("short.txt", b"abc", "3 tokens, a window needs 16"),
        ("empty.txt", b"", "0 tokens"),
        ("latin.txt", b"\xe9" * 100, "UTF-8"),
        ("broken.jsonl", b'{"text": "abc"}\n{"text": ', "line 2 is not JSON"),
        ("other.jsonl", b'{"prompt": "abc"}', "line 1 has neither"),
        ("list.jsonl", b"[1, 2]", "line 1 has neither"),
        ("numbers.jsonl", b'{"messages": [1, 2]}', "refuses"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_reason(tokenizer, tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=complaint) as refused:
        read(tokenizer, tmp_path / name)
    assert name in str(refused.value)


def test_a_missing_file_is_named(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.txt cannot be read"):
        read(tokenizer, tmp_path / "nowhere.txt")
