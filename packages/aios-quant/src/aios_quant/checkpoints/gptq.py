"""Checkpoints in the format of GPTQ (arXiv 2210.17323), as AutoGPTQ and GPTQModel write them.

A layer [N, K] of b bits is stored as

    qweight  int32 [K * b / 32, N]   codes packed along K, lowest bits first
    qzeros   int32 [groups, N * b / 32]  zero points packed along N
    scales   float [groups, N]
    g_idx    int32 [K], optional      the group of each column

    w[n, k] = scales[g, n] * (code - zero[g, n]),  g = g_idx[k]

`checkpoint_format` "gptq" (v1) stores zero points less one. Its writers subtract 1 from every field of the packed
words, so adding it back to the words gives what they meant even where a zero point of 0 borrowed from its neighbour;
"gptq_v2" stores them as they are. With `desc_act` groups hold columns of similar importance instead of neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from aios_model.errors import CheckpointError, UnsupportedModelError
from aios_model.weights.source import TensorEntry
from aios_quant.checkpoints.fields import (
    FLOATS,
    check_matrix,
    check_tensor,
    choice,
    companion,
    group_size_field,
    refuse_fields,
)
from aios_quant.checkpoints.packing import codes_at, unpack_words
from aios_quant.checkpoints.quantized_entry import ColumnGroups, IntegerEntry, QuantizedEntry, column_groups

_WHERE = "quantization_config (gptq)"


def read_gptq(entries: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> dict[str, QuantizedEntry]:
    """The quantised layers of a checkpoint, by the prefix of their tensors.

    Raises:
        UnsupportedModelError: The config asks for something else than is described above.
        CheckpointError: A tensor is missing or does not fit the others.
    """
    bits = choice(config, "bits", (4, 8), default=None, where=_WHERE)
    group_size = group_size_field(config, default=128, where=_WHERE)
    layout = "checkpoint_format" if config.get("checkpoint_format") is not None else "format"
    version = choice(config, layout, ("gptq", "gptq_v2"), default="gptq", where=_WHERE)
    choice(config, "pack_dtype", ("int32",), default="int32", where=_WHERE)
    refuse_fields(config, ("is_marlin_format", "adapter", "rotation"), where=_WHERE)
    _refuse_overrides(config.get("dynamic"))
    prefixes = [name.removesuffix(".qweight") for name in entries if name.endswith(".qweight")]
    return {
        prefix: GPTQEntry(entries, prefix, bits=bits, group_size=group_size, is_v1=version == "gptq")
        for prefix in prefixes
    }


class GPTQEntry(IntegerEntry):
    """One layer.

    Args:
        entries: The checkpoint's tensors.
        prefix: Of this layer's.
        bits: 4 or 8.
        group_size: Columns per scale; -1 for whole rows.
        is_v1: Whether zero points are stored less one.
    """

    def __init__(
        self, entries: Mapping[str, TensorEntry], prefix: str, *, bits: int, group_size: int, is_v1: bool
    ) -> None:
        beside, per_word = f"{prefix}.qweight", 32 // bits
        self._qweight = entries[beside]
        words, rows = check_matrix(self._qweight, encodings=("I32",))
        columns = words * per_word
        size = columns if group_size == -1 or group_size > columns else group_size
        if columns % size or rows % per_word:
            raise CheckpointError(
                f"tensor {beside} holds a weight [{rows}, {columns}]; groups of {size} columns and "
                f"{per_word} zero points to a word do not divide it"
            )
        num_groups = columns // size
        self._qzeros = check_tensor(
            companion(entries, f"{prefix}.qzeros", beside=beside),
            shapes=[(num_groups, rows // per_word)],
            encodings=("I32",),
        )
        self._scales = check_tensor(
            companion(entries, f"{prefix}.scales", beside=beside), shapes=[(num_groups, rows)], encodings=FLOATS
        )
        group_index = entries.get(f"{prefix}.g_idx")
        self._is_v1 = is_v1
        super().__init__(
            f"{prefix}.weight",
            (rows, columns),
            f"GPTQ INT{bits}",
            companions=[self._qweight, self._qzeros, self._scales, group_index],
            bits=bits,
            group_size=size,
            groups=_groups(group_index, columns, size),
        )

    @property
    def has_zero_points(self) -> bool:
        """GPTQ always stores them."""
        return True

    def codes(self, index_R: Tensor) -> Tensor:
        """See `IntegerEntry.codes`."""
        words = self._qweight.typed().index_select(1, index_R)
        return unpack_words(words, self.bits, dim=0).T

    def scales(self, index_R: Tensor) -> Tensor:
        """See `IntegerEntry.scales`."""
        return self._scales.typed().index_select(1, index_R).T

    def zero_points(self, index_R: Tensor) -> Tensor:
        """See `IntegerEntry.zero_points`."""
        return codes_at(self._qzeros.typed(), self.bits, index_R, dim=1, increment=1 if self._is_v1 else 0).T


def _groups(entry: TensorEntry | None, columns: int, group_size: int) -> ColumnGroups:
    if entry is None:
        return ColumnGroups()
    check_tensor(entry, shapes=[(columns,)], encodings=("I32", "I64"))
    return column_groups(entry.typed(), group_size=group_size, name=entry.name)


def _refuse_overrides(dynamic: Any) -> None:
    """GPTQModel's `dynamic` may give layers other bits (refused), or leave some out ("-:…", which the tensors show)."""
    if not dynamic:
        return
    patterns = list(dynamic) if isinstance(dynamic, Mapping) else [dynamic]
    for pattern in patterns:
        if not (isinstance(pattern, str) and pattern.startswith("-:")):
            raise UnsupportedModelError(
                f"{_WHERE}: dynamic gives the layers {pattern!r} settings of their own, which is not supported"
            )
