"""Block decoders against the gguf package's, bit for bit, on random bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from aios_model.weights.gguf_blocks import UNPACKERS, dequantise

# Byte offsets of the float16 scales in a block of each encoding.
SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def random_blocks(encoding: str, num_blocks: int, seed: int = 0) -> np.ndarray:
    """Blocks of random bytes whose scales are random finite float16, subnormals and zeros among them."""
    rng = np.random.default_rng(seed)
    _, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[encoding]]
    blocks = rng.integers(0, 256, (num_blocks, block_bytes), dtype=np.uint8)
    for offset in SCALES[encoding]:
        bits = rng.integers(0, 0x7C00, num_blocks, dtype=np.uint16) | (
            rng.integers(0, 2, num_blocks, dtype=np.uint16) << 15
        )
        bits[:4] = (0x0000, 0x8000, 0x0001, 0xFBFF)
        blocks[:, offset : offset + 2] = bits.astype(np.uint16)[:, None].view(np.uint8)
    return blocks


def bits_of(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32, copy=False).view(np.uint32)


@pytest.mark.parametrize("encoding", sorted(SCALES))
def test_random_blocks_decode_to_the_oracles_bits(encoding):
    blocks = random_blocks(encoding, 1031)
    expected = gguf.quants.dequantize(blocks, GGMLQuantizationType[encoding])
    out = torch.full(expected.shape, float("nan"))
    dequantise(UNPACKERS[encoding], torch.from_numpy(blocks), out)
    np.testing.assert_array_equal(bits_of(out.numpy()), bits_of(expected))


@pytest.mark.parametrize("encoding", sorted(SCALES))
def test_blocks_decode_into_a_window_of_a_larger_buffer(encoding):
    """A column slice: strided blocks in, strided elements out, and nothing beside them touched."""
    block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[encoding]]
    blocks = random_blocks(encoding, 12).reshape(4, 3, block_bytes)
    expected = gguf.quants.dequantize(blocks.reshape(12, -1), GGMLQuantizationType[encoding]).reshape(4, 3, -1)
    buffer = torch.full((4, 5 * block_elements), 7.0)
    window = buffer[:, block_elements : 3 * block_elements].unflatten(-1, (2, block_elements))
    dequantise(UNPACKERS[encoding], torch.from_numpy(blocks)[:, 1:], window)
    np.testing.assert_array_equal(bits_of(window.numpy()), bits_of(np.ascontiguousarray(expected[:, 1:])))
    assert (buffer[:, :block_elements] == 7).all()
    assert (buffer[:, 3 * block_elements :] == 7).all()


def test_a_q4_1_block_written_by_hand_decodes_as_the_format_says():
    block = np.zeros(20, np.uint8)
    block[0:2] = np.array([0.5], np.float16).view(np.uint8)
    block[2:4] = np.array([-3.0], np.float16).view(np.uint8)
    block[4] = 0xF1  # element 0 is code 1, element 16 is code 15
    out = torch.empty(1, 32)
    dequantise(UNPACKERS["Q4_1"], torch.from_numpy(block)[None], out)
    assert out[0, 0] == 1 * 0.5 - 3.0
    assert out[0, 16] == 15 * 0.5 - 3.0
    assert out[0, 1] == -3.0
