"""Builds a tokenizer from the metadata of a GGUF file.

Format: `docs/gguf.md` of ggml, keys `tokenizer.ggml.*`; where it leaves something open, as llama.cpp reads it
(`llama-vocab.cpp`). The vocabulary is one of two kinds: byte-level BPE with merges (`gpt2`), or sentencepiece BPE with
a score per token (`llama`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from aios_model.errors import CheckpointError, UnsupportedModelError
from aios_model.tokenizer.gguf_splits import ADDS_BOS, IGNORES_MERGES, build_pre_tokenizer
from aios_model.tokenizer.parts import TokenizerParts

# Values of `tokenizer.ggml.token_type`.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

_NAMED_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",  # spelled so in the format
    "pad_token": "padding",
    "mask_token": "mask",
}

# Files often name only one of the tokens that end an answer; llama.cpp finds the others by their text.
_END_TOKENS = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<｜end▁of▁sentence｜>"}
)


def has_tokenizer(metadata: Mapping[str, object]) -> bool:
    """Whether the file carries a vocabulary: some hold tensors only."""
    return metadata.get("tokenizer.ggml.model", "none") not in ("none", "no_vocab")


def read_gguf_tokenizer(metadata: Mapping[str, object]) -> TokenizerParts:
    """Reads the tokenizer, its special tokens and its chat templates from the metadata of a GGUF file.

    Raises:
        UnsupportedModelError: The vocabulary is neither byte-level nor sentencepiece BPE (BERT, T5, RWKV).
        CheckpointError: The vocabulary contradicts itself.
    """
    vocabulary = _Vocabulary(metadata)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend = _build_byte_level(vocabulary)
    elif kind == "llama":
        backend = _build_sentencepiece(vocabulary)
    else:
        raise UnsupportedModelError(
            f"the file's tokenizer is of kind {kind!r}; only 'gpt2' (byte-level BPE) and 'llama' (sentencepiece BPE) "
            "are supported. Name a model that has a tokenizer.json with --tokenizer"
        )
    _add_marked_tokens(backend, vocabulary)
    _add_post_processor(backend, vocabulary)
    named = {name: vocabulary.named_id(key) for name, key in _NAMED_TOKENS.items()}
    return TokenizerParts(
        backend=backend,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_ids=vocabulary.eos_token_ids(),
        special_tokens={name: vocabulary.tokens[token_id] for name, token_id in named.items() if token_id is not None},
        chat_templates=_read_chat_templates(metadata),
    )


class _Vocabulary:
    """Typed access to `tokenizer.ggml.*`, checked once."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        self._metadata = metadata
        self.is_sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
        # An empty token would swallow nothing for ever; llama.cpp renames it too.
        self.tokens: list[str] = [token or f"[EMPTY_{i}]" for i, token in enumerate(self.array("tokens", str))]
        self.ids = {token: token_id for token_id, token in enumerate(self.tokens)}
        self.types: list[int] = [int(kind) for kind in self.array("token_type", default=[1] * len(self.tokens))]
        if not self.tokens:
            raise CheckpointError("the file's vocabulary (tokenizer.ggml.tokens) is missing or empty")
        if len(self.ids) != len(self.tokens):
            raise CheckpointError(f"{len(self.tokens) - len(self.ids)} tokens of the file's vocabulary occur twice")
        if len(self.types) != len(self.tokens):
            raise CheckpointError(f"the file has {len(self.tokens)} tokens but {len(self.types)} token types")

    @property
    def pre(self) -> str | None:
        value = self._metadata.get("tokenizer.ggml.pre")
        return value if isinstance(value, str) else None

    @property
    def bos_token_id(self) -> int | None:
        return self.named_id("bos")

    @property
    def adds_bos(self) -> bool:
        default = self.is_sentencepiece or self.pre in ADDS_BOS
        return bool(self._metadata.get("tokenizer.ggml.add_bos_token", default))

    @property
    def adds_eos(self) -> bool:
        return bool(self._metadata.get("tokenizer.ggml.add_eos_token", False))

    @property
    def adds_space_prefix(self) -> bool:
        return bool(self._metadata.get("tokenizer.ggml.add_space_prefix", self.is_sentencepiece))

    def named_id(self, name: str) -> int | None:
        """`tokenizer.ggml.<name>_token_id`, or the default that sentencepiece files leave unsaid."""
        default = {"unknown": 0, "bos": 1, "eos": 2}.get(name) if self.is_sentencepiece else None
        value = self._metadata.get(f"tokenizer.ggml.{name}_token_id", default)
        return int(value) if isinstance(value, int) and 0 <= value < len(self.tokens) else None

    def eos_token_ids(self) -> tuple[int, ...]:
        named = [self.named_id(name) for name in ("eos", "eot", "eom")]
        by_text = [self.ids.get(token) for token in sorted(_END_TOKENS)]
        marked = [token_id for token_id in by_text if token_id is not None and self.types[token_id] == _CONTROL]
        return tuple(dict.fromkeys([token_id for token_id in named if token_id is not None] + marked))

    def array(self, name: str, kind: type = object, default: list[Any] | None = None) -> list[Any]:
        value: Any = self._metadata.get(f"tokenizer.ggml.{name}", default if default is not None else [])
        items = list(value) if hasattr(value, "__iter__") and not isinstance(value, (str, bytes)) else [None]
        if not all(isinstance(item, kind) and item is not None for item in items):
            raise CheckpointError(f"tokenizer.ggml.{name} is not an array of {kind.__name__}")
        return items


