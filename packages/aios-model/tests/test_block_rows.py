"""Rows decoded in C++ against those that torch decodes, bit for bit, on every instruction set of this CPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from aios_model.native import native_status
from aios_model.native.isa import available_isas
from aios_model.weights import block_rows
from aios_model.weights.block_rows import ENCODINGS, BlockRows
from aios_model.weights.gguf_blocks import UNPACKERS, dequantise
from aios_model.weights.packed_entry import Encoding, PackedEntry
from aios_model.weights.permuted import RowPermutedEntry

pytestmark = pytest.mark.skipif(not native_status().available, reason=native_status().reason)

SCALES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q6_K": (208,)}
NUM_ROWS = 37


@pytest.fixture(params=[isa.name for isa in available_isas()], autouse=True)
def isa(request, monkeypatch):
    monkeypatch.setenv("AIOS_ISA", request.param)
    block_rows._gather_rows.cache_clear()
    yield request.param
    block_rows._gather_rows.cache_clear()


def table(encoding: str, *, offset: int = 0) -> PackedEntry:
    """Random blocks with finite scales, zeros and subnormals among them, `offset` bytes into their file."""
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[encoding]]
    rng = np.random.default_rng(offset)
    blocks = rng.integers(0, 256, (NUM_ROWS * 3, size), dtype=np.uint8)
    for at in SCALES[encoding]:
        bits = rng.integers(0, 0x7C00, len(blocks)) | rng.integers(0, 2, len(blocks)) << 15
        bits[:4] = (0x0000, 0x8000, 0x0001, 0xFBFF)
        blocks[:, at : at + 2] = bits.astype(np.uint16)[:, None].view(np.uint8)
    data = torch.from_numpy(np.concatenate([np.zeros(offset, np.uint8), blocks.ravel()]))
    return PackedEntry(
        name="embedding",
        shape=(NUM_ROWS, 3 * elements),
        encoding=Encoding(
            name=encoding,
            block_elements=elements,
            block_bytes=size,
            decode=partial(dequantise, UNPACKERS[encoding]),
        ),
        packed=data[offset:],
        file=cast("Any", SimpleNamespace(path=Path("table.gguf"))),
    )


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_are_those_of_torch_to_the_last_bit(encoding, offset):
    entry = table(encoding, offset=offset)
    index = torch.cat((torch.randint(0, NUM_ROWS, (50,)), torch.tensor([0, NUM_ROWS - 1])))
    expected = entry.gather(index, dtype=torch.float32)
    assert torch.equal(BlockRows(entry).gather(index).view(torch.int32), expected.view(torch.int32))


def test_an_index_need_not_be_contiguous_and_may_be_empty():
    rows = BlockRows(table("Q8_0"))
    index = torch.arange(20)
    assert torch.equal(rows.gather(index[::3]), rows.gather(index[::3].contiguous()))
    assert rows.gather(index[:0]).shape == (0, 96)


@pytest.mark.parametrize("wrong", [-1, NUM_ROWS, 1 << 40])
def test_an_index_that_names_no_row_is_refused(wrong):
    with pytest.raises(IndexError, match=rf"embedding has rows 0 to {NUM_ROWS - 1}, and {wrong} was asked for"):
        BlockRows(table("Q8_0")).gather(torch.tensor([3, wrong]))


def test_other_encodings_and_rows_in_another_order_are_left_to_torch():
    entry = table("Q8_0")
    assert BlockRows.supports(entry)
    assert not BlockRows.supports(RowPermutedEntry(entry, torch.arange(NUM_ROWS)))
    floats = PackedEntry(
        name="embedding",
        shape=(4, 8),
        encoding=Encoding(name="F32", block_elements=1, block_bytes=4),
        packed=torch.zeros(128, dtype=torch.uint8),
        file=cast("Any", None),
    )
    assert not BlockRows.supports(floats)
