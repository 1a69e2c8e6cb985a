"""Which files of a local folder make up a model. No torch here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aios_model.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from aios_model.weights.safetensors_header import find_index, read_index

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SPLIT = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model on disk.

    Attributes:
        name: What to call it in `/v1/models`: hub id, folder name, or that of the bundled model.
        root: Folder of the checkpoint: config, tokenizer and weights, or the parent of a GGUF file.
        format: `config-only` is a folder whose weights are not wanted (dummy weights, or only the tokenizer).
        weight_paths: safetensors shards in order, or the GGUF file with all its parts.
    """

    name: str
    root: Path
    format: Literal["safetensors", "gguf", "config-only"]
    weight_paths: tuple[Path, ...]


def read_folder(
    folder: Path, *, name: str, load_format: LoadFormat = "auto", tokenizer_only: bool = False
) -> ModelFiles:
    """The model in `folder`: a Hugging Face checkpoint, or a GGUF file.

    Args:
        folder: An existing folder.
        name: What to call the model.
        load_format: `auto` prefers safetensors over GGUF where both are there; `dummy` wants no weights.
        tokenizer_only: Weights need not be there, or not completely (they may be on their way).

    Raises:
        ModelNotFoundError: no model, or several GGUF files to choose from.
        UnsupportedModelError: custom code, or weights only as pickles.
        CheckpointError: the index names a file that is missing, or the config is not JSON.
    """
    has_config = _check_config(folder, name)
    models = group_gguf(file.name for file in folder.glob("*.gguf"))
    shards = [] if load_format == "gguf" else _safetensors(folder, complete=not tokenizer_only)
    weightless = load_format == "dummy" or (tokenizer_only and load_format != "gguf" and (bool(shards) or not models))
    if has_config and weightless:
        return ModelFiles(name=name, root=folder, format="config-only", weight_paths=())
    if shards and load_format != "dummy":
        if not has_config:
            raise ModelNotFoundError(f"{folder} holds safetensors but no config.json, which says what model they are")
        return ModelFiles(name=name, root=folder, format="safetensors", weight_paths=tuple(shards))
    if models and load_format != "safetensors":
        if len(models) > 1:
            raise ModelNotFoundError(
                f"{folder} holds several models, name one of: {_list(models, prefix=f'{folder}/')}"
            )
        return read_gguf(folder / models[0][0], name=name)
    raise _nothing_found(folder, has_config=has_config, load_format=load_format)


def read_gguf(path: Path, *, name: str | None = None) -> ModelFiles:
    """The model in the GGUF file `path`, with the other parts if it is one of a split model.

    Raises:
        ModelNotFoundError: parts are missing.
    """
    split = _SPLIT.match(path.name)
    parts = [path.with_name(part) for part in split_parts(path.name)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ModelNotFoundError(f"{path} is one of {len(parts)} parts; missing in {path.parent}: {_some(missing)}")
    stem = split["stem"] if split else path.stem
    return ModelFiles(name=name or stem, root=path.parent, format="gguf", weight_paths=tuple(parts))


def split_parts(filename: str) -> list[str]:
    """All files of the GGUF model that `filename` belongs to: itself, or `…-00001-of-00003.gguf` and so on."""
    split = _SPLIT.match(filename)
    if split is None:
        return [filename]
    count = int(split["count"])
    if not 1 <= int(split["number"]) <= count:
        raise ModelNotFoundError(f"{filename} cannot be one of {count} parts")
    return [f"{split['stem']}-{number:05}-of-{split['count']}.gguf" for number in range(1, count + 1)]


def group_gguf(filenames: Iterable[str]) -> list[list[str]]:
    """GGUF files by the model they belong to, parts together. Image encoders (`mmproj…`) are no language models."""
    groups: dict[str, list[str]] = {}
    for filename in sorted(filenames):
        if filename.endswith(".gguf") and not Path(filename).name.startswith("mmproj"):
            groups.setdefault(split_parts(filename)[0], []).append(filename)
    return list(groups.values())


def refuse_remote_code(config: Mapping[str, Any], name: str) -> None:
    """Refuse a `config.json` that asks for Python code from the checkpoint to be run.

    Raises:
        UnsupportedModelError: it has an `auto_map`.
    """
    if config.get("auto_map"):
        raise UnsupportedModelError(
            f"{name} asks to run code of its own (auto_map in config.json), which AIOS never does. "
            "Use a model of a supported architecture whose checkpoint has no custom code."
        )


def refuse_pickles(filenames: Iterable[str], where: str) -> None:
    """Refuse a checkpoint whose weights are there only as pickles, which can run code when they are read.

    Raises:
        UnsupportedModelError: there are such files among `filenames`.
    """
    pickles = sorted(name for name in filenames if name.endswith(_PICKLES) and not name.startswith("training_args"))
    if pickles:
        raise UnsupportedModelError(
            f"{where} has its weights only as pickles ({_some(pickles)}), which can run any code when they are read. "
            "Choose a checkpoint with .safetensors or .gguf files, or convert it on a machine of its own: "
            "transformers' save_pretrained writes safetensors."
        )


def _check_config(folder: Path, name: str) -> bool:
    path = folder / "config.json"
    if not path.is_file():
        return False
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path} has more than {_MAX_CONFIG_BYTES} bytes: not a model config")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is a JSON {type(config).__name__}, not an object")
    refuse_remote_code(config, name)
    return True


def _safetensors(folder: Path, *, complete: bool) -> list[Path]:
    """The shards in order. `consolidated…` repeats the weights in Mistral's own naming, `adapter…` are no models."""
    index = find_index(folder)
    if index is not None:
        shards = [folder / shard for shard in sorted(set(read_index(index).values()))]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing and complete:
            raise CheckpointError(
                f"{index} names files that are missing: {_some(missing)}. Fetch the checkpoint again."
            )
        return shards
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    return [
        file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith(("consolidated", "adapter"))
    ]


def _nothing_found(folder: Path, *, has_config: bool, load_format: LoadFormat) -> Exception:
    if load_format in ("auto", "safetensors"):
        refuse_pickles((file.name for file in folder.iterdir()), str(folder))
    wanted = {"gguf": ".gguf", "safetensors": ".safetensors"}.get(load_format, ".safetensors or .gguf")
    if load_format == "dummy":
        return ModelNotFoundError(f"{folder} has no config.json; dummy weights need one to know their shapes")
    if has_config:
        return ModelNotFoundError(
            f"{folder} has a config.json but no {wanted} weights. Fetch them, or make some up: --load-format dummy"
        )
    return ModelNotFoundError(f"{folder} is no model folder: it has neither a config.json nor {wanted} weights")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _list(models: list[list[str]], *, prefix: str) -> str:
    return "".join(f"\n  {prefix}{parts[0]}" for parts in models)
