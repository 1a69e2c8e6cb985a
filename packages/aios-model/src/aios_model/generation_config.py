"""Sampling defaults that a model's authors recommend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aios_model.errors import CheckpointError
from aios_model.tokenizer.from_folder import read_eos_token_ids, read_optional_json

if TYPE_CHECKING:
    from aios_model.weights.hub import ModelFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What a request gets where it says nothing; None where the authors say nothing either.

    As in vLLM the values apply whatever `do_sample` says: a request that wants greedy decoding asks for temperature 0.

    Attributes:
        eos_token_ids: Ids that end a sequence, beside the tokenizer's own.
        temperature, top_p, top_k, min_p, repetition_penalty: As in `SamplingParams`.
        max_new_tokens: Longest answer.
    """

    eos_token_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None

    @classmethod
    def from_files(cls, files: ModelFiles) -> GenerationDefaults:
        """Reads `generation_config.json` of a folder, or `general.sampling.*` of a GGUF file; either may be missing.

        Raises:
            CheckpointError: The file is damaged or a value is of the wrong type or range.
        """
        if files.format == "gguf":
            from aios_model.weights.gguf_file import GGUFFile

            with GGUFFile(files.weight_paths[0]) as file:
                return cls.from_gguf(file.metadata)
        path = files.root / "generation_config.json"
        config = read_optional_json(path)
        values = {name: _read_number(config.get(name), name, path) for name in _KINDS}
        return cls(eos_token_ids=read_eos_token_ids(config, path), **values)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> GenerationDefaults:
        """Reads the metadata of a GGUF file; its end-of-sequence ids belong to the tokenizer."""
        values = {
            name: _read_number(metadata.get(f"general.sampling.{key}"), name, Path("the GGUF metadata"))
            for key, name in _GGUF_NAMES.items()
        }
        return cls(**values)


# Type, least value, and whether the least value itself is allowed.
_KINDS: dict[str, tuple[type, float, bool]] = {
    "temperature": (float, 0, True),
    "top_p": (float, 0, False),
    "top_k": (int, -1, True),
    "min_p": (float, 0, True),
    "repetition_penalty": (float, 0, False),
    "max_new_tokens": (int, 0, False),
}

_GGUF_NAMES = {
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def _read_number(value: Any, name: str, path: Path) -> Any:
    if value is None:
        return None
    kind, least, inclusive = _KINDS[name]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and kind is int and float(value).is_integer():
        value = int(value)
    # The comparisons are false for NaN too.
    if (
        not is_number
        or (kind is int and not isinstance(value, int))
        or not (value >= least if inclusive else value > least)
    ):
        expected = f"{'an integer' if kind is int else 'a number'} {'>=' if inclusive else '>'} {least}"
        raise CheckpointError(f"{path}: {name} must be {expected}, got {value!r}")
    return kind(value)
