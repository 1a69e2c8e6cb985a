"""Takes one weight out of a checkpoint in the form that a scheme wants it in.

A file may hold a weight as floats, as GGUF blocks or as the codes of a published checkpoint. A scheme that keeps what
is stored gets codes unpacked, never recomputed; any other gets the weight decoded and quantises it, a few rows at a
time, so that beside the codes no more than a piece of the floats is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aios_model.errors import CheckpointError, UnsupportedModelError
from aios_model.weights.sharded import ShardedEntry
from aios_model.weights.source import PIECE_ELEMENTS, TensorEntry
from aios_quant.checkpoints.quantized_entry import QuantizedEntry
from aios_quant.kernel import Weight
from aios_quant.quantized_tensor import PackedWeight, collect_rows
from aios_quant.schemes.base import QuantScheme
from aios_quant.schemes.gguf import GGUF_ENCODINGS, unpack_gguf
from aios_quant.shards import read_rows

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """A weight as it was read.

    Attributes:
        weight: [N, K].
        column_order_K: Where the columns lie in another order than the layer's inputs, the input of each column
            (int64 [K]); else None.
    """

    weight: Weight
    column_order_K: Tensor | None = None


def read_weight(entry: TensorEntry, scheme: QuantScheme, dtype: torch.dtype) -> StoredWeight:
    """Reads a matrix and gives its file pages back.

    Args:
        entry: The matrix, [N, K], or a rank's share of one.
        scheme: What it is to become.
        dtype: What a weight that stays floating becomes; stored floats that are narrower stay as they are stored.

    Raises:
        CheckpointError: The weight holds numbers that cannot be quantised; says which tensor.
    """
    try:
        stored = _read_stored(entry, dtype) if scheme.keeps_stored else None
        read = stored or StoredWeight(weight=quantize_rows(entry, scheme.quantize, dtype))
    except CheckpointError as error:
        raise CheckpointError(f"tensor {entry.name}: {error}") from error
    finally:
        entry.release()
    return read


def quantize_rows(entry: TensorEntry, quantize: Callable[[Tensor], Weight], dtype: torch.dtype) -> Weight:
    """Decodes a matrix a few rows at a time and quantises each piece; `dtype` is for weights that stay floats."""
    if isinstance(entry, ShardedEntry) and not entry.has_all_columns:
        # The scales of a row are made of all its columns, also of those that other ranks hold.
        shard = read_rows(entry, lambda rows: quantize(entry.whole.read(rows=rows, dtype=torch.float32)))
        return entry.read(dtype=dtype) if shard is None else shard
    rows, columns = entry.shape
    step = max(1, PIECE_ELEMENTS // max(1, columns))
    first = quantize(entry.read(rows=slice(0, step), dtype=torch.float32))
    if isinstance(first, Tensor):
        return entry.read(dtype=dtype)

    def pieces() -> Iterator[PackedWeight]:
        yield first
        for start in range(step, rows, step):
            piece = quantize(entry.read(rows=slice(start, start + step), dtype=torch.float32))
            assert not isinstance(piece, Tensor), "a scheme quantises all of a matrix or nothing"
            yield piece

    return collect_rows(pieces(), rows)


def concat_weights(weights: Sequence[Weight]) -> Weight:
    """The rows of all `weights`, which have one format, as one matrix."""
    if len(weights) == 1:
        return weights[0]
    packed = [weight for weight in weights if not isinstance(weight, Tensor)]
    if packed:
        return collect_rows(packed, sum(weight.shape[0] for weight in packed))
    return torch.cat([weight for weight in weights if isinstance(weight, Tensor)])


def weight_format(weight: Weight) -> tuple[object, ...]:
    """What two weights must have in common to be stacked into one matrix."""
    return (weight.shape[1], weight.dtype) if isinstance(weight, Tensor) else weight.format


def _read_stored(entry: TensorEntry, dtype: torch.dtype) -> StoredWeight | None:
    """The weight in the file's own codes or narrower floats; None if it has to be decoded."""
    if isinstance(entry, ShardedEntry) and (shard := _read_stored_shard(entry)) is not None:
        return shard
    if isinstance(entry, QuantizedEntry):
        return StoredWeight(weight=entry.quantized(), column_order_K=entry.column_order_K)
    if entry.encoding in GGUF_ENCODINGS:
        return StoredWeight(weight=unpack_gguf(entry.encoding, entry.raw()))
    stored = _FLOATS.get(entry.encoding)
    if stored is not None and stored.itemsize < dtype.itemsize:
        return StoredWeight(weight=entry.read(dtype=stored))
    return None


def _read_stored_shard(entry: ShardedEntry) -> StoredWeight | None:
    """A rank's share of codes; None if the file holds none."""
    whole = entry.whole
    if isinstance(whole, QuantizedEntry):
        if whole.column_order_K is not None and not entry.has_all_columns:
            raise UnsupportedModelError(
                f"{entry.name}: its columns are ordered by importance (desc_act), so a rank cannot hold some of them; "
                "serve it on one device, or another quantisation of this model"
            )
        weight = read_rows(entry, lambda rows: whole.quantized(rows=rows))
        return None if weight is None else StoredWeight(weight=weight, column_order_K=whole.column_order_K)
    if whole.encoding not in GGUF_ENCODINGS:
        return None
    weight = read_rows(entry, lambda rows: unpack_gguf(whole.encoding, whole.raw(rows=rows)))
    return None if weight is None else StoredWeight(weight=weight)
