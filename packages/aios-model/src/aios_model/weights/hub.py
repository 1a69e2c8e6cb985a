"""From what a user typed to the files of a model: bundled, local, or on the Hugging Face hub. No torch here."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

from aios_model.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from aios_model.weights.bundled import BUNDLED_NAME, find_bundled_model
from aios_model.weights.checkpoint_files import (
    LoadFormat,
    ModelFiles,
    group_gguf,
    read_folder,
    read_gguf,
    refuse_pickles,
    refuse_remote_code,
    split_parts,
)
from aios_model.weights.hub_repository import HubRepository

__all__ = ["LoadFormat", "ModelFiles", "refuse_remote_code", "resolve_model"]

_CONFIG_AND_TOKENIZER = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
_NAME = r"[A-Za-z0-9][\w.-]*"
_REPOSITORY = re.compile(rf"^(?P<repo>({_NAME}/)?{_NAME})$")
_REPOSITORY_FILE = re.compile(rf"^(?P<repo>{_NAME}/{_NAME})[:/](?P<file>[^\\:]+\.gguf)$")


def resolve_model(
    model: str | os.PathLike[str] | None,
    *,
    revision: str | None = None,
    download_dir: str | os.PathLike[str] | None = None,
    load_format: LoadFormat = "auto",
    tokenizer_only: bool = False,
) -> ModelFiles:
    """Find a model's files, downloading them where they are on the hub only.

    Args:
        model: None or "bundled"; an existing folder or .gguf file; or a hub id: `org/name`, and `org/name:file.gguf`
            (or `org/name/file.gguf`) for one GGUF file of a repository.
        revision: Branch, tag or commit of a hub id.
        download_dir: Where downloads are kept; None for huggingface-hub's cache.
        load_format: `auto` takes safetensors before GGUF, `dummy` needs no weights, only a config.
        tokenizer_only: Don't ask for weights, unless the tokenizer is inside them (GGUF).

    Raises:
        ModelNotFoundError: nothing of that name here or on the hub, or it is not to be had; says what to do.
        UnsupportedModelError: pickled weights, custom code.
        CheckpointError: files that should be there are missing, or broken.
        ConfigError: an unknown `load_format`, or a revision of something that has none.
    """
    if load_format not in get_args(LoadFormat):
        raise ConfigError(f"load_format is {load_format!r}; it must be one of {', '.join(get_args(LoadFormat))}")
    if model is None or model == "bundled":
        _refuse_revision(revision, "the bundled model")
        return _read_file(find_bundled_model(), load_format, name=BUNDLED_NAME)
    name = os.fspath(model)
    path = _existing_path(name)
    if path is not None:
        _refuse_revision(revision, str(path))
        if path.is_file():
            return _read_file(path, load_format)
        return read_folder(path, name=path.resolve().name, load_format=load_format, tokenizer_only=tokenizer_only)
    repo_id, filename = _parse_hub_id(name)
    repository = HubRepository(repo_id, revision=revision, cache_dir=download_dir)
    if filename is not None:
        if load_format == "safetensors":
            raise ConfigError(f"load_format is 'safetensors', but {name} is a GGUF file")
        return _fetch_gguf(repository, filename)
    return _fetch_checkpoint(repository, load_format, tokenizer_only=tokenizer_only)


def _refuse_revision(revision: str | None, what: str) -> None:
    if revision is not None:
        raise ConfigError(f"revision is {revision!r}, but {what} is on this machine and has no revisions")


def _existing_path(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, an unknown ~user, a null byte
        return None


def _read_file(path: Path, load_format: LoadFormat, name: str | None = None) -> ModelFiles:
    refuse_pickles([path.name], str(path))
    if path.suffix == ".gguf":
        if load_format == "safetensors":
            raise ConfigError(f"load_format is 'safetensors', but {path} is a GGUF file")
        return read_gguf(path, name=name)
    if path.suffix == ".safetensors":
        raise UnsupportedModelError(
            f"{path} holds weights only; give its folder, {path.parent}, which has the config and the tokenizer"
        )
    raise UnsupportedModelError(f"{path} is no model: give a folder with a checkpoint, or a .gguf file")


def _parse_hub_id(name: str) -> tuple[str, str | None]:
    """Repository and file, or a ModelNotFoundError if the name can only have been meant as a path."""
    with_file = _REPOSITORY_FILE.match(name)
    if with_file is not None and ".." not in with_file["file"].split("/"):
        return with_file["repo"], with_file["file"]
    repository = _REPOSITORY.match(name)
    if repository is None or name.endswith((".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json")):
        raise ModelNotFoundError(
            f"no such file or folder: {name!r}. A model is a folder, a .gguf file, or a hub id such as "
            "'org/name' or 'org/name:file.gguf'; without one, the bundled model is used."
        )
    return repository["repo"], None


def _fetch_checkpoint(repository: HubRepository, load_format: LoadFormat, *, tokenizer_only: bool) -> ModelFiles:
    wants_weights = load_format in ("auto", "safetensors") and not tokenizer_only
    folder = repository.fetch_folder(_CONFIG_AND_TOKENIZER + (_SAFETENSORS if wants_weights else ()))
    if not _needs_gguf(folder, load_format, wants_weights=wants_weights):
        return read_folder(folder, name=repository.repo_id, load_format=load_format, tokenizer_only=tokenizer_only)
    filenames = _list_files(repository, folder)
    models = group_gguf(filenames)
    if len(models) == 1 and load_format != "safetensors":
        return replace(_fetch_gguf(repository, models[0][0]), name=repository.repo_id)
    if models and load_format != "safetensors":
        choices = "".join(f"\n  {repository.repo_id}:{parts[0]}" for parts in models)
        raise ModelNotFoundError(f"{repository.repo_id} holds several GGUF models, name one of:{choices}")
    refuse_pickles((name for name in filenames if "/" not in name), repository.repo_id)
    raise ModelNotFoundError(f"{repository.repo_id} holds no weights that can be read (.safetensors or .gguf)")


def _list_files(repository: HubRepository, folder: Path) -> list[str]:
    """The repository's files; without a connection, the GGUF files that the cache has of it."""
    try:
        return repository.list_files()
    except ModelNotFoundError:
        cached = [file.name for file in folder.glob("*.gguf")]
        if not cached:
            raise
        return cached


def _needs_gguf(folder: Path, load_format: LoadFormat, *, wants_weights: bool) -> bool:
    """Whether what was fetched is not the whole model, so that the rest can only be in a GGUF file."""
    if load_format == "gguf" or not (folder / "config.json").is_file():
        return True
    if wants_weights:
        return not any(folder.glob("*.safetensors"))
    # Config and tokenizer were wanted. A repository of GGUF files may have a config.json, but no tokenizer beside it.
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return load_format != "dummy" and not any((folder / name).is_file() for name in tokenizers)


def _fetch_gguf(repository: HubRepository, filename: str) -> ModelFiles:
    folder, _, last = filename.rpartition("/")
    parts = [repository.fetch_file(f"{folder}/{part}" if folder else part) for part in split_parts(last)]
    return read_gguf(parts[0], name=f"{repository.repo_id}:{filename}")
