"""Writes a GGUF file of a Llama of some size with random weights, to measure sizes that nobody has to download.

Runs in the environment of llama.cpp, where `gguf` is. The tokenizer is taken from another GGUF file.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

# Of Llama 3.2, but for the vocabulary. hidden, layers, heads, KV heads, feed-forward; head size is hidden / heads.
SHAPES = {"1b": (2048, 16, 32, 8, 8192), "3b": (3072, 28, 24, 8, 8192)}
CONTEXT = 8192
SEED = 0
DEVIATION = 0.02


def main(source: str, target: str, shape: str, _threads: str) -> None:
    """Write F16.

    Args:
        source: The GGUF file whose tokenizer to take.
        target: The file to write; a file under this name is always whole.
        shape: A name in `SHAPES`.
        _threads: Drawing random numbers takes one.
    """
    gguf, numpy = import_module("gguf"), import_module("numpy")
    partial = f"{target}.partial"
    writer = gguf.GGUFWriter(partial, "llama")
    num_tokens = _copy_tokenizer(gguf, gguf.GGUFReader(source), writer)
    _write_config(gguf, writer, shape)
    tensors = list(_tensors(shape, num_tokens))
    for name, dims in tensors:
        dtype = numpy.dtype(numpy.float32 if len(dims) == 1 else numpy.float16)
        num_bytes = dtype.itemsize * int(numpy.prod(dims))
        writer.add_tensor_info(name, dims, dtype, num_bytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    draw = numpy.random.default_rng(SEED)
    for _, dims in tensors:  # one in memory at a time
        if len(dims) == 1:
            writer.write_tensor_data(numpy.ones(dims, dtype=numpy.float32))
        else:
            values = draw.standard_normal(dims, dtype=numpy.float32) * numpy.float32(DEVIATION)
            writer.write_tensor_data(values.astype(numpy.float16))
    writer.close()
    Path(partial).rename(target)


def _copy_tokenizer(gguf: Any, reader: Any, writer: Any) -> int:
    """All metadata of the tokenizer; returns its number of tokens."""
    for key, field in reader.fields.items():
        if not key.startswith("tokenizer."):
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_key_value(key, field.contents(), gguf.GGUFValueType.ARRAY, sub_type=field.types[-1])
        else:
            writer.add_key_value(key, field.contents(), field.types[0])
    return len(reader.fields["tokenizer.ggml.tokens"].data)


def _write_config(gguf: Any, writer: Any, shape: str) -> None:
    hidden, layers, heads, kv_heads, feed_forward = SHAPES[shape]
    writer.add_name(f"random {shape}")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)


def _tensors(shape: str, num_tokens: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, outermost dimension first."""
    hidden, layers, heads, kv_heads, feed_forward = SHAPES[shape]
    keys = hidden // heads * kv_heads
    yield "token_embd.weight", (num_tokens, hidden)
    yield "output_norm.weight", (hidden,)
    for layer in range(layers):
        yield f"blk.{layer}.attn_norm.weight", (hidden,)
        yield f"blk.{layer}.attn_q.weight", (hidden, hidden)
        yield f"blk.{layer}.attn_k.weight", (keys, hidden)
        yield f"blk.{layer}.attn_v.weight", (keys, hidden)
        yield f"blk.{layer}.attn_output.weight", (hidden, hidden)
        yield f"blk.{layer}.ffn_norm.weight", (hidden,)
        yield f"blk.{layer}.ffn_gate.weight", (feed_forward, hidden)
        yield f"blk.{layer}.ffn_up.weight", (feed_forward, hidden)
        yield f"blk.{layer}.ffn_down.weight", (hidden, feed_forward)
