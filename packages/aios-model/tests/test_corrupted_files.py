"""Damaged checkpoints: whatever the bytes, reading ends in tensors or in an error of ours, in bounded memory."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save

from aios_model.errors import CheckpointError, ModelError
from aios_model.weights.gguf import GGUFSource
from aios_model.weights.safetensors import SafetensorsSource
from aios_model.weights.source import WeightSource

# Headers of the samples are 1 to 2 KB; reading them whole costs some 100 KB of Python objects.
LARGEST_ALLOCATION = 16 << 20


def safetensors_sample() -> bytes:
    tensors = {
        "model.embed_tokens.weight": torch.arange(32.0).view(8, 4),
        "model.norm.weight": torch.ones(4, dtype=torch.bfloat16),
        "model.layers.0.mlp.weight": torch.arange(24).view(2, 3, 4).half(),
        "packed": torch.arange(6, dtype=torch.int32),
        "empty": torch.empty(0, 3),
    }
    return save(tensors, metadata={"format": "pt"})


def gguf_sample(folder: Path) -> bytes:
    path = folder / "sample.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_custom_alignment(32)
    writer.add_string("general.name", "sample")
    writer.add_array("tokenizer.ggml.tokens", [f"token{number}" for number in range(12)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 12)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    for name in ("Q4_0", "Q8_0", "Q4_K", "Q6_K"):
        kind = GGMLQuantizationType[name]
        writer.add_tensor(name, np.full((2, GGML_QUANT_SIZES[kind][1]), 17, dtype=np.uint8), raw_dtype=kind)
    writer.add_tensor("norm", np.ones(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def read_everything(source: WeightSource) -> None:
    """Every way of reading every tensor."""
    for entry in source.entries().values():
        assert entry.raw().dtype == torch.uint8
        try:
            values = entry.read(dtype=torch.float32)
            assert values.shape == entry.shape
            if entry.shape and entry.shape[0]:
                entry.read(rows=slice(0, 1), dtype=torch.bfloat16)
                entry.gather(torch.tensor([entry.shape[0] - 1]), dtype=torch.float32)
                entry.read(columns=slice(1, 3), dtype=torch.float32)
            if len(entry.shape) >= 2 and entry.shape[0]:
                entry.select(0).read(dtype=torch.float32)
        except ModelError:
            pass  # an encoding that does not decode
        entry.release()
    source.close()


def open_and_read(kind: Callable[..., WeightSource], path: Path) -> ModelError | None:
    """The error that a damaged file ends in, if it does; any other than ours propagates and fails the test."""
    outcome = None
    tracemalloc.start()
    try:
        read_everything(kind([path]))
    except ModelError as error:
        outcome = error
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < LARGEST_ALLOCATION
    assert outcome is None or path.name in str(outcome)
    return outcome


def damage(draw: st.DrawFn, sample: bytes) -> bytes:
    """Bytes overwritten (mostly in the header), fields set to odd values, pieces moved, the end cut off."""
    data = bytearray(sample)
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.integers(0, max(0, len(data) - 1)) | st.integers(0, min(700, len(data) - 1)))
        match draw(st.sampled_from(["byte", "bit", "number", "small", "splice", "text"])):
            case "byte":
                data[where] = draw(st.integers(0, 255))
            case "bit":
                data[where] ^= 1 << draw(st.integers(0, 7))
            case "number":
                value = draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]))
                data[where : where + 8] = struct.pack("<Q", value)
            case "small":
                data[where : where + 4] = struct.pack("<I", draw(st.integers(0, 300)))
            case "splice":
                other = draw(st.integers(0, len(data) - 1))
                data[where : where + 16] = data[other : other + 16]
            case "text":
                data[where : where + 2] = draw(st.sampled_from([b"99", b"-1", b"1e", b"[[", b"}}", b'""', b"\xff\xff"]))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) and draw(st.booleans()) else data)


@st.composite
def damaged(draw: st.DrawFn, sample: bytes) -> bytes:
    return damage(draw, sample)


FUZZ = settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def test_damaged_safetensors_files_read_or_are_refused_as_the_package_does(tmp_path):
    sample, path = safetensors_sample(), tmp_path / "damaged.safetensors"
    outcomes = {True: 0, False: 0}

    @FUZZ
    @given(damaged(sample))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        error = open_and_read(SafetensorsSource, path)
        outcomes[error is None] += 1
        try:
            theirs = load(data)
        except SafetensorError:
            assert error is not None
            return
        except (KeyError, AssertionError):
            return  # a dtype that the package accepts but has no torch dtype for
        if error is not None:
            assert "appears twice" in str(error)  # there the package takes the last one
            return
        entries = SafetensorsSource([path]).entries()
        assert set(entries) == set(theirs)
        for name, values in theirs.items():
            ours = entries[name].typed()
            assert (ours.dtype, ours.shape) == (values.dtype, values.shape)
            assert torch.equal(ours.reshape(-1).view(torch.uint8), values.reshape(-1).view(torch.uint8))

    check()
    assert min(outcomes.values()) > 10  # both kinds of outcome were tried


def test_damaged_gguf_files_read_or_are_refused(tmp_path):
    sample, path = gguf_sample(tmp_path), tmp_path / "damaged.gguf"
    outcomes = {True: 0, False: 0}

    @FUZZ
    @given(damaged(sample))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        outcomes[open_and_read(GGUFSource, path) is None] += 1

    check()
    assert min(outcomes.values()) > 10  # both kinds of outcome were tried


def every_header_byte(sample: bytes, num_bytes: int) -> Iterator[bytes]:
    for where in range(num_bytes):
        yield sample[:where] + bytes([sample[where] ^ 0xFF]) + sample[where + 1 :]


@pytest.mark.parametrize("kind", [SafetensorsSource, GGUFSource])
def test_no_single_byte_of_the_header_breaks_the_reader(kind, tmp_path):
    sample = safetensors_sample() if kind is SafetensorsSource else gguf_sample(tmp_path)
    path = tmp_path / "damaged"
    refused = 0
    for data in every_header_byte(sample, 600):
        path.write_bytes(data)
        refused += open_and_read(kind, path) is not None
    assert refused > 100


@pytest.mark.parametrize("kind", [SafetensorsSource, GGUFSource])
def test_a_file_cut_off_anywhere_is_refused(kind, tmp_path):
    sample = safetensors_sample() if kind is SafetensorsSource else gguf_sample(tmp_path)
    if kind is GGUFSource:
        sample = sample[:-12]  # the padding after the last tensor, 20 bytes long, may be missing
    path = tmp_path / "cut"
    for length in range(0, len(sample), 7):
        path.write_bytes(sample[:length])
        assert isinstance(open_and_read(kind, path), CheckpointError), length
