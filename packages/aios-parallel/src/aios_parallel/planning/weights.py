"""What weights take in memory, by quantisation scheme."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aios_model.config import ModelConfig
from aios_model.config_file import read_json
from aios_model.errors import ConfigError
from aios_model.weights.gguf_file import GGUFFile
from aios_model.weights.hub import ModelFiles
from aios_parallel.planning.devices import Device, RateName
from aios_parallel.planning.hardware import KVCacheDType

SCHEMES = ("none", "int8", "fp8", "int4", "as-stored")
"""What `--quantization` knows beside `auto`; `int4-g32`, `-g64` and `-g128` set the group."""

_GROUPS = (32, 64, 128)
_SCALE_BYTES_PER_ROW = 4  # float32
_SCALE_BYTES_PER_GROUP = 2  # float16


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightScheme:
    """How the matrices of the layers and the head are stored; embedding table, norms, biases and routers stay floats.

    Attributes:
        name: As `--quantization` of `aios-serve` calls it.
        bits: Per weight, without scales.
        group_size: Columns that share a scale; 0 for one scale per row; None without any.
        group_bytes: Bytes of a group's scale.
        float_bytes: Bytes of a number that is not quantised.
        table_bytes: Bytes that a number of the embedding table takes in memory; 0 on a processor, where the table stays
            in the mapped file.
        operands: What matrix products multiply.
    """

    name: str
    bits: float
    group_size: int | None = None
    group_bytes: float = _SCALE_BYTES_PER_GROUP
    float_bytes: int
    table_bytes: int
    operands: RateName = "float"

    def matrix_bytes(self, rows: int, columns: int, *, group_size: int | None = None) -> float:
        """Bytes of a matrix [rows, columns] with its scales; `group_size` where it is another than the scheme's."""
        num_bytes = rows * columns * self.bits / 8
        if self.group_size == 0:
            return num_bytes + rows * _SCALE_BYTES_PER_ROW
        if self.group_size:
            return num_bytes + rows * math.ceil(columns / (group_size or self.group_size)) * self.group_bytes
        return num_bytes

    @property
    def is_packed(self) -> bool:
        """Whether weights are in fewer bits than they are computed with."""
        return self.name != "none"


def float_bytes(config: ModelConfig, device: Device) -> int:
    """Bytes of an unquantised number as `aios-serve --dtype auto` holds it: float32 on a processor, else the file's."""
    return 4 if device.kind == "cpu" or config.torch_dtype in ("float32", "float64") else 2


def default_kv_cache_dtype(config: ModelConfig, device: Device) -> KVCacheDType:
    """What `aios-serve --kv-cache-dtype auto` keeps: BF16 on a processor, elsewhere what the model computes with."""
    return "bfloat16" if device.kind == "cpu" or float_bytes(config, device) == 2 else "float32"


def find_scheme(name: str, config: ModelConfig, device: Device, files: ModelFiles | None = None) -> WeightScheme:
    """The scheme of that name.

    Raises:
        ConfigError: There is no such scheme, the model's rows are not whole groups, or `as-stored` was asked for a
            model that is not packed.
    """
    plain = float_bytes(config, device)
    table = 0 if device.kind == "cpu" else plain
    base, _, option = name.partition("-g")
    if name == "none":
        return WeightScheme(name=name, bits=8 * plain, float_bytes=plain, table_bytes=table)
    if name == "as-stored":
        return _as_stored(config, device, files)
    if name in ("int8", "fp8"):
        return WeightScheme(name=name, bits=8, group_size=0, float_bytes=plain, table_bytes=table, operands=name)
    if base == "int4" and (not option or option in map(str, _GROUPS)):
        group, operands = _group_size(config, option), _unpacked_operands(device)
        return WeightScheme(
            name=name, bits=4, group_size=group, float_bytes=plain, table_bytes=table, operands=operands
        )
    groups = ", ".join(f"int4-g{size}" for size in _GROUPS)
    raise ConfigError(f"--quantization {name!r} is unknown; choose auto, {', '.join(SCHEMES)}, or {groups}")