def _build_byte_level(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    merges = [_split_merge(merge) for merge in vocabulary.array("merges", str)]
    if not merges:
        raise CheckpointError("the file's byte-level vocabulary has no merges (tokenizer.ggml.merges)")
    backend = tokenizers.Tokenizer(_bpe(vocabulary.ids, merges, ignore_merges=vocabulary.pre in IGNORES_MERGES))
    backend.pre_tokenizer = build_pre_tokenizer(vocabulary.pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def _split_merge(merge: str) -> tuple[str, str]:
    # A space is written as another character in this alphabet; the one that divides is never the first.
    left, space, right = merge[1:].partition(" ")
    if not space:
        raise CheckpointError(f"tokenizer.ggml.merges: {merge!r} is not two tokens with a space between them")
    return merge[0] + left, right


def _build_sentencepiece(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    unknown = vocabulary.named_id("unknown")
    backend = tokenizers.Tokenizer(
        _bpe(
            vocabulary.ids,
            _merges_from_scores(vocabulary),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    mark_spaces = normalizers.Replace(" ", "▁")
    add_prefix = [normalizers.Prepend("▁")] if vocabulary.adds_space_prefix else []
    drop_prefix = [decoders.Strip(" ", 1, 0)] if vocabulary.adds_space_prefix else []
    backend.normalizer = normalizers.Sequence([*add_prefix, mark_spaces])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *drop_prefix]
    )
    return backend


def _merges_from_scores(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """The pairs that sentencepiece would join: best score first, then the longer parts, as transformers does."""
    scores = [float(score) for score in vocabulary.array("scores")]
    if len(scores) != len(vocabulary.tokens):
        raise CheckpointError(f"the file has {len(vocabulary.tokens)} tokens but {len(scores)} scores")
    normal = {
        token: token_id
        for token, token_id in vocabulary.ids.items()
        if vocabulary.types[token_id] not in (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)
    }
    ranked = []
    for token, token_id in normal.items():
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in normal and pair[1] in normal]
        pairs.sort(key=lambda pair: (normal[pair[0]], normal[pair[1]]))
        ranked += [(scores[token_id], len(left), len(right), left, right) for left, right in pairs]
    ranked.sort(key=lambda entry: entry[:3], reverse=True)
    return [(left, right) for *_, left, right in ranked]


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab=vocabulary, merges=merges, **options)
    except Exception as error:  # `tokenizers` raises plain Exception for a merge of tokens it does not know
        raise CheckpointError(f"the file's vocabulary and merges contradict each other: {error}") from error


def _add_marked_tokens(backend: tokenizers.Tokenizer, vocabulary: _Vocabulary) -> None:
    """Control tokens are matched whole and left out of texts; user-defined ones are matched whole and shown."""
    special_types = (_UNKNOWN, _CONTROL) if vocabulary.is_sentencepiece else (_CONTROL,)
    marked = [
        AddedToken(token, special=kind in special_types, normalized=False)
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in (*special_types, _USER_DEFINED)
    ]
    # The order of ids, not of kinds: where one is the beginning of another, the earlier would win.
    backend.add_special_tokens([token for token in marked if token.special])
    backend.add_tokens([token for token in marked if not token.special])


def _add_post_processor(backend: tokenizers.Tokenizer, vocabulary: _Vocabulary) -> None:
    bos = vocabulary.bos_token_id if vocabulary.adds_bos else None
    eos = vocabulary.named_id("eos") if vocabulary.adds_eos else None
    if bos is None and eos is None:
        return
    around = [(vocabulary.tokens[token_id], token_id) for token_id in (bos, eos) if token_id is not None]
    before = [] if bos is None else [vocabulary.tokens[bos]]
    after = [] if eos is None else [vocabulary.tokens[eos]]
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after], pair=[*before, "$A", *after, *before, "$B", *after], special_tokens=around
    )


def _read_chat_templates(metadata: Mapping[str, object]) -> dict[str, str]:
    """`tokenizer.chat_template`, and further ones as `tokenizer.chat_template.NAME`."""
    prefix = "tokenizer.chat_template"
    templates = {
        key.removeprefix(prefix).removeprefix(".") or "default": value
        for key, value in metadata.items()
        if key == prefix or key.startswith(prefix + ".")
    }
    return {name: value for name, value in templates.items() if isinstance(value, str)}
