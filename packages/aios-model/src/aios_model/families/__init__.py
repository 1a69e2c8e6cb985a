"""The model families AIOS knows: one file each, holding differences and names only.

`find_hf_family` and `find_gguf_family` pick by what the file declares. A new model is one file here, one line in
`FAMILIES`, one test and one row in the docs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aios_model.errors import UnsupportedModelError
from aios_model.families.base import Family, TensorLocation
from aios_model.families.llama import LLAMA
from aios_model.families.mistral import MISTRAL
from aios_model.families.mixtral import MIXTRAL
from aios_model.families.qwen2 import QWEN2
from aios_model.families.qwen3 import QWEN3
from aios_model.families.qwen3_moe import QWEN3_MOE

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE)

__all__ = ["FAMILIES", "Family", "TensorLocation", "family_named", "find_gguf_family", "find_hf_family"]


def find_hf_family(raw: Mapping[str, Any]) -> Family:
    """The family of a parsed `config.json`, by `architectures`, else by `model_type`."""
    declared = raw.get("architectures") or []
    for family in FAMILIES:
        if any(name in family.architectures for name in declared):
            return family
    if not declared:
        for family in FAMILIES:
            if raw.get("model_type") == family.name:
                return family
    raise UnsupportedModelError(
        f"architecture {', '.join(map(str, declared)) or raw.get('model_type')!r} is not supported; "
        f"known: {', '.join(name for family in FAMILIES for name in family.architectures)}"
    )


def find_gguf_family(metadata: Mapping[str, Any]) -> Family:
    """The family of a GGUF file. Mistral and Mixtral call themselves `llama` there; experts tell Mixtral apart."""
    declared = metadata.get("general.architecture")
    if declared == "llama" and metadata.get("llama.expert_count"):
        return MIXTRAL
    for family in FAMILIES:
        if declared == family.gguf_architecture:
            return family
    known = dict.fromkeys(family.gguf_architecture for family in FAMILIES)
    raise UnsupportedModelError(f"GGUF architecture {declared!r} is not supported; known: {', '.join(known)}")


def family_named(name: str) -> Family:
    """The family with that `model_type`."""
    return next(family for family in FAMILIES if family.name == name)
