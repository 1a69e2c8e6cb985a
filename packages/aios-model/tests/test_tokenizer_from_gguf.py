"""Tokenizers built from GGUF metadata: the bundled one against transformers, small ones against their originals."""

from __future__ import annotations

import logging
import time
import warnings
from itertools import pairwise

import gguf
import pytest
from tokenizers import AddedToken, Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from aios_model.errors import CheckpointError, UnsupportedModelError
from aios_model.tokenizer.tokenizer import Tokenizer
from aios_model.weights.hub import ModelFiles, resolve_model

ODD_STRINGS = [
    "",
    " ",
    "  ",
    "   a",
    "a   ",
    "\t",
    "\t\tx = 1\n",
    "\n",
    "\n\n\n",
    "\r\n",
    "a\r\nb\r\n\r\n",
    " \n \n",
    "    def f(x):\n        return x  # ok\n",
    "for (int i=0;i<10;++i){a[i]+=b[i]<<2;}",
    "SELECT * FROM t WHERE a='b' AND c>=10;",
    "Hello, world!",
    "hello  world   again",
    "It's we'll they'd I'm you've He'S",
    "don’t “quote” – dash — em…",
    "CamelCaseString snake_case_string SCREAMING_CASE",
    "3.14159 1,000,000 1e-10 0xFF 2024-01-31",
    "12345678901234567890",
    "a1b22c333d4444",
    "x²+y³=½ Ⅷ ①",
    "٠١٢٣ ०१२ ๐๑",
    "  7",
    "   42 apples",
    "日本語のテキスト。",
    "你好，世界！中文123测试",
    "한국어 문장입니다",
    "Привет, мир!",
    "γειά σου Κόσμε",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "e\u0301 vs é",
    "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢",
    "🙂",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪",
    "a🙂b🙂🙂c",
    "\u200b\u200d\ufeff",
    "\u00a0non\u00a0breaking\u3000ideographic",
    "\x00\x01\x7f",
    "\ufffd",
    "\U0010ffff",
    "ﬁ ﬂ ŉ ǆ",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>",
    "text<|endoftext|>text",
    "<|im_start|><|im_start|>",
    "<|im_star",
    "< |im_start|>",
    "<repo_name>a/b<file_sep>",
    "<s></s><unk>",
    "https://example.org/path?q=1&r=%20#frag",
    "user@example.org",
    '{"key": [1, 2, {"a": null}], "b": "\\u00e9"}',
    "\\begin{equation} \\frac{a}{b} \\end{equation}",
    "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "!!!???...;;;:::",
    "a" * 300,
    " " * 100,
    "\n" * 50 + "\t" * 20,
    "The quick brown fox jumps over the lazy dog. " * 5,
]

# Texts for which transformers' conversion differs: it splits as GPT-2 does, several digits together and a space with
# them. The model was trained with every digit (of whatever script: \p{N}) on its own, as llama.cpp splits too. Mostly
# that makes no difference, since no merge of this vocabulary joins digits.
SPLIT_DIFFERENTLY_BY_TRANSFORMERS = {"x²+y³=½ Ⅷ ①", "  7", "   42 apples"}


@pytest.fixture(scope="module")
def bundled():
    return Tokenizer.from_files(resolve_model(None))


