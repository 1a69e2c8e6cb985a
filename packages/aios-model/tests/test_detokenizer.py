"""Streamed text against the decoding of the whole, for every kind of vocabulary."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from aios_model.errors import InvalidRequestError, UnsupportedModelError
from aios_model.tokenizer.detokenizer import IncrementalDetokenizer
from aios_model.tokenizer.parts import TokenizerParts
from aios_model.tokenizer.pieces import byte_alphabet
from aios_model.tokenizer.tokenizer import Tokenizer


def byte_level() -> Backend:
    words = [*byte_alphabet().values(), "Ġthe", "é", "Ã©", "âĤ", "ðŁĺĢ", "<|end|>", "<think>", "<a b>"]
    backend = Backend(models.BPE({word: i for i, word in enumerate(dict.fromkeys(words))}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    backend.add_tokens(["<think>", "<a b>"])
    return backend


def sentencepiece(*, strip: int = 1) -> Backend:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "▁▁", "▁Hello", "▁wor", "ld", "é", "日", "a", ".", "x▁y"]
    backend = Backend(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", strip, 0)] if strip else steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def metaspace() -> Backend:
    backend = Backend(models.BPE({word: i for i, word in enumerate(["<s>", "▁", "▁Hello", "▁▁x", "y▁z", "é"])}, []))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<s>"])
    return backend


def undecoded() -> Backend:
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(["<s>", "one", "two", "three"])}, "<s>"))
    backend.add_special_tokens(["<s>"])
    return backend


BACKENDS = {
    "byte_level": byte_level(),
    "sentencepiece": sentencepiece(),
    "sentencepiece_without_prefix": sentencepiece(strip=0),
    "metaspace": metaspace(),
    "no_decoder": undecoded(),
}
TOKENIZERS = {name: Tokenizer(TokenizerParts(backend=backend)) for name, backend in BACKENDS.items()}
kinds = st.sampled_from(sorted(BACKENDS))


@st.composite
def sequences(draw, *, min_size=0, max_size=30):
    """A vocabulary and ids of it, with some beyond its end as a padded output layer may give."""
    name = draw(kinds)
    size = TOKENIZERS[name].vocab_size
    token_ids = st.integers(0, size + 2) | st.integers(max(0, size - 12), size - 1)
    return name, draw(st.lists(token_ids, min_size=min_size, max_size=max_size))


def stream(tokenizer, chunks, prompt=(), *, skip_special_tokens=True):
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=skip_special_tokens)
    return "".join([detokenizer.push(chunk) for chunk in chunks]) + detokenizer.finish()


@given(sequences(), st.booleans())
def test_whole_sequences_decode_as_the_tokenizers_library_does(sequence, skip_special_tokens):
    name, token_ids = sequence
    expected = BACKENDS[name].decode(token_ids, skip_special_tokens=skip_special_tokens)
    text = TOKENIZERS[name].decode(token_ids, skip_special_tokens=skip_special_tokens)
    # The library gives up on a whole run of sentencepiece byte tokens where one is invalid; we keep the valid ones.
    if name == "byte_level" or "\ufffd" not in expected:
        assert text == expected
    else:
        assert "\ufffd" in text


@given(sequences(), st.lists(st.integers(1, 5), max_size=30), st.booleans())
def test_any_split_of_the_ids_streams_the_text_of_the_whole(sequence, sizes, skip_special_tokens):
    name, token_ids = sequence
    chunks, rest = [], token_ids
    for size in sizes:
        chunks.append(rest[:size])
        rest = rest[size:]
    tokenizer = TOKENIZERS[name]
    expected = tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
    assert stream(tokenizer, [*chunks, rest], skip_special_tokens=skip_special_tokens) == expected
    assert stream(tokenizer, [[i] for i in token_ids], skip_special_tokens=skip_special_tokens) == expected


@given(sequences(), st.integers(0, 30), st.booleans())
def test_output_continues_the_text_of_its_prompt(sequence, border, skip_special_tokens):
    name, token_ids = sequence
    tokenizer, prompt, output = TOKENIZERS[name], token_ids[:border], token_ids[border:]
    shown = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens).push(prompt)
    text = stream(tokenizer, [[i] for i in output], prompt, skip_special_tokens=skip_special_tokens)
    # `shown` leaves out half a character at the end of the prompt, which the output may complete.
    assert shown + text == tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


@given(st.text(max_size=20))
def test_half_a_character_is_never_shown(text):
    tokenizer = TOKENIZERS["byte_level"]
    ids = [BACKENDS["byte_level"].token_to_id(byte_alphabet()[byte]) for byte in text.encode()]
    detokenizer = IncrementalDetokenizer(tokenizer)
    so_far = ""
    for token_id in ids:
        so_far += detokenizer.push([token_id])
        assert text.startswith(so_far)
    assert so_far == text
    assert detokenizer.finish() == ""


def test_a_sequence_that_ends_within_a_character_finishes_with_a_replacement():
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push([BACKENDS["byte_level"].token_to_id("âĤ")]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_a_leading_space_is_dropped_at_the_start_of_a_text_only():
    tokenizer = TOKENIZERS["sentencepiece"]
    bos, hello = (BACKENDS["sentencepiece"].token_to_id(token) for token in ("<s>", "▁Hello"))
    assert stream(tokenizer, [[hello], [hello]]) == "Hello Hello"
    assert stream(tokenizer, [[hello]], [bos]) == "Hello"
    assert stream(tokenizer, [[hello]], [bos, hello]) == " Hello"
    assert stream(tokenizer, [[hello]], [bos], skip_special_tokens=False) == " Hello"


def test_control_tokens_are_shown_on_demand_and_user_defined_ones_always():
    tokenizer = TOKENIZERS["byte_level"]
    ids = [BACKENDS["byte_level"].token_to_id(token) for token in ("<think>", "<|end|>", "<a b>")]
    assert tokenizer.decode(ids) == "<think><a b>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<think><|end|><a b>"


def test_one_token_alone_has_text_and_bytes():
    tokenizer, backend = TOKENIZERS["byte_level"], BACKENDS["byte_level"]
    assert tokenizer.token_text(backend.token_to_id("Ġthe")) == " the"
    assert tokenizer.token_bytes(backend.token_to_id("âĤ")) == b"\xe2\x82"
    assert tokenizer.token_text(backend.token_to_id("âĤ")) == "\ufffd"
    tokenizer, backend = TOKENIZERS["sentencepiece"], BACKENDS["sentencepiece"]
    assert tokenizer.token_text(backend.token_to_id("▁Hello")) == " Hello"
    assert tokenizer.token_bytes(backend.token_to_id("<0x0A>")) == b"\n"
    assert tokenizer.token_bytes(backend.token_to_id("<0xE4>")) == b"\xe4"
    assert tokenizer.token_bytes(tokenizer.vocab_size + 7) == b""


@pytest.mark.parametrize("token_id", [-1, 2**40, "x"])
def test_what_is_no_token_id_is_refused(token_id):
    with pytest.raises(InvalidRequestError, match="not a token id"):
        TOKENIZERS["byte_level"].decode([token_id])


def test_long_runs_of_invalid_bytes_take_constant_time_each():
    tokenizer = TOKENIZERS["byte_level"]
    continuation = BACKENDS["byte_level"].token_to_id(byte_alphabet()[0x80])
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert all(detokenizer.push([continuation]) == "\ufffd" for _ in range(10_000))


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.CTC(), decoders.BPEDecoder()])
def test_a_decoder_of_another_kind_is_refused_by_name(decoder):
    backend = undecoded()
    backend.decoder = decoder
    with pytest.raises(UnsupportedModelError, match="decoder"):
        Tokenizer(TokenizerParts(backend=backend))
