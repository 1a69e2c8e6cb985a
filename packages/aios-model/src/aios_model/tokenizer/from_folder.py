"""Reads a tokenizer from a folder in Hugging Face's layout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from aios_model.errors import CheckpointError, UnsupportedModelError
from aios_model.tokenizer.parts import TokenizerParts
from aios_model.weights.hub import refuse_remote_code

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_folder_tokenizer(root: Path, *, name: str) -> TokenizerParts:
    """Reads `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, `config.json`,
    `generation_config.json`, `chat_template.jinja` and `additional_chat_templates/*.jinja`; all but the first may be
    missing.

    Whether BOS is added is for the post-processor in `tokenizer.json` alone, as in transformers 5. The ids that end a
    sequence are those of all files together.

    Raises:
        CheckpointError: No tokenizer, or a damaged file.
        UnsupportedModelError: The folder has a sentencepiece or tekken model only, or wants its own code run.
    """
    backend = _read_backend(root)
    config = read_optional_json(root / "tokenizer_config.json")
    refuse_remote_code(config, name)
    named = _read_named_tokens(read_optional_json(root / "special_tokens_map.json") | config)
    _add_declared_tokens(backend, config, named)
    special_tokens = {key: token.content for key, token in named.items()}
    return TokenizerParts(
        backend=backend,
        bos_token_id=_token_id(backend, special_tokens.get("bos_token")),
        eos_token_ids=_read_eos_token_ids(root, _token_id(backend, special_tokens.get("eos_token"))),
        special_tokens=special_tokens,
        chat_templates=_read_chat_templates(root, config.get("chat_template")),
    )


def read_optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty if there is no such file; CheckpointError naming the file if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_eos_token_ids(config: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    """`eos_token_id` of a configuration: absent, one id or a list."""
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) and token_id >= 0 for token_id in ids):
        raise CheckpointError(f"{path}: eos_token_id must be a token id or a list of them, got {value!r}")
    return tuple(ids)


def _read_backend(root: Path) -> tokenizers.Tokenizer:
    path = root / "tokenizer.json"
    try:
        return tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except FileNotFoundError:
        raise _explain_missing(root) from None
    except Exception as error:  # `tokenizers` raises plain Exception for whatever is wrong with the file
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from error


def _explain_missing(root: Path) -> Exception:
    others = [path for path in ("tokenizer.model", "tekken.json", "vocab.json") if (root / path).exists()]
    if not others:
        return CheckpointError(
            f"{root} has no tokenizer.json; copy it there, or name a model that has one with --tokenizer"
        )
    return UnsupportedModelError(
        f"{root} has {' and '.join(others)} but no tokenizer.json. Write one with transformers: "
        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder), "
        "or name a model that has one with --tokenizer"
    )


def _read_named_tokens(config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """`bos_token` and its kind, where the model has them: given as text or as an object with `content`."""
    tokens = {key: _read_token(config[key]) for key in _NAMED_TOKENS if config.get(key) is not None}
    return {key: token for key, token in tokens.items() if token.content}


def _read_token(spec: Any) -> AddedToken:
    if isinstance(spec, str):
        return AddedToken(spec, special=True, normalized=False)
    if isinstance(spec, dict) and isinstance(spec.get("content"), str):
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return AddedToken(spec["content"], **{flag: bool(spec[flag]) for flag in flags if flag in spec})
    raise CheckpointError(f"tokenizer_config.json: {spec!r} is not a token; expected text or an object with `content`")


def _add_declared_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, AddedToken]
) -> None:
    """Brings tokens that `tokenizer_config.json` declares, and their flags, into a `tokenizer.json` without them."""
    known = {token_id: repr(token) for token_id, token in backend.get_added_tokens_decoder().items()}
    declared = config.get("added_tokens_decoder") or {}
    try:
        by_id = {int(token_id): _read_token(spec) for token_id, spec in declared.items()}
    except (AttributeError, ValueError) as error:
        raise CheckpointError(f"tokenizer_config.json: added_tokens_decoder is malformed: {error}") from error
    for token_id, token in sorted(by_id.items(), key=lambda item: item[0]):
        if known.get(token_id) != repr(token):
            backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [*named.values(), *_read_extra_tokens(config)]
    backend.add_special_tokens([token for token in missing if token.content not in present])


def _read_extra_tokens(config: Mapping[str, Any]) -> Iterator[AddedToken]:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        specs = config.get(key) or []
        yield from map(_read_token, specs.values() if isinstance(specs, dict) else specs)


def _token_id(backend: tokenizers.Tokenizer, token: str | None) -> int | None:
    return None if token is None else backend.token_to_id(token)


def _read_eos_token_ids(root: Path, own: int | None) -> tuple[int, ...]:
    ids = [] if own is None else [own]
    for name in ("config.json", "generation_config.json"):
        ids += read_eos_token_ids(read_optional_json(root / name), root / name)
    return tuple(dict.fromkeys(ids))


def _read_chat_templates(root: Path, declared: Any) -> dict[str, str]:
    """Files win over the entry in `tokenizer_config.json`, which is a template or a list of named ones."""
    files = {path.stem: path for path in sorted((root / "additional_chat_templates").glob("*.jinja"))}
    if (root / "chat_template.jinja").exists():
        files["default"] = root / "chat_template.jinja"
    if files:
        try:
            return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{root}: a chat template cannot be read: {error}") from error
    match declared:
        case None:
            return {}
        case str():
            return {"default": declared}
        case [*entries] if all(isinstance(entry, dict) for entry in entries):
            templates = {entry.get("name"): entry.get("template") for entry in entries}
            if all(isinstance(text, str) for pair in templates.items() for text in pair):
                return templates
    raise CheckpointError(
        f"{root / 'tokenizer_config.json'}: chat_template must be text or a list of {{name, template}}, "
        f"got {type(declared).__name__}"
    )