@pytest.fixture(scope="module")
def reference():
    from transformers import AutoTokenizer

    path = resolve_model(None).weight_paths[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.slow  # the reference takes its time to read the file
def test_bundled_tokenizer_equals_transformers_but_for_split_digits(bundled, reference):
    different = {text for text in ODD_STRINGS if bundled.encode(text) != reference(text)["input_ids"]}
    assert different == SPLIT_DIFFERENTLY_BY_TRANSFORMERS


@pytest.mark.slow
def test_bundled_tokenizer_decodes_as_transformers_does(bundled, reference):
    for text in ODD_STRINGS:
        token_ids = bundled.encode(text)
        for skip in (True, False):
            expected = reference.decode(token_ids, skip_special_tokens=skip)
            assert bundled.decode(token_ids, skip_special_tokens=skip) == expected
    assert [bundled.token_text(i) for i in range(0, 49152, 7)] == [reference.decode([i]) for i in range(0, 49152, 7)]


@pytest.mark.slow
def test_bundled_chat_prompt_equals_that_of_transformers(bundled, reference):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert bundled.encode_chat(messages) == expected


def test_bundled_tokenizer_knows_its_tokens(bundled):
    assert bundled.vocab_size == 49152
    assert bundled.bos_token_id == 1
    assert bundled.eos_token_ids == (2, 0)  # <|im_end|>, which the file names, and <|endoftext|>
    assert bundled.special_token_ids == frozenset(range(17))
    assert bundled.has_chat_template
    assert bundled.encode("<|im_start|>hi<|im_end|>")[::2] == [1, 2]


def test_bundled_tokenizer_gives_every_text_back(bundled):
    for text in ODD_STRINGS:
        assert bundled.decode(bundled.encode(text), skip_special_tokens=False) == text


def test_bundled_tokenizer_splits_digits_singly(bundled):
    assert [bundled.token_text(i) for i in bundled.encode("in 2024")] == ["in", " ", "2", "0", "2", "4"]


def test_bundled_tokenizer_is_built_quickly():
    files = resolve_model(None)
    start = time.thread_time()
    Tokenizer.from_files(files)
    assert time.thread_time() - start < 1.0  # 0.15 s on the machine it was written on


def write_gguf(path, **metadata):
    """A GGUF file with these `tokenizer.*` entries; dots in their names are written as double underscores."""
    writer = gguf.GGUFWriter(path, arch="llama")
    for name, value in metadata.items():
        key = "tokenizer." + name.replace("__", ".")
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def load(path):
    return Tokenizer.from_files(ModelFiles(name="m", root=path.parent, format="gguf", weight_paths=(path,)))


CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# The expressions of the original tokenizer.json files.
ORIGINAL_SPLITS = {
    "gpt-2": [],
    "smollm": [r"\p{N}"],
    "llama-bpe": [
        rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
    ],
    "qwen2": [rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"],
    "tekken": [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
    ],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}",
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一가-\ud7ff]+", r"\p{N}"],
}