def stored_scheme(config: ModelConfig, device: Device, files: ModelFiles) -> WeightScheme | None:
    """The scheme in which the checkpoint is stored, read from its header; None if it is not packed."""
    if files.format == "gguf":
        return _gguf_scheme(config, device, files)
    declared = read_json(files.root / "config.json").get("quantization_config")
    return None if declared is None else _declared_scheme(declared, config, device, files.name)


def _unpacked_operands(device: Device) -> RateName:
    """What packed weights are multiplied as: our kernels for processors make the inputs INT8 too."""
    return "int8" if device.kind == "cpu" else "float"


def _as_stored(config: ModelConfig, device: Device, files: ModelFiles | None) -> WeightScheme:
    scheme = None if files is None else stored_scheme(config, device, files)
    if scheme is None:
        raise ConfigError("--quantization as-stored is for packed checkpoints, this one is not; choose auto or none")
    return scheme


def _group_size(config: ModelConfig, option: str) -> int:
    """As aios-quant chooses it, one for all matrices: 64 columns where they divide all rows, else 32."""
    widths = [config.hidden_size, *(config.num_attention_heads * spec.head_dim for spec in config.layers)]
    if any(not spec.moe for spec in config.layers):
        widths.append(config.intermediate_size)
    if any(spec.moe for spec in config.layers):
        widths.append(config.moe_intermediate_size)
    for size in (int(option),) if option else (64, 32):
        if all(width % size == 0 for width in widths):
            return size
    odd = next(width for width in widths if width % (int(option) if option else 32))
    raise ConfigError(
        f"int4{'-g' + option if option else ''} needs rows in whole groups of {option or 32}, this model has rows of "
        f"{odd}; choose --quantization int8"
    )


def _gguf_scheme(config: ModelConfig, device: Device, files: ModelFiles) -> WeightScheme | None:
    """One scheme for all blocks: the average bits of the layers' matrices, the largest block as the group."""
    num_bytes = elements = 0
    group = 1
    for path in files.weight_paths:
        with GGUFFile(path) as part:
            for tensor in part.tensors.values():
                if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
                    num_bytes += tensor.num_bytes
                    elements += math.prod(tensor.shape)
                    group = max(group, tensor.block_elements)
    if group == 1:
        return None
    bits = 8 * num_bytes / max(elements, 1)
    operands = _unpacked_operands(device)
    return _stored(bits=bits, group_size=group, group_bytes=0, config=config, device=device, operands=operands)


def _declared_scheme(declared: Any, config: ModelConfig, device: Device, name: str) -> WeightScheme:
    method = declared.get("quant_method") if isinstance(declared, dict) else None
    bits, group = None, None
    if method in ("awq", "gptq"):
        bits, group = declared.get("bits"), declared.get("group_size")
    elif method == "fp8":
        bits, group = 8, 0
    elif method == "compressed-tensors":
        bits, group = _compressed_tensors(declared)
    if bits not in (4, 8) or not isinstance(group, int):
        raise ConfigError(
            f"{name} is quantised with {method!r} in a way that the planner cannot read; say what it takes in memory "
            "with --quantization int8 or int4-g128"
        )
    columns = group if group > 0 else 0
    operands: RateName = "fp8" if method == "fp8" else _unpacked_operands(device)
    return _stored(bits=bits, group_size=columns, group_bytes=3, config=config, device=device, operands=operands)


def _compressed_tensors(declared: Mapping[str, Any]) -> tuple[int | None, int | None]:
    groups = declared.get("config_groups")
    first = next(iter(groups.values()), {}) if isinstance(groups, dict) else {}
    weights = first.get("weights") if isinstance(first, dict) else None
    if not isinstance(weights, dict):
        return None, None
    return weights.get("num_bits"), weights.get("group_size") or 0


def _stored(
    *,
    bits: float,
    group_size: int,
    group_bytes: float,
    config: ModelConfig,
    device: Device,
    operands: RateName,
) -> WeightScheme:
    plain = float_bytes(config, device)
    return WeightScheme(
        name="as-stored",
        bits=bits,
        group_size=group_size,
        group_bytes=group_bytes,
        float_bytes=plain,
        table_bytes=0 if device.kind == "cpu" else plain,
        operands=operands,
    )
