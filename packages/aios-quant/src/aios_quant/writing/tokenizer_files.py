"""Tokenizer and generation defaults of a converted model: copied, or written from what a GGUF file holds. No torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from aios_model.errors import AiosError
from aios_model.generation_config import GenerationDefaults
from aios_model.tokenizer.from_gguf import has_tokenizer, read_gguf_tokenizer
from aios_model.tokenizer.parts import TokenizerParts
from aios_model.weights.gguf_file import GGUFFile
from aios_model.weights.hub import ModelFiles

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def write_tokenizer(files: ModelFiles, output: Path, *, max_length: int) -> None:
    """Puts all that belongs to the text side of `files` into the folder `output`.

    Args:
        files: The original model.
        output: An existing folder.
        max_length: Longest context, which `tokenizer_config.json` repeats.

    Raises:
        ModelError: A GGUF file's tokenizer cannot be read.
    """
    if files.format == "gguf":
        with GGUFFile(files.weight_paths[0]) as file:
            metadata = file.metadata
        if has_tokenizer(metadata):
            write_tokenizer_parts(read_gguf_tokenizer(metadata), output, max_length=max_length)
        else:
            _copy(files.root, output)
        _write_generation_config(GenerationDefaults.from_gguf(metadata), token_ids(files), output)
        return
    _copy(files.root, output)


def write_tokenizer_parts(parts: TokenizerParts, output: Path, *, max_length: int) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and chat templates."""
    parts.backend.save(str(output / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        **parts.special_tokens,
    }
    write_json(output / "tokenizer_config.json", config)
    for name, source in parts.chat_templates.items():
        path = output / "chat_template.jinja"
        if name != "default":
            path = output / "additional_chat_templates" / f"{Path(name).name}.jinja"
            path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")


def token_ids(files: ModelFiles) -> dict[str, int | list[int]]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id` of a GGUF file, as `config.json` wants them."""
    with GGUFFile(files.weight_paths[0]) as file:
        metadata = file.metadata
    if not has_tokenizer(metadata):
        return {}
    parts = read_gguf_tokenizer(metadata)
    ids: dict[str, int | list[int]] = {}
    if parts.bos_token_id is not None:
        ids["bos_token_id"] = parts.bos_token_id
    if parts.eos_token_ids:
        eos = list(parts.eos_token_ids)
        ids["eos_token_id"] = eos[0] if len(eos) == 1 else eos
    padding = parts.special_tokens.get("pad_token")
    padding_id = None if padding is None else parts.backend.token_to_id(padding)
    return ids if padding_id is None else {**ids, "pad_token_id": padding_id}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object as Hugging Face lays it out; all at once, so that a reader never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def _copy(folder: Path, output: Path) -> None:
    for pattern in _COPIED:
        for path in sorted(folder.glob(pattern)):
            target = output / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            try:
                shutil.copyfile(path, target)
            except OSError as error:
                raise AiosError(f"{path} cannot be copied to {target}: {error}") from error


def _write_generation_config(defaults: GenerationDefaults, ids: dict[str, int | list[int]], output: Path) -> None:
    values = {name: getattr(defaults, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    values["repetition_penalty"] = defaults.repetition_penalty
    given = {name: value for name, value in values.items() if value is not None}
    config = {**ids, **given, **({"do_sample": True} if given else {})}
    if config:
        write_json(output / "generation_config.json", config)