def train_byte_level(splits):
    """A byte-level BPE tokenizer that has learned whatever its splits let it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), "isolated") for split in splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=len(splits) == 0 or splits == [r"\p{N}"]),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<s>", "</s>", "<|eot_id|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text for text in ODD_STRINGS if "<" not in text] * 4, trainer)
    backend.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return backend


def byte_level_metadata(backend, **changes):
    import json

    state = json.loads(backend.to_str())
    tokens = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
    kinds = {"<s>": 3, "</s>": 3, "<|eot_id|>": 3, "<tool_call>": 4}
    return {
        "ggml__model": "gpt2",
        "ggml__pre": "gpt-2",
        "ggml__tokens": tokens,
        "ggml__token_type": [kinds.get(token, 1) for token in tokens],
        "ggml__merges": [" ".join(merge) for merge in state["model"]["merges"]],
        "ggml__bos_token_id": 0,
        "ggml__eos_token_id": 1,
    } | changes


@pytest.fixture(scope="module")
def small():
    return train_byte_level([])


@pytest.mark.parametrize("pre", sorted(ORIGINAL_SPLITS))
def test_byte_level_vocabulary_splits_as_the_model_it_is_named_after(tmp_path, pre):
    original = train_byte_level(ORIGINAL_SPLITS[pre])
    metadata = byte_level_metadata(original, ggml__pre=pre, ggml__add_bos_token=False)
    tokenizer = load(write_gguf(tmp_path / "m.gguf", **metadata))
    texts = [*ODD_STRINGS, "<s>a <tool_call>{}</s>"]
    assert [tokenizer.encode(text) for text in texts] == [encoding.ids for encoding in original.encode_batch(texts)]
    assert all(tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text for text in texts)


def test_the_splits_under_test_differ_from_each_other():
    text = "It'S 12345 naïve日本語\r\n\r\n  x=AbcDEF!!\n"
    pieces = {
        pre: tuple(piece for piece, _ in train_byte_level(splits).pre_tokenizer.pre_tokenize_str(text))
        for pre, splits in ORIGINAL_SPLITS.items()
    }
    assert len(set(pieces.values())) == len(pieces)


def test_unknown_pre_tokenizer_falls_back_to_gpt2_and_says_so(tmp_path, small, caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = load(write_gguf(tmp_path / "m.gguf", **byte_level_metadata(small, ggml__pre="martian")))
    assert "martian" in caplog.text
    assert "GPT-2" in caplog.text
    assert [tokenizer.encode(text) for text in ODD_STRINGS] == [small.encode(text).ids for text in ODD_STRINGS]


def test_bos_and_eos_are_added_where_the_file_asks_for_it(tmp_path, small):
    plain = small.encode("hello").ids
    metadata = byte_level_metadata(small, ggml__add_bos_token=True, ggml__add_eos_token=True)
    tokenizer = load(write_gguf(tmp_path / "m.gguf", **metadata))
    assert tokenizer.encode("hello") == [0, *plain, 1]
    assert tokenizer.encode("hello", add_special_tokens=False) == plain
    assert load(write_gguf(tmp_path / "n.gguf", **byte_level_metadata(small))).encode("hello") == plain


def test_llama3_adds_bos_unless_told_not_to(tmp_path, small):
    metadata = byte_level_metadata(small, ggml__pre="llama-bpe")
    assert load(write_gguf(tmp_path / "m.gguf", **metadata)).encode("hello")[0] == 0
    metadata |= {"ggml__add_bos_token": False}
    assert load(write_gguf(tmp_path / "n.gguf", **metadata)).encode("hello")[0] != 0


def test_end_of_turn_tokens_end_a_sequence_even_if_the_file_names_only_eos(tmp_path, small):
    assert load(write_gguf(tmp_path / "m.gguf", **byte_level_metadata(small))).eos_token_ids == (1, 2)
    metadata = byte_level_metadata(small, ggml__eot_token_id=7, ggml__eom_token_id=8)
    assert load(write_gguf(tmp_path / "n.gguf", **metadata)).eos_token_ids == (1, 7, 8, 2)


def test_special_tokens_are_skipped_and_user_defined_ones_are_not(tmp_path, small):
    tokenizer = load(write_gguf(tmp_path / "m.gguf", **byte_level_metadata(small)))
    assert tokenizer.special_token_ids == {0, 1, 2}
    assert tokenizer.decode(tokenizer.encode("<s>a<tool_call>b</s>")) == "a<tool_call>b"


def test_chat_templates_are_read_by_name(tmp_path, small):
    metadata = byte_level_metadata(
        small,
        chat_template="{{ bos_token }}plain {{ messages[0].content }}",
        chat_template__tool_use="with {{ tools | length }} tools",
        chat_templates=["tool_use"],
    )
    tokenizer = load(write_gguf(tmp_path / "m.gguf", **metadata))
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages) == "<s>plain hi"
    assert tokenizer.apply_chat_template(messages, tools=[{"type": "function"}]) == "with 1 tools"


# A sentencepiece vocabulary by hand: pieces in the order they were learned, so with falling scores.
PIECES = [
    "▁t",
    "he",
    "▁the",
    "in",
    "▁a",
    "re",
    "ing",
    "▁▁",
    "▁▁▁▁",
    "llo",
    "▁He",
    "▁Hello",
    "or",
    "ld",
    "▁wor",
    "▁world",
]
PIECES += ["er", "th", "ere", "▁there", "ther", "▁in", "▁1", "日本", ".\u200b", "aa", "aaaa"]
LETTERS = [*"▁abcdefghiklmnoprstuvwxyzHTW0123456789.,!'日本語é\u200b"]


def sentencepiece_metadata(**changes):
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *reversed(PIECES + LETTERS),
        "<tool_call>",
    ]
    kinds = [2, 3, 3, *([6] * 256), *([1] * (len(PIECES) + len(LETTERS))), 4]
    # The ids run against the scores, so that only one of them can be what decides.
    scores = [0.0] * 259 + [-float(i) for i in reversed(range(len(PIECES) + len(LETTERS)))] + [-1000.0]
    return {
        "ggml__model": "llama",
        "ggml__tokens": tokens,
        "ggml__token_type": kinds,
        "ggml__scores": scores,
        "ggml__bos_token_id": 1,
        "ggml__eos_token_id": 2,
        "ggml__unknown_token_id": 0,
    } | changes


def encode_by_definition(text):
    """Sentencepiece's algorithm, plainly: join the neighbours whose union has the best score, leftmost first."""
    scores = {piece: -i for i, piece in enumerate(PIECES + LETTERS)}
    symbols = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        unions = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not unions:
            break
        at = -max(unions)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return [
        piece
        for symbol in symbols
        for piece in ([symbol] if symbol in scores else [f"<0x{b:02X}>" for b in symbol.encode()])
    ]


