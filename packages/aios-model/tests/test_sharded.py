"""A shard reads as the same slices of the whole tensor would, wherever it is cut."""

from __future__ import annotations

import random

import pytest
import torch

from aios_model.errors import UnsupportedModelError
from aios_model.layers.linear import Linear
from aios_model.weights.dummy import DummyEntry
from aios_model.weights.selection import Run, Selection
from aios_model.weights.sharded import LinearShard, ShardedEntry


def random_selection(size: int) -> Selection:
    runs = []
    for _ in range(random.randint(1, 4)):
        length = random.randint(1, size)
        runs.append(Run(random.choice([None, random.randint(0, size - length)]), length))
    return Selection(tuple(runs))


def taken(values: torch.Tensor, selection: Selection, dim: int) -> torch.Tensor:
    parts = []
    for run in selection.runs:
        if run.start is None:
            shape = list(values.shape)
            shape[dim] = run.length
            parts.append(values.new_zeros(shape))
        else:
            parts.append(values.narrow(dim, run.start, run.length))
    return torch.cat(parts, dim)


def entry(*shape: int) -> DummyEntry:
    return DummyEntry("w", shape, key=random.getrandbits(30))


@pytest.mark.parametrize("attempt", range(20))
def test_shard_of_a_matrix_reads_its_slices(attempt) -> None:
    whole = entry(random.randint(1, 40), random.randint(1, 700))
    rows, columns = random_selection(whole.shape[0]), random_selection(whole.shape[1])
    shard = ShardedEntry(whole, rows=rows, columns=columns)
    expected = taken(taken(whole.read(dtype=torch.float64), rows, 0), columns, 1)
    assert shard.shape == tuple(expected.shape)
    assert torch.equal(shard.read(dtype=torch.float64), expected)
    first = random.randrange(shard.shape[0])
    part = slice(random.randrange(shard.shape[1]), None)
    assert torch.equal(shard.read(rows=slice(first, None), columns=part, dtype=torch.float64), expected[first:, part])
    index = torch.randint(0, shard.shape[0], (5,))
    assert torch.equal(shard.gather(index, dtype=torch.float64), expected[index])


def test_shard_of_a_matrix_larger_than_a_piece() -> None:
    whole = entry(70, 1000)
    shard = ShardedEntry(whole, columns=Selection.span(100, 900))
    assert torch.equal(shard.read(dtype=torch.float32), whole.read(dtype=torch.float32)[:, 100:900])


def test_shard_of_a_vector_reads_its_elements() -> None:
    whole = entry(50)
    rows = Selection((Run(40, 10), Run(None, 3), Run(0, 5)))
    shard = ShardedEntry(whole, rows=rows)
    assert torch.equal(shard.read(dtype=torch.float32), taken(whole.read(dtype=torch.float32), rows, 0))


def test_shard_has_no_bytes_of_its_own() -> None:
    shard = ShardedEntry(entry(4, 4), rows=Selection.span(0, 2))
    with pytest.raises(UnsupportedModelError, match="bytes"):
        shard.raw()
    with pytest.raises(ValueError, match="cannot be cut"):
        ShardedEntry(entry(4), columns=Selection.span(0, 2))


@pytest.mark.parametrize("bias", [True, False])
def test_sharded_linear_computes_its_part(bias) -> None:
    weights, biases = {"a": entry(6, 10), "b": entry(4, 10)}, {"a": entry(6), "b": entry(4)}
    whole, part = Linear(10, {"a": 6, "b": 4}, bias=True), Linear(10, {"a": 6, "b": 4}, bias=True)
    shard = LinearShard(rows={"a": Selection((Run(2, 3), Run(None, 1)))}, columns=Selection.span(4, 10))
    part.take_shard(shard, bias=bias)
    whole.load(weights, biases, dtype=torch.float64, device=torch.device("cpu"))
    part.load(
        {name: shard.weight(name, each) for name, each in weights.items()},
        {name: shard.bias(name, each) for name, each in biases.items()},
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    assert (part.in_features, part.parts) == (6, {"a": 4, "b": 4})
    x = torch.randn(3, 10, dtype=torch.float64)
    x[:, :4] = 0
    expected = whole(x) if bias else whole(x) - torch.cat([each.read(dtype=torch.float64) for each in biases.values()])
    got = part(x[:, 4:])
    torch.testing.assert_close(got[:, [0, 1, 2, 4, 5, 6, 7]], expected[:, [2, 3, 4, 6, 7, 8, 9]])
    assert not got[:, 3].any()
