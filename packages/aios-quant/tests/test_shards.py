"""A rank's share of a quantised weight holds the numbers of the whole."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from aios_model.errors import UnsupportedModelError
from aios_model.weights.dummy import DummyEntry
from aios_model.weights.gguf import GGUFSource
from aios_model.weights.selection import Run, Selection
from aios_model.weights.sharded import ShardedEntry
from aios_quant.quantized_tensor import QuantizedTensor
from aios_quant.reading import read_weight
from aios_quant.schemes.registry import find_scheme
from aios_quant.shards import select_columns

ROWS = Selection((Run(64, 33), Run(None, 3), Run(0, 20)))
COLUMNS = Selection((Run(256, 128), Run(None, 64), Run(0, 64)))
SCHEMES = ("int8", "int4", "int4-g32", "int4-asym", "fp8", "none")


def taken(values: torch.Tensor) -> torch.Tensor:
    rows = torch.cat([values[64:97], values.new_zeros(3, values.shape[1]), values[:20]])
    return torch.cat([rows[:, 256:384], rows.new_zeros(len(rows), 64), rows[:, :64]], dim=1)


def dense(weight) -> torch.Tensor:
    return weight if isinstance(weight, torch.Tensor) else weight.dequantize()


@pytest.mark.parametrize("name", SCHEMES)
def test_shard_of_a_weight_quantised_while_loading(name) -> None:
    scheme, entry = find_scheme(name), DummyEntry("w", (100, 512), key=17)
    whole = dense(read_weight(entry, scheme, torch.float32).weight)
    shard = ShardedEntry(entry, rows=ROWS, columns=COLUMNS)
    assert torch.equal(dense(read_weight(shard, scheme, torch.float32).weight), taken(whole))
    rows_only = ShardedEntry(entry, rows=Selection.span(10, 90))
    assert torch.equal(dense(read_weight(rows_only, scheme, torch.float32).weight), whole[10:90])


@pytest.mark.parametrize("encoding", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_shard_of_gguf_blocks(encoding, tmp_path) -> None:
    kind = gguf.GGMLQuantizationType[encoding]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng().integers(0, 256, (100, 512 // elements, size), dtype=np.uint8)
    # Exponents below 30: what is read as a float16 is then finite.
    blocks[..., 1::2] &= 0x3B
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w", blocks.reshape(100, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    entry = GGUFSource([tmp_path / "m.gguf"]).entries()["w"]
    scheme = find_scheme("as-stored")
    whole = dense(read_weight(entry, scheme, torch.float32).weight)
    shard = read_weight(ShardedEntry(entry, rows=ROWS, columns=COLUMNS), scheme, torch.float32).weight
    assert isinstance(shard, QuantizedTensor)
    assert torch.equal(shard.dequantize(), taken(whole))
    # On the borders of K encodings' blocks the coded scales stay coded.
    on_borders = ShardedEntry(entry, columns=Selection.span(256, 512))
    half = read_weight(on_borders, scheme, torch.float32).weight
    assert isinstance(half, QuantizedTensor)
    assert (half.coded_scales is not None) == encoding.endswith("_K")
    assert torch.equal(half.dequantize(), whole[:, 256:])


def test_cuts_between_groups_that_cannot_be_made_are_refused() -> None:
    weight = find_scheme("int4-g32").quantize(torch.randn(4, 128))
    with pytest.raises(UnsupportedModelError, match=r"groups of 32 columns.*multiple of 8"):
        select_columns(weight, Selection.span(8, 40), "w")
    lowest = QuantizedTensor(
        codes_NK=torch.zeros(2, 64, dtype=torch.uint8),
        bits=4,
        zero=0,
        group_size=64,
        scales_NG=torch.ones(2, 1),
        mins_NG=torch.ones(2, 1),
    )
    with pytest.raises(UnsupportedModelError, match="one minimum per row"):
        select_columns(lowest, Selection((Run(0, 32), Run(None, 32))), "w")
