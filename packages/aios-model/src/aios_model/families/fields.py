"""Typed reading of the loosely typed dictionaries that checkpoints carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aios_model.config import RopeScaling
from aios_model.errors import UnsupportedModelError

_MISSING = object()


@dataclass(frozen=True, slots=True)
class ConfigFields:
    """A raw config whose fields are checked as they are read; a JSON null counts as absent.

    Attributes:
        raw: The parsed `config.json`, or GGUF metadata.
        prefix: Prepended to every name, such as `llama.` in GGUF.
    """

    raw: Mapping[str, Any]
    prefix: str = ""

    def integer(self, name: str, default: Any = _MISSING) -> int:
        """An integer field; `default` if absent, UnsupportedModelError if absent without one or of another type."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, value, "an integer")
        return value

    def number(self, name: str, default: Any = _MISSING) -> float:
        """A real field."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, value, "a number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """A true-or-false field."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None) -> str | None:
        """A string field."""
        value = self._get(name, default)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def sequence(self, name: str) -> list[Any] | None:
        """A list field; None if absent."""
        value = self._get(name, None)
        if value is not None and not isinstance(value, list):
            raise self._wrong(name, value, "a list")
        return value

    def require(self, name: str, expected: Any, *, default: Any) -> None:
        """Refuses a model whose field has any value but `expected`."""
        value = self._get(name, default)
        if value != expected:
            raise UnsupportedModelError(f"{self.prefix}{name} = {value!r} is not supported; only {expected!r} is")

    def _get(self, name: str, default: Any) -> Any:
        value = self.raw.get(self.prefix + name)
        if value is not None:
            return value
        if default is _MISSING:
            raise UnsupportedModelError(f"the model's config lacks {self.prefix + name!r}")
        return default

    def _wrong(self, name: str, value: Any, wanted: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"model config: {self.prefix}{name} must be {wanted}, got {value!r}")


def hf_rope(raw: Mapping[str, Any], default_theta: float) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling of a `config.json`, in its old (`rope_scaling`) and new (`rope_parameters`) spelling."""
    merged = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    fields = ConfigFields(merged)
    theta = fields.number("rope_theta", ConfigFields(raw).number("rope_theta", default_theta))
    ConfigFields(raw).require("partial_rotary_factor", 1.0, default=1.0)
    fields.require("partial_rotary_factor", 1.0, default=1.0)
    rope_type = fields.text("rope_type", fields.text("type", "default"))
    if "mrope_section" in merged:
        raise UnsupportedModelError("multimodal rotary embedding (mrope_section) is not supported")
    if rope_type in ("default", "none"):
        return theta, None
    original = fields.integer("original_max_position_embeddings", raw.get("max_position_embeddings"))
    if rope_type in ("linear", "dynamic"):
        return theta, RopeScaling(rope_type=rope_type, factor=fields.number("factor"))
    if rope_type == "llama3":
        return theta, RopeScaling(
            rope_type="llama3",
            factor=fields.number("factor"),
            original_max_position_embeddings=original,
            low_freq_factor=fields.number("low_freq_factor"),
            high_freq_factor=fields.number("high_freq_factor"),
        )
    if rope_type == "yarn":
        declared = fields.integer("original_max_position_embeddings", 0)
        return theta, RopeScaling(
            rope_type="yarn",
            factor=fields.number("factor", ConfigFields(raw).integer("max_position_embeddings") / max(original, 1)),
            original_max_position_embeddings=declared or original,
            beta_fast=fields.number("beta_fast", 32.0),
            beta_slow=fields.number("beta_slow", 1.0),
            attention_factor=_optional_number(fields, "attention_factor"),
            mscale=_optional_number(fields, "mscale"),
            mscale_all_dim=_optional_number(fields, "mscale_all_dim"),
            truncate=fields.boolean("truncate", True),
        )
    raise UnsupportedModelError(f"rope type {rope_type!r} is not supported; known: linear, dynamic, yarn, llama3")


def gguf_rope_scaling(fields: ConfigFields) -> RopeScaling | None:
    """Rotary scaling of a GGUF file. Llama 3's comes as a tensor (`rope_freqs.weight`) and is read with the weights."""
    rope_type = fields.text("rope.scaling.type", "none")
    if rope_type == "none":
        return None
    if rope_type == "linear":
        return RopeScaling(rope_type="linear", factor=fields.number("rope.scaling.factor"))
    if rope_type == "yarn":
        return RopeScaling(
            rope_type="yarn",
            factor=fields.number("rope.scaling.factor"),
            original_max_position_embeddings=fields.integer("rope.scaling.original_context_length"),
            beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
        )
    raise UnsupportedModelError(f"rope scaling type {rope_type!r} is not supported; known: none, linear, yarn")


def _optional_number(fields: ConfigFields, name: str) -> float | None:
    return fields.number(name) if fields.raw.get(name) is not None else None