SENTENCES = [
    "",
    "Hello world",
    " Hello",
    "  the  there",
    "the\nthere",
    "in 10 languages",
    "日本語 🙂",
    "aaaaaaa",
    "a.\u200b",
]
SENTENCES += ["théré", "    indented", "trailing  ", "ingingthererehe", "ZQX"]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    return load(write_gguf(tmp_path_factory.mktemp("spm") / "m.gguf", **sentencepiece_metadata()))


@pytest.mark.parametrize("text", SENTENCES)
def test_sentencepiece_vocabulary_merges_by_score_and_falls_back_to_bytes(sentencepiece, text):
    tokens = sentencepiece_metadata()["ggml__tokens"]
    assert [tokens[i] for i in sentencepiece.encode(text)] == ["<s>", *encode_by_definition(text)]
    assert sentencepiece.decode(sentencepiece.encode(text)) == text


def test_sentencepiece_special_tokens_are_matched_whole(sentencepiece):
    tokens = sentencepiece_metadata()["ggml__tokens"]
    ids = sentencepiece.encode("the</s><tool_call>the", add_special_tokens=False)
    assert [tokens[i] for i in ids] == ["▁the", "</s>", "<tool_call>", "▁the"]
    assert sentencepiece.special_token_ids == {0, 1, 2}
    assert sentencepiece.decode(ids) == "the<tool_call> the"


def test_sentencepiece_without_space_prefix_keeps_the_start_as_it_is(tmp_path):
    metadata = sentencepiece_metadata(ggml__add_space_prefix=False, ggml__add_bos_token=False)
    tokenizer = load(write_gguf(tmp_path / "m.gguf", **metadata))
    assert [metadata["ggml__tokens"][i] for i in tokenizer.encode("the the")] == ["t", "he", "▁the"]
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ggml__model": "bert"}, UnsupportedModelError, "'bert'"),
        ({"ggml__merges": None}, CheckpointError, "no merges"),
        ({"ggml__merges": ["ab"]}, CheckpointError, "not two tokens"),
        ({"ggml__merges": ["martian token"]}, CheckpointError, "contradict"),
        ({"ggml__tokens": ["a", "a"], "ggml__token_type": [1, 1]}, CheckpointError, "occur twice"),
        ({"ggml__tokens": None}, CheckpointError, "missing or empty"),
        ({"ggml__tokens": "abc"}, CheckpointError, "not an array"),
        ({"ggml__token_type": [1]}, CheckpointError, "token types"),
        ({"ggml__model": "llama", "ggml__scores": [1.0]}, CheckpointError, "scores"),
        ({"ggml__model": "no_vocab"}, CheckpointError, "carries no tokenizer"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_refused(tmp_path, small, changes, error, message):
    metadata = byte_level_metadata(small, **changes)
    with pytest.raises(error, match=message):
        load(write_gguf(tmp_path / "m.gguf", **metadata))


def test_special_ids_outside_the_vocabulary_are_ignored(tmp_path, small):
    metadata = byte_level_metadata(small, ggml__bos_token_id=10**9, ggml__add_bos_token=True)
    tokenizer = load(write_gguf(tmp_path / "m.gguf", **metadata))
    assert tokenizer.bos_token_id is None
    assert tokenizer.encode("hello") == small.encode("hello").ids
