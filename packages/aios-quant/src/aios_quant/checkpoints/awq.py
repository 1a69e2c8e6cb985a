"""Checkpoints in the format of AWQ (arXiv 2306.00978), version GEMM, as AutoAWQ writes them.

A layer [N, K] is stored as

    qweight  int32 [K, N / 8]        codes packed along N
    qzeros   int32 [groups, N / 8]   zero points packed alike
    scales   float [groups, N]

    w[n, k] = scales[k // G, n] * (code - zero[k // G, n])

The eight 4-bit fields of a word, lowest bits first, belong to rows 0, 2, 4, 6, 1, 3, 5, 7 of its eight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from aios_model.errors import CheckpointError, UnsupportedModelError
from aios_model.weights.source import TensorEntry
from aios_quant.checkpoints.fields import FLOATS, check_matrix, check_tensor, choice, companion, group_size_field
from aios_quant.checkpoints.packing import codes_at
from aios_quant.checkpoints.quantized_entry import ColumnGroups, IntegerEntry, QuantizedEntry

_WHERE = "quantization_config (awq)"
_BITS = 4
_PER_WORD = 32 // _BITS
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The field of a word that holds each of its eight rows."""


def read_awq(entries: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> dict[str, QuantizedEntry]:
    """The quantised layers of a checkpoint, by the prefix of their tensors.

    Raises:
        UnsupportedModelError: The config asks for something else than is described above.
        CheckpointError: A tensor is missing or does not fit the others.
    """
    choice(config, "bits" if "bits" in config else "w_bit", (_BITS,), default=_BITS, where=_WHERE)
    layout = "version" if config.get("version") is not None else "format"
    version = config.get(layout)
    if not (version is None or (isinstance(version, str) and version.lower() == "gemm")):
        raise UnsupportedModelError(f"{_WHERE}: {layout} = {version!r} is not supported; supported: 'gemm'")
    if config.get("backend") == "llm-awq":
        raise UnsupportedModelError(f"{_WHERE}: backend = 'llm-awq' packs weights otherwise; supported is AutoAWQ's")
    choice(config, "zero_point", (True, False), default=True, where=_WHERE)
    group_size = group_size_field(config, default=128, where=_WHERE)
    prefixes = [name.removesuffix(".qweight") for name in entries if name.endswith(".qweight")]
    has_zero_points = config.get("zero_point") is not False
    return {
        prefix: AWQEntry(entries, prefix, group_size=group_size, needs_zero_points=has_zero_points)
        for prefix in prefixes
    }


class AWQEntry(IntegerEntry):
    """One layer.

    Args:
        entries: The checkpoint's tensors.
        prefix: Of this layer's.
        group_size: Columns per scale; -1 for whole rows.
        needs_zero_points: Whether the config promises zero points; without them it is 8.
    """

    def __init__(
        self, entries: Mapping[str, TensorEntry], prefix: str, *, group_size: int, needs_zero_points: bool
    ) -> None:
        beside = f"{prefix}.qweight"
        self._qweight = entries[beside]
        columns, words = check_matrix(self._qweight, encodings=("I32",))
        rows = words * _PER_WORD
        size = columns if group_size == -1 or group_size > columns else group_size
        if columns % size:
            raise CheckpointError(f"tensor {beside} has {columns} columns, not a multiple of group_size = {size}")
        self._scales = check_tensor(
            companion(entries, f"{prefix}.scales", beside=beside), shapes=[(columns // size, rows)], encodings=FLOATS
        )
        self._qzeros = entries.get(f"{prefix}.qzeros")
        if needs_zero_points:
            self._qzeros = companion(entries, f"{prefix}.qzeros", beside=beside)
        if self._qzeros is not None:
            check_tensor(self._qzeros, shapes=[(columns // size, words)], encodings=("I32",))
        super().__init__(
            f"{prefix}.weight",
            (rows, columns),
            "AWQ INT4",
            companions=[self._qweight, self._qzeros, self._scales],
            bits=_BITS,
            group_size=size,
            groups=ColumnGroups(),
        )

    @property
    def has_zero_points(self) -> bool:
        """Whether the checkpoint stores them."""
        return self._qzeros is not None

    def codes(self, index_R: Tensor) -> Tensor:
        """See `IntegerEntry.codes`."""
        return codes_at(self._qweight.typed(), _BITS, index_R, dim=1, order=_PLACES).T

    def scales(self, index_R: Tensor) -> Tensor:
        """See `IntegerEntry.scales`."""
        return self._scales.typed().index_select(1, index_R).T

    def zero_points(self, index_R: Tensor) -> Tensor:
        """See `IntegerEntry.zero_points`."""
        assert self._qzeros is not None
        return codes_at(self._qzeros.typed(), _BITS, index_R, dim=1, order=_PLACES).T
