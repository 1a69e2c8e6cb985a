"""Safetensors checkpoints: our mapped reader against the safetensors package."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from aios_model.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from aios_model.weights.safetensors import SafetensorsSource
from aios_model.weights.safetensors_header import ELEMENT_LAYOUTS

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
STORED = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
]


def build(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file from its header (an object, or bytes to take as they are) and its data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def f32(begin: int, end: int, shape: list) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {str(dtype): torch.randn(6, 10, generator=generator).to(dtype) for dtype in FLOATS}
    values["vector"] = torch.randn(7, generator=generator)
    values["scalar"] = torch.tensor(2.5)
    values["experts"] = torch.randn(3, 4, 5, generator=generator)
    values["empty"] = torch.empty(0, 4)
    return values


def test_every_float_tensor_reads_as_it_was_saved(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    entries = SafetensorsSource([tmp_path / "model.safetensors"]).entries()
    assert set(entries) == set(tensors)
    for name, expected in tensors.items():
        assert entries[name].shape == tuple(expected.shape)
        assert torch.equal(entries[name].read(dtype=expected.dtype), expected)
        assert torch.equal(entries[name].read(dtype=torch.float32), expected.to(torch.float32))
        assert torch.equal(entries[name].typed(), expected)


def test_slices_selections_and_gathers_equal_those_of_the_whole(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    entries = SafetensorsSource([tmp_path / "model.safetensors"]).entries()
    matrix, whole = entries["torch.bfloat16"], tensors["torch.bfloat16"]
    window = matrix.read(rows=slice(2, 5), columns=slice(3, 9), dtype=torch.bfloat16)
    assert torch.equal(window, whole[2:5, 3:9])
    assert torch.equal(matrix.typed(rows=slice(2, 5)), whole[2:5])
    assert torch.equal(matrix.raw(rows=slice(2, 5)), whole[2:5].view(torch.uint8))
    assert torch.equal(matrix.gather(torch.tensor([4, 4, 0]), dtype=torch.float32), whole[[4, 4, 0]].float())
    assert torch.equal(entries["vector"].read(rows=slice(2, 4), dtype=torch.float32), tensors["vector"][2:4])
    assert torch.equal(entries["vector"].read(columns=slice(-1, None), dtype=torch.float32), tensors["vector"][-1:])
    assert torch.equal(entries["vector"].raw(rows=slice(1, 3)), tensors["vector"][1:3, None].view(torch.uint8))
    assert torch.equal(entries["vector"].gather(torch.tensor([3]), dtype=torch.float32), tensors["vector"][[3]])
    assert torch.equal(entries["experts"].select(2).read(dtype=torch.float32), tensors["experts"][2])
    assert entries["empty"].raw().shape == (0, 16)
    assert entries["empty"].gather(torch.empty(0, dtype=torch.int64), dtype=torch.float32).shape == (0, 4)
    with pytest.raises(ValueError, match="not both"):
        entries["vector"].read(rows=slice(1), columns=slice(1), dtype=torch.float32)
    with pytest.raises(ValueError, match="no leading dimension"):
        entries["vector"].select(0)


def test_a_tensor_larger_than_a_piece_reads_whole_and_in_slices(tmp_path):
    """Several pieces by lines, and a vector longer than a piece."""
    values = {"m": torch.arange(1_500_000).float().view(1500, 1000), "v": torch.arange(1_200_000).float()}
    save_file(values, tmp_path / "model.safetensors")
    entries = SafetensorsSource([tmp_path / "model.safetensors"]).entries()
    for name, whole in values.items():
        assert torch.equal(entries[name].read(dtype=torch.float64), whole.double())
    assert torch.equal(entries["m"].read(columns=slice(1, 999), dtype=torch.float32), values["m"][:, 1:999])
    assert torch.equal(entries["v"].read(rows=slice(3, 1_100_001), dtype=torch.float32), values["v"][3:1_100_001])
    index = torch.arange(0, 1500).flip(0)
    assert torch.equal(entries["m"].gather(index, dtype=torch.float32), values["m"][index])


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_integers_and_small_floats_are_typed_but_do_not_read_as_weights(tmp_path, dtype):
    values = torch.arange(12).view(3, 4).to(dtype)
    save_file({"layer.qweight": values}, tmp_path / "model.safetensors")
    entry = SafetensorsSource([tmp_path / "model.safetensors"]).entries()["layer.qweight"]
    assert torch.equal(entry.typed(rows=slice(1, 3)).view(torch.uint8), values[1:3].view(torch.uint8))
    assert entry.typed().dtype == dtype
    assert torch.equal(entry.raw(), values.view(torch.uint8))
    for read in (lambda: entry.read(dtype=torch.float32), lambda: entry.gather(torch.tensor([0]), dtype=torch.float32)):
        with pytest.raises(UnsupportedModelError, match=r"model\.safetensors: tensor 'layer\.qweight' is stored as"):
            read()


def test_a_file_with_odd_alignment_reads_the_same(tmp_path):
    """Old writers did not pad the header, so tensors may begin on any byte."""
    values = torch.arange(8.0).view(2, 4)
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "x": f32(1, 33, [2, 4])}).encode()
    for padding in range(4):
        path = build(tmp_path / f"{padding}.safetensors", header + b" " * padding, b"\x07" + values.numpy().tobytes())
        entry = SafetensorsSource([path]).entries()["x"]
        assert torch.equal(entry.read(dtype=torch.float32), values)
        assert torch.equal(entry.typed(rows=slice(1, 2)), values[1:])
        assert torch.equal(entry.read(rows=slice(1, 2), columns=slice(1, 3), dtype=torch.float32), values[1:, 1:3])
        assert torch.equal(entry.gather(torch.tensor([1]), dtype=torch.float32), values[1:])


def test_released_entries_read_again_and_raw_views_outlive_the_source(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    source = SafetensorsSource([tmp_path / "model.safetensors"])
    entry = source.entries()["torch.float32"]
    raw = entry.raw()
    entry.release()
    assert torch.equal(entry.read(dtype=torch.float32), tensors["torch.float32"])
    source.close()
    entry.release()
    del entry, source
    assert torch.equal(raw.view(torch.float32), tensors["torch.float32"])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts resident pages as Linux reports them")
def test_reading_a_slice_touches_only_its_pages(tmp_path):
    """Rows 0 to 9 of a 64 MB tensor must not bring the other 63 MB into memory."""
    save_file({"x": torch.zeros(16384, 1024)}, tmp_path / "model.safetensors")
    source = SafetensorsSource([tmp_path / "model.safetensors"])
    entry = source.entries()["x"]

    def resident_kb() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        at = next(number for number, line in enumerate(lines) if line.endswith("/model.safetensors"))
        return next(int(line.split()[1]) for line in lines[at:] if line.startswith("Rss:"))

    entry.release()
    before = resident_kb()
    entry.read(rows=slice(0, 10), dtype=torch.float32)
    # The kernel maps neighbouring cached pages along with a faulting one, 64 KB at a time by default.
    assert resident_kb() - before < 2048
    entry.read(dtype=torch.float32)
    assert resident_kb() > 60_000
    entry.release()
    assert resident_kb() < 2048


def write_shards(folder: Path, weight_map: dict[str, str] | None = None) -> list[Path]:
    paths = [folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, paths[0])
    save_file({"c": torch.ones(4)}, paths[1])
    if weight_map is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return paths


def test_shards_are_one_source_and_are_held_to_their_index(tmp_path):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    paths = write_shards(tmp_path, {"a": first, "b": first, "c": second})
    assert set(SafetensorsSource(paths).entries()) == {"a", "b", "c"}
    write_shards(tmp_path, {"a": first, "b": second, "c": second})
    with pytest.raises(CheckpointError, match=r"places tensor 'b' in model-00002-of-00002\.safetensors"):
        SafetensorsSource(paths)
    write_shards(tmp_path, {"a": first, "b": first, "c": second, "lm_head": second})
    with pytest.raises(CheckpointError, match="'lm_head'"):
        SafetensorsSource(paths)


def test_a_tensor_in_two_shards_and_a_missing_shard_are_named(tmp_path):
    paths = write_shards(tmp_path)
    save_file({"a": torch.ones(4)}, paths[1])
    with pytest.raises(CheckpointError, match=r"'a' is both in .*00001.* and in .*00002"):
        SafetensorsSource(paths)
    paths[1].unlink()
    with pytest.raises(ModelNotFoundError, match="00002"):
        SafetensorsSource(paths)


BAD = {
    "a header longer than the file": ({}, b"", 2**63, "a header of 9223372036854775808 bytes"),
    "a header that ends early": ({"x": f32(0, 4, [1])}, bytes(4), 10, "not valid JSON"),
    "a header that is a list": ([1], b"", None, "JSON list"),
    "a header nested deeply": (b"[" * 100_000, b"", None, "not valid JSON"),
    "a name twice": (b'{"x": 1, "x": 1}', b"", None, "'x' appears twice"),
    "an offset past the end": ({"x": f32(0, 8, [2])}, bytes(4), None, "claims bytes 0 to 8 of 4"),
    "an offset before the start": ({"x": f32(-4, 0, [1])}, bytes(4), None, "data_offsets"),
    "offsets the wrong way round": ({"x": f32(4, 0, [1])}, bytes(4), None, "claims bytes 4 to 0"),
    "three offsets": ({"x": {**f32(0, 4, [1]), "data_offsets": [0, 4, 4]}}, bytes(4), None, "data_offsets"),
    "an offset that is a float": ({"x": f32(0.0, 4, [1])}, bytes(4), None, "data_offsets"),
    "an offset that is a boolean": ({"x": f32(False, 4, [1])}, bytes(4), None, "data_offsets"),
    "a negative size": ({"x": f32(0, 4, [-1])}, bytes(4), None, "shape"),
    "a shape of the wrong size": ({"x": f32(0, 4, [2])}, bytes(4), None, r"4 bytes, which is not \[2\] of F32"),
    "a shape that overflows 64 bits": ({"x": f32(0, 0, [2**40, 2**40])}, b"", None, "shape"),
    "no elements in a shape that overflows": ({"x": f32(0, 0, [2**61, 2**61, 0])}, b"", None, "shape"),
    "overlapping tensors": ({"x": f32(0, 8, [2]), "y": f32(4, 12, [2])}, bytes(12), None, "'x' and 'y' overlap"),
    "a hole": ({"x": f32(0, 4, [1]), "y": f32(8, 12, [1])}, bytes(12), None, "leave a hole"),
    "bytes after the last tensor": ({"x": f32(0, 4, [1])}, bytes(12), None, "goes on for 8 bytes"),
    "a tensor without dtype": ({"x": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4), None, "not described"),
    "a tensor that is a number": ({"x": 3}, b"", None, "not described"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_headers_are_refused_with_file_and_tensor(case, tmp_path):
    header, data, length, message = BAD[case]
    path = build(tmp_path / "bad.safetensors", header, data, length=length)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsSource([path])
    assert "bad.safetensors" in str(caught.value)


def test_an_unknown_dtype_is_unsupported_and_the_known_ones_are_the_packages(tmp_path):
    path = build(tmp_path / "new.safetensors", {"x": {**f32(0, 4, [1]), "dtype": "F3"}}, bytes(4))
    with pytest.raises(UnsupportedModelError, match="'x' has dtype 'F3'"):
        SafetensorsSource([path])
    for name, (elements, num_bytes) in ELEMENT_LAYOUTS.items():
        info = {"dtype": name, "shape": [2, elements], "data_offsets": [0, 2 * num_bytes]}
        file = build(tmp_path / f"{name}.safetensors", {"x": info}, bytes(2 * num_bytes))
        assert SafetensorsSource([file]).entries()["x"].raw().shape == (2, num_bytes)
        assert _package_accepts(file), name


def test_what_the_package_refuses_is_refused(tmp_path):
    for case, (header, data, length, _) in BAD.items():
        if case != "a name twice":  # there the package takes the last one
            assert not _package_accepts(build(tmp_path / "bad.safetensors", header, data, length=length)), case


def _package_accepts(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            return True
    except (SafetensorError, OSError):
        return False
