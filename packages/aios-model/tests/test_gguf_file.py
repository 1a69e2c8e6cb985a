"""GGUF files: our reader against the gguf package's writer and reader, and files written by hand."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from aios_model.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from aios_model.weights.bundled import find_bundled_model
from aios_model.weights.gguf import GGUFSource
from aios_model.weights.gguf_encodings import GGML_TYPES
from aios_model.weights.gguf_file import GGUFFile, open_gguf
from aios_model.weights.mapped_file import MappedFile
from aios_model.weights.packed_entry import Encoding, PackedEntry, map_bytes
from aios_model.weights.source import PIECE_ELEMENTS

QUANTISED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def tensor_info(name: str, sizes: list[int], ggml_type: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, ggml_type, offset)


def build(
    path: Path, *, metadata: list[bytes] = (), tensors: list[bytes] = (), data: bytes = b"", version: int = 3
) -> Path:
    """A GGUF file from its encoded parts."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata)) + b"".join([*metadata, *tensors])
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def uint32(key: str, value: int) -> bytes:
    return string(key) + struct.pack("<II", 4, value)


@pytest.fixture
def written(tmp_path) -> tuple[Path, dict[str, np.ndarray]]:
    """A file by the gguf package with every value type and encoding we read, and its tensors' values."""
    rng = np.random.default_rng(0)
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("t.u8", 200)
    writer.add_int8("t.i8", -5)
    writer.add_uint16("t.u16", 60000)
    writer.add_int16("t.i16", -30000)
    writer.add_uint32("t.u32", 4_000_000_000)
    writer.add_int32("t.i32", -2_000_000_000)
    writer.add_uint64("t.u64", 2**63 + 1)
    writer.add_int64("t.i64", -(2**62))
    writer.add_float32("t.f32", 0.25)
    writer.add_float64("t.f64", 1e300)
    writer.add_bool("t.bool", True)
    writer.add_string("t.string", "naïve 字")
    writer.add_array("t.strings", ["a", "", "ß字"])
    writer.add_array("t.ints", [1, -2, 3])
    writer.add_array("t.floats", [0.5, -1.5])
    writer.add_array("t.bools", [True, False])
    values = {}
    for name in QUANTISED:
        elements, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        packed = rng.integers(0, 0x7B, (6, 2 * num_bytes), dtype=np.uint8)  # no byte pair is an infinite float16
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=GGMLQuantizationType[name])
        values[f"{name}.weight"] = gguf.quants.dequantize(packed, GGMLQuantizationType[name])
        assert values[f"{name}.weight"].shape == (6, 2 * elements)
    values["norm.weight"] = rng.standard_normal(10).astype(np.float32)
    writer.add_tensor("norm.weight", values["norm.weight"])
    half = rng.standard_normal((3, 5)).astype(np.float16)
    writer.add_tensor("half.weight", half)
    values["half.weight"] = half.astype(np.float32)
    brain = rng.standard_normal((2, 3, 4)).astype(np.float32)
    packed = gguf.quants.quantize(brain, GGMLQuantizationType.BF16)
    writer.add_tensor("experts.weight", packed, raw_dtype=GGMLQuantizationType.BF16)
    values["experts.weight"] = gguf.quants.dequantize(packed, GGMLQuantizationType.BF16).reshape(2, 3, 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, values


def test_every_type_of_metadata_value_is_read(written):
    metadata = GGUFFile(written[0]).metadata
    assert {key: metadata[key] for key in metadata if key.startswith("t.")} == {
        "t.u8": 200,
        "t.i8": -5,
        "t.u16": 60000,
        "t.i16": -30000,
        "t.u32": 4_000_000_000,
        "t.i32": -2_000_000_000,
        "t.u64": 2**63 + 1,
        "t.i64": -(2**62),
        "t.f32": 0.25,
        "t.f64": 1e300,
        "t.bool": True,
        "t.string": "naïve 字",
        "t.strings": ["a", "", "ß字"],
        "t.ints": [1, -2, 3],
        "t.floats": [0.5, -1.5],
        "t.bools": [True, False],
    }
    assert metadata["t.bool"] is True


def test_every_encoding_reads_as_the_oracle_decodes_it(written):
    path, values = written
    entries = GGUFSource([path]).entries()
    assert set(entries) == set(values)
    for name, expected in values.items():
        assert entries[name].shape == expected.shape
        read = entries[name].read(dtype=torch.float32).numpy()
        np.testing.assert_array_equal(read.view(np.uint32), expected.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("rows", [None, slice(1, 4), slice(-2, None), slice(3, 3)])
@pytest.mark.parametrize("columns", [None, slice(0, 32), slice(32, 64), slice(5, 61), slice(31, 33), slice(7, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_slices_on_any_border_equal_the_slice_of_the_whole(written, rows, columns, dtype):
    path, values = written
    entries = GGUFSource([path]).entries()
    for name in [f"{encoding}.weight" for encoding in QUANTISED]:
        whole = torch.from_numpy(values[name]).to(dtype)
        expected = whole[rows or slice(None), columns or slice(None)]
        assert torch.equal(entries[name].read(rows=rows, columns=columns, dtype=dtype), expected)


def test_a_narrow_window_of_a_tall_tensor_is_decoded_in_bounded_pieces(tmp_path):
    """Two columns of 1,000 lines cut 1,000 blocks of 256: not to be decoded at once."""
    path = tmp_path / "blocks"
    path.write_bytes(bytes(range(256)) * 1000)
    decoded = []

    def decode(blocks: torch.Tensor, out: torch.Tensor) -> None:
        decoded.append(out.numel())
        out.copy_(blocks)

    file = MappedFile(path)
    encoding = Encoding(name="bytes", block_elements=256, block_bytes=256, decode=decode)
    entry = PackedEntry(name="x", shape=(1000, 256), encoding=encoding, packed=map_bytes(file), file=file)
    window = entry.read(columns=slice(100, 102), dtype=torch.float32)
    assert torch.equal(window, torch.tensor([100.0, 101.0]).expand(1000, 2))
    assert max(decoded) <= PIECE_ELEMENTS
    assert sum(decoded) == 256_000


def test_experts_are_selected_sliced_and_read_into_strided_buffers(written):
    path, values = written
    entry = GGUFSource([path]).entries()["experts.weight"]
    whole = torch.from_numpy(values["experts.weight"])
    assert torch.equal(entry.select(1).read(rows=slice(1, 3), dtype=torch.float32), whole[1, 1:3])
    assert torch.equal(entry.select(1).select(2).read(dtype=torch.float32), whole[1, 2])
    buffer = torch.zeros(2, 8, 4)
    entry.read_into(buffer[:, 2:5])
    assert torch.equal(buffer[:, 2:5], whole)
    assert buffer.sum() == buffer[:, 2:5].sum()
    assert torch.equal(entry.read(columns=slice(1, 3), dtype=torch.float32), whole[:, :, 1:3])


def test_gather_decodes_only_the_rows_asked_for(written):
    path, values = written
    entries = GGUFSource([path]).entries()
    index = torch.tensor([5, 0, 0, 3])
    for name in ("Q4_K.weight", "Q8_0.weight", "half.weight", "experts.weight", "norm.weight"):
        rows = index % len(values[name])
        expected = torch.from_numpy(values[name])[rows].to(torch.bfloat16)
        assert torch.equal(entries[name].gather(rows, dtype=torch.bfloat16), expected)
    with pytest.raises(IndexError):
        entries["Q8_0.weight"].gather(torch.tensor([6]), dtype=torch.float32)


def test_raw_rows_are_the_files_own_bytes(written):
    path, _ = written
    tensor = GGUFFile(path).tensors["Q4_K.weight"]
    raw = GGUFSource([path]).entries()["Q4_K.weight"].raw(rows=slice(2, 4))
    assert raw.shape == (2, 2 * 144)
    row = tensor.num_bytes // 6
    assert bytes(raw.numpy()) == path.read_bytes()[tensor.offset + 2 * row : tensor.offset + 4 * row]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_slices_and_gathers_land_on_the_gpu(written):
    path, values = written
    entries = GGUFSource([path]).entries()
    for name in ("Q4_K.weight", "Q6_K.weight", "half.weight"):
        whole = torch.from_numpy(values[name])
        buffer = torch.zeros(2, 9, dtype=torch.bfloat16, device="cuda")
        entries[name].read_into(buffer[:, 2:6], rows=slice(1, 3), columns=slice(1, 5))
        assert torch.equal(buffer[:, 2:6].cpu(), whole[1:3, 1:5].bfloat16())
        rows = entries[name].gather(torch.tensor([2, 0], device="cuda"), dtype=torch.float32)
        assert rows.device.type == "cuda"
        assert torch.equal(rows.cpu(), whole[[2, 0]])


def test_a_buffer_of_the_wrong_shape_or_dtype_is_refused(written):
    entry = GGUFSource([written[0]]).entries()["Q4_0.weight"]
    with pytest.raises(ValueError, match=r"\[6, 63\]"):
        entry.read_into(torch.empty(6, 63))
    with pytest.raises(ValueError, match="int64"):
        entry.read_into(torch.empty(6, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match="step 2"):
        entry.read(rows=slice(None, None, 2), dtype=torch.float32)


def test_an_entry_reads_again_after_release_and_views_outlive_close(written):
    path, _ = written
    source = GGUFSource([path])
    entry = source.entries()["Q6_K.weight"]
    first = entry.read(dtype=torch.float32)
    entry.release()
    assert torch.equal(entry.read(dtype=torch.float32), first)
    raw = entry.raw()
    del entry
    source.close()
    assert not source.entries()
    assert raw.shape == (6, 420)
    assert int(raw.sum()) > 0


def test_an_encoding_we_cannot_decode_is_listed_and_refused_by_name_when_read(tmp_path):
    path = build(tmp_path / "x.gguf", tensors=[tensor_info("blk.0.x", [256], 16)], data=bytes(66))
    entry = GGUFSource([path]).entries()["blk.0.x"]
    assert (entry.encoding, entry.shape) == ("IQ2_XXS", (256,))
    assert entry.raw().shape == (1, 66)
    with pytest.raises(
        UnsupportedModelError, match=r"x\.gguf: tensor 'blk\.0\.x' is stored as IQ2_XXS.*Q4_K, Q5_K, Q6_K"
    ):
        entry.read(dtype=torch.float32)


def test_block_sizes_agree_with_the_oracle():
    ours = {layout.name: (layout.block_elements, layout.block_bytes) for layout in GGML_TYPES.values()}
    assert {name: number for number, name in ((n, layout.name) for n, layout in GGML_TYPES.items())} == {
        kind.name: kind.value for kind in GGML_QUANT_SIZES
    }
    assert ours == {kind.name: sizes for kind, sizes in GGML_QUANT_SIZES.items()}


def test_nested_arrays_are_read_and_deep_ones_refused(tmp_path):
    def nested(depth: int) -> bytes:
        return (
            string("n") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * (depth - 1) + struct.pack("<IQI", 4, 1, 7)
        )

    assert GGUFFile(build(tmp_path / "a.gguf", metadata=[nested(3)])).metadata == {"n": [[[7]]]}
    with pytest.raises(CheckpointError, match="nests arrays"):
        GGUFFile(build(tmp_path / "b.gguf", metadata=[nested(50)]))


def test_version_2_is_read_and_other_versions_and_byte_orders_are_refused(tmp_path):
    assert GGUFFile(build(tmp_path / "a.gguf", version=2)).version == 2
    with pytest.raises(UnsupportedModelError, match="version 1"):
        GGUFFile(build(tmp_path / "b.gguf", version=1))
    with pytest.raises(UnsupportedModelError, match="big-endian"):
        GGUFFile(build(tmp_path / "c.gguf", version=0x03000000))
    (tmp_path / "d.gguf").write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        GGUFFile(tmp_path / "d.gguf")


def test_the_alignment_of_the_file_is_honoured(tmp_path):
    value = struct.pack("<f", 2.5)
    head = build(tmp_path / "a.gguf", metadata=[uint32("general.alignment", 256)], tensors=[tensor_info("x", [1])])
    size = 24 + len(uint32("general.alignment", 256)) + len(tensor_info("x", [1]))
    head.write_bytes(head.read_bytes()[:size] + bytes(-size % 256) + value)
    assert GGUFSource([head]).entries()["x"].read(dtype=torch.float32).tolist() == [2.5]


BAD = {
    "offset past the end": ([tensor_info("x", [64], 0, 32)], 256, "cut off"),
    "unaligned offset": ([tensor_info("x", [4], 0, 3)], 64, "alignment"),
    "overlap": ([tensor_info("x", [16], 0, 0), tensor_info("y", [16], 0, 32)], 128, "overlap"),
    "half a block": ([tensor_info("x", [48], 2)], 64, "multiple"),
    "five dimensions": ([tensor_info("x", [1] * 5)], 64, "5 dimensions"),
    "a billion dimensions": ([string("x") + struct.pack("<I", 10**9)], 64, "dimensions"),
    "dimensions that overflow 64 bits": ([tensor_info("x", [2**40, 2**40])], 64, "cut off"),
    "no elements": ([tensor_info("x", [2**62, 0])], 64, "size 0"),
    "an unknown type": ([tensor_info("x", [4], 77)], 64, "unknown type 77"),
    "a name twice": ([tensor_info("x", [1]), tensor_info("x", [1], 0, 32)], 64, "second time"),
    "a name that is not UTF-8": ([string(b"\xff\xfe") + struct.pack("<IIQ", 0, 0, 0)], 64, "UTF-8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors_are_refused_with_file_and_field(case, tmp_path):
    tensors, num_bytes, message = BAD[case]
    path = build(tmp_path / "bad.gguf", tensors=tensors, data=bytes(num_bytes))
    with pytest.raises(CheckpointError, match=message) as caught:
        GGUFFile(path)
    assert "bad.gguf" in str(caught.value)


BAD_METADATA = {
    "a huge string": (string("k") + struct.pack("<IQ", 8, 2**60), "needs 1152921504606846976 bytes"),
    "a huge array of strings": (string("k") + struct.pack("<IIQ", 9, 8, 2**50), "announces"),
    "more strings than fit": (string("k") + struct.pack("<IIQ", 9, 8, 1000), "more than the file can hold"),
    "a huge array of bytes": (string("k") + struct.pack("<IIQ", 9, 0, 2**40), "announces"),
    "more numbers than fit": (string("k") + struct.pack("<IIQ", 9, 10, 10_000), "needs 80000 bytes"),
    "a type that does not exist": (string("k") + struct.pack("<I", 13), "type 13"),
    "an array of a type that does not exist": (string("k") + struct.pack("<IIQ", 9, 99, 1) + bytes(32), "type 99"),
    "a string that is not UTF-8": (string("k") + struct.pack("<I", 8) + string(b"\xff"), "UTF-8"),
    "a token that is not UTF-8": (string("k") + struct.pack("<IIQ", 9, 8, 1) + string(b"\xff"), "element 0 of 'k'"),
    "a key twice": (uint32("k", 1), "second time"),
    "an alignment of 3": (uint32("general.alignment", 3), "alignment is 3"),
    "an alignment of 0": (uint32("general.alignment", 0), "alignment is 0"),
    "an alignment that is a string": (
        string("general.alignment") + struct.pack("<I", 8) + string("x"),
        "alignment is 'x'",
    ),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_bad_metadata_is_refused_with_file_and_field(case, tmp_path):
    field, message = BAD_METADATA[case]
    path = build(tmp_path / "bad.gguf", metadata=[uint32("k", 1), field] if case == "a key twice" else [field])
    with pytest.raises(CheckpointError, match=message) as caught:
        GGUFFile(path)
    assert "bad.gguf" in str(caught.value)


def test_counts_larger_than_the_file_are_refused_at_once(tmp_path):
    for counts in [(2**63, 0), (0, 2**63), (10**6, 0)]:
        path = tmp_path / "bad.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(100))
        with pytest.raises(CheckpointError, match="more than the file can hold"):
            GGUFFile(path)


def test_missing_empty_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no such file.*absent\.gguf"):
        GGUFFile(tmp_path / "absent.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(CheckpointError, match=r"empty\.gguf is empty"):
        GGUFFile(tmp_path / "empty.gguf")
    with pytest.raises(CheckpointError, match="cannot be mapped"):
        GGUFFile(tmp_path)


def split_part(path: Path, number: int, count: int, tensor: str) -> Path:
    fields = [
        string(key) + struct.pack("<IH", 2, value) for key, value in (("split.no", number), ("split.count", count))
    ]
    return build(path, metadata=fields, tensors=[tensor_info(tensor, [1])], data=struct.pack("<f", number))


def test_a_split_model_is_one_source_and_its_parts_must_match(tmp_path):
    parts = [split_part(tmp_path / f"m-0000{number + 1}-of-00002.gguf", number, 2, f"t{number}") for number in range(2)]
    entries = GGUFSource(parts).entries()
    assert [entries[f"t{number}"].read(dtype=torch.float32).item() for number in range(2)] == [0, 1]
    with pytest.raises(CheckpointError, match="part 1 of 2"):
        open_gguf(parts[::-1])
    with pytest.raises(CheckpointError, match="part 0 of 2"):
        open_gguf(parts[:1])
    double = split_part(tmp_path / "double.gguf", 1, 2, "t0")
    with pytest.raises(CheckpointError, match="'t0' is both in"):
        open_gguf([parts[0], double])


def test_the_bundled_file_is_read_as_the_oracle_reads_it_and_fast():
    path = find_bundled_model()
    start = time.process_time()
    ours = GGUFFile(path)
    elapsed = time.process_time() - start
    theirs = gguf.GGUFReader(path)
    assert elapsed < 0.5  # 0.05 s; the gguf package takes 3.7 s
    keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert list(ours.metadata) == keys
    for key in keys:
        if key not in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):  # slow in the oracle; compared below
            assert ours.metadata[key] == theirs.fields[key].contents()
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        for index in (0, 1, 17, -1):
            assert ours.metadata[key][index] == theirs.fields[key].contents(index)
        assert len(ours.metadata[key]) == len(theirs.fields[key].data)
    assert {t.name: (tuple(reversed(t.shape.tolist())), t.data_offset, t.n_bytes) for t in theirs.tensors} == {
        t.name: (t.shape, t.offset, t.num_bytes) for t in ours.tensors.values()
    }
    entries = GGUFSource([path]).entries()
    for tensor in theirs.tensors[:12]:
        expected = gguf.quants.dequantize(tensor.data[:64], tensor.tensor_type)
        read = entries[tensor.name].read(rows=slice(64), dtype=torch.float32)
        np.testing.assert_array_equal(read.numpy(), expected)


def test_reading_a_header_imports_no_torch():
    code = "import sys; import aios_model.weights.gguf_file, aios_model.weights.hub; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
