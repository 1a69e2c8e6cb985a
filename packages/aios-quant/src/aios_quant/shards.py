"""The share of a quantised weight that one rank of a tensor-parallel group holds.

A shard has the numbers of the whole: codes are cut, never made anew. Rows can be cut anywhere. Columns are cut between
groups, or inside a group whose scale then serves both parts; where a scheme has one scale per row, it is that of the
whole row. Places that hold nothing (see `aios_model.weights.sharded`) are rows and groups with a scale of zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from aios_model.errors import UnsupportedModelError
from aios_model.weights.selection import Run, Selection
from aios_model.weights.sharded import ShardedEntry
from aios_model.weights.source import PIECE_ELEMENTS
from aios_quant.kernel import Weight
from aios_quant.quantized_tensor import (
    STEP_COLUMNS,
    CodedScales,
    Fp8Tensor,
    PackedWeight,
    QuantizedTensor,
    collect_rows,
)

SMALLEST_GROUP = 16
"""Columns of the smallest group that kernels take."""


def read_rows(entry: ShardedEntry, read: Callable[[slice], Weight]) -> PackedWeight | None:
    """The shard of a weight that is read in codes, a few rows at a time.

    Args:
        entry: The shard.
        read: Gives whole rows of the whole weight, all columns.

    Returns:
        None if `read` gives floats: a float shard needs no help.

    Raises:
        UnsupportedModelError: The columns are cut where groups cannot be; says what would do.
    """
    pieces = _pieces(entry)
    first = read(slice(0, min(1, entry.whole.shape[0])))
    if isinstance(first, Tensor):
        return None

    def shards() -> Iterator[PackedWeight]:
        for run in pieces:
            if run.start is None:
                yield _zero_rows(select_columns(first, entry.columns, entry.name), run.length)
                continue
            weight = read(slice(run.start, run.start + run.length))
            assert not isinstance(weight, Tensor), "a scheme quantises all of a matrix or nothing"
            yield select_columns(weight, entry.columns, entry.name)

    return collect_rows(shards(), entry.shape[0])


def select_columns(weight: PackedWeight, columns: Selection, name: str) -> PackedWeight:
    """The chosen columns of `weight`; `name` is for messages.

    Raises:
        UnsupportedModelError: They are cut where groups cannot be.
    """
    if columns.runs == (Run(0, weight.shape[1]),):
        return weight
    if isinstance(weight, Fp8Tensor):
        return Fp8Tensor(codes_NK=_take(weight.codes_NK, columns, fill=0), scales_N=weight.scales_N)
    codes = _take(weight.codes_NK, columns, fill=weight.zero)
    if weight.is_per_channel:
        if weight.mins_NG is not None and columns.has_zeros:
            raise UnsupportedModelError(
                f"{name} has one minimum per row, so no column of a shard can stand for nothing; "
                "choose a number of ranks that divides the attention heads"
            )
        return replace(weight, codes_NK=codes, group_size=codes.shape[1])
    return _select_groups(weight, codes, columns, name)


def _pieces(entry: ShardedEntry) -> list[Run]:
    """The shard's rows in runs that are small enough to be decoded at once."""
    step = max(1, PIECE_ELEMENTS // max(1, entry.whole.shape[1]))
    return [
        Run(None if run.start is None else run.start + at, min(step, run.length - at))
        for run in entry.rows.runs
        for at in range(0, run.length, step)
    ]


def _select_groups(weight: QuantizedTensor, codes: Tensor, columns: Selection, name: str) -> QuantizedTensor:
    # A group that is cut becomes two of the same scale: the groups of a shard are as fine as its borders.
    borders = [run.length for run in columns.runs] + [run.start for run in columns.runs if run.start is not None]
    size = math.gcd(weight.group_size, *borders)
    if size < SMALLEST_GROUP:
        raise UnsupportedModelError(
            f"{name} is quantised in groups of {weight.group_size} columns, and a shard would begin at a multiple of "
            f"{size}; use a number of ranks whose shards begin at multiples of {SMALLEST_GROUP}"
        )
    repeats = weight.group_size // size
    groups = Selection(
        tuple(Run(None if run.start is None else run.start // size, run.length // size) for run in columns.runs)
    )
    keeps_coded = weight.coded_scales is not None and repeats == 1 and math.gcd(STEP_COLUMNS, *borders) == STEP_COLUMNS

    def scales(values: Tensor | None) -> Tensor | None:
        return None if values is None else _take(values.repeat_interleave(repeats, dim=1), groups, fill=0)

    def coded(values: CodedScales | None) -> CodedScales | None:
        if values is None or not keeps_coded:
            return None
        steps = Selection(
            tuple(
                Run(None if run.start is None else run.start // STEP_COLUMNS, run.length // STEP_COLUMNS)
                for run in columns.runs
            )
        )
        return CodedScales(
            codes_NG=_take(values.codes_NG, groups, fill=0), steps_NS=_take(values.steps_NS, steps, fill=0)
        )

    scales_NG = scales(weight.scales_NG)
    assert scales_NG is not None
    return replace(
        weight,
        codes_NK=codes,
        group_size=size,
        scales_NG=scales_NG,
        mins_NG=scales(weight.mins_NG),
        coded_scales=coded(weight.coded_scales),
        coded_mins=coded(weight.coded_mins),
    )


def _take(values_NK: Tensor, columns: Selection, *, fill: int) -> Tensor:
    """Columns of a matrix, copied; places that hold nothing are `fill`."""
    out = values_NK.new_full((values_NK.shape[0], columns.size), fill)
    for place, run in columns.within(range(columns.size)):
        if run.start is not None:
            out[:, place] = values_NK[:, run.start : run.start + run.length]
    return out


def _zero_rows(like: PackedWeight, num_rows: int) -> PackedWeight:
    """Rows of zeros in the format of `like`, which has at least one row."""
    if isinstance(like, Fp8Tensor):
        codes = like.codes_NK.new_zeros(num_rows, like.shape[1])
        return Fp8Tensor(codes_NK=codes, scales_N=like.scales_N.new_zeros(num_rows))
    rows = torch.zeros(num_rows, dtype=torch.int64)

    def coded(values: CodedScales | None) -> CodedScales | None:
        if values is None:
            return None
        return CodedScales(
            codes_NG=torch.zeros_like(values.codes_NG[rows]), steps_NS=torch.zeros_like(values.steps_NS[rows])
        )

    return replace(
        like,
        codes_NK=torch.full_like(like.codes_NK[rows], like.zero),
        scales_NG=torch.zeros_like(like.scales_NG[rows]),
        mins_NG=None if like.mins_NG is None else torch.zeros_like(like.mins_NG[rows]),
        coded_scales=coded(like.coded_scales),
        coded_mins=coded(like.coded_mins),
    )
