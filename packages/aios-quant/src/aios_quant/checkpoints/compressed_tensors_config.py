"""The `quantization_config` of a compressed-tensors checkpoint (the format of llm-compressor, vLLM and transformers).

    {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
     "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", …},
                                   "input_activations": null, …}},
     "ignore": ["lm_head"], …}

A group says how the weights of its targets are stored. What it says of the inputs is not followed: a scheme's own
rounding, per token and group of columns, is finer than any the format knows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from aios_model.errors import UnsupportedModelError
from aios_quant.checkpoints.fields import choice, group_size_field, refuse_fields

WHERE = "quantization_config (compressed-tensors)"
PACKED = "pack-quantized"
_FORMATS = (PACKED, "int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGroup:
    """How the weights of some layers are stored.

    Attributes:
        targets: Names of layers, patterns (`re:…`) or the class `Linear`.
        format: `pack-quantized` (codes in int32 words) or one with an element per weight.
        bits: 4 or 8.
        type: Integers or 8-bit floats.
        symmetric: Whether there are no zero points.
        strategy: What shares a scale.
        group_size: Columns per scale of the strategy `group`, else None.
    """

    targets: tuple[str, ...]
    format: str
    bits: int
    type: Literal["int", "float"]
    symmetric: bool
    strategy: Literal["tensor", "channel", "group"]
    group_size: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedTensorsConfig:
    """All groups, and which layers none applies to."""

    groups: tuple[WeightGroup, ...]
    ignore: tuple[str, ...]

    def group_of(self, layer: str) -> WeightGroup | None:
        """The group of a layer, by its name; the most specific target wins: name, pattern, class."""
        if any(_matches(layer, target) for target in self.ignore):
            return None
        for is_meant in (_is_named, _matches_pattern, lambda name, target: target == "Linear"):
            for group in self.groups:
                if any(is_meant(layer, target) for target in group.targets):
                    return group
        return None


def read_config(config: Mapping[str, Any]) -> CompressedTensorsConfig:
    """Checks everything that decides how weights are stored.

    Raises:
        UnsupportedModelError: Something is asked for that is not supported; names the field.
    """
    refuse_fields(config, ("kv_cache_scheme", "transform_config"), where=WHERE)
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise UnsupportedModelError(f"{WHERE}: sparsity_config is not supported; use a checkpoint that is not sparse")
    choice(config, "quantization_status", ("compressed",), default="compressed", where=WHERE)
    layout = choice(config, "format", (*_FORMATS, "mixed-precision"), default=None, where=WHERE)
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise UnsupportedModelError(f"{WHERE}: config_groups describes no layers")
    return CompressedTensorsConfig(
        groups=tuple(_read_group(name, group, layout) for name, group in groups.items()),
        ignore=_names(config.get("ignore") or [], "ignore"),
    )


def _read_group(name: str, group: Any, layout: str) -> WeightGroup:
    where = f"{WHERE}, {name}"
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise UnsupportedModelError(f"{where}: the group does not say how weights are stored")
    if layout == "mixed-precision" or group.get("format") is not None:
        layout = choice(group, "format", _FORMATS, default=None, where=where)
    weights = group["weights"]
    kind = choice(weights, "type", ("int", "float"), default="int", where=where)
    refuse_fields(weights, ("block_structure", "dynamic"), where=where)
    strategy, group_size = _strategy(weights, where)
    return WeightGroup(
        targets=_names(group.get("targets"), f"{name}.targets"),
        format=layout,
        bits=choice(weights, "num_bits", _bits(layout, kind), default=8, where=f"{where}, {layout}, type {kind}"),
        type=kind,
        symmetric=choice(weights, "symmetric", (True, False) if kind == "int" else (True,), default=True, where=where),
        strategy=strategy,
        group_size=group_size,
    )


def _bits(layout: str, kind: str) -> tuple[int, ...]:
    """The widths of codes that a format can hold; none where it does not hold numbers of that kind."""
    if layout == PACKED:
        return (4, 8) if kind == "int" else ()
    if layout == "naive-quantized":
        return (8,)
    return (8,) if layout.startswith(kind) else ()


def _strategy(weights: Mapping[str, Any], where: str) -> tuple[Literal["tensor", "channel", "group"], int | None]:
    size = weights.get("group_size")
    implied = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = choice(weights, "strategy", ("tensor", "channel", "group"), default=implied, where=where)
    if strategy != "group":
        return strategy, None
    size = group_size_field(weights, default=-1, where=where)
    return ("channel", None) if size == -1 else ("group", size)


def _names(values: Any, field: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UnsupportedModelError(f"{WHERE}: {field} must be a list of names")
    for value in values:
        if value.startswith("re:"):
            _compile(value)
    return tuple(values)


def _matches(layer: str, target: str) -> bool:
    return _is_named(layer, target) or _matches_pattern(layer, target)


def _is_named(layer: str, target: str) -> bool:
    return layer == target


def _matches_pattern(layer: str, target: str) -> bool:
    return target.startswith("re:") and _compile(target).match(layer) is not None


def _compile(target: str) -> re.Pattern[str]:
    try:
        return re.compile(target.removeprefix("re:"))
    except re.error as error:
        raise UnsupportedModelError(f"{WHERE}: {target!r} is no valid pattern: {error}") from error
