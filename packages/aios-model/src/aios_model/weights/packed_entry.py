"""A tensor that lies in a mapped file as blocks of a fixed number of elements and bytes.

Every format we read is of this kind. A plain encoding has blocks of one element (BF16: 1 element, 2 bytes); GGUF's
quantised ones pack 32 or 256 elements of a line with their scales (Q4_0: 32 elements, 18 bytes). A line is a whole
number of blocks, so a slice on block borders is a strided view of the bytes, and any other slice is decoded with the
blocks it cuts and trimmed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aios_model.errors import UnsupportedModelError
from aios_model.weights.mapped_file import MappedFile
from aios_model.weights.source import PIECE_ELEMENTS, TensorEntry

# Torch's dtype per encoding that has one. U16 to U64 have few operations in torch, but can be viewed.
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}

BlockDecoder = Callable[[Tensor, Tensor], None]
"""`decode(blocks, out)`: uint8 [L, B, block bytes] into float32 [L, B, block elements] on the CPU, any strides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How elements are packed.

    Attributes:
        name: `BF16`, `Q4_0`, …
        block_elements: Elements of a line per block.
        block_bytes: Bytes per block.
        decode: Unpacks blocks, for encodings that torch has no dtype for.
        refusal: Why the elements cannot be read as floats, and what can; None if they can.
    """

    name: str
    block_elements: int
    block_bytes: int
    decode: BlockDecoder | None = None
    refusal: str | None = None


def map_bytes(file: MappedFile) -> Tensor:
    """The whole file as one uint8 tensor over its mapping."""
    with warnings.catch_warnings():
        # Torch warns that writing to read-only memory is undefined. MappedFile says so, and nobody does.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(file.buffer, dtype=torch.uint8)


class PackedEntry(TensorEntry):
    """A tensor in a mapped file.

    Args:
        name: As in `TensorEntry`.
        shape: As in `TensorEntry`; its last dimension is a multiple of `encoding.block_elements`.
        encoding: How the elements are packed.
        packed: uint8 [number of bytes], the tensor's part of `map_bytes(file)`.
        file: Where the bytes lie, for `release` and error messages.
    """

    def __init__(
        self, *, name: str, shape: tuple[int, ...], encoding: Encoding, packed: Tensor, file: MappedFile
    ) -> None:
        super().__init__(name, shape, encoding.name)
        self._encoding = encoding
        self._packed = packed
        self._file = file

    def gather(self, index_T: Tensor, *, dtype: torch.dtype) -> Tensor:
        """See `TensorEntry.gather`."""
        if len(self.shape) < 2:
            return self.read(dtype=dtype)[index_T.cpu()].to(index_T.device)
        self._check_decodable()
        index = index_T.cpu()
        width = math.prod(self.shape[1:])
        out = torch.empty(len(index), width, dtype=dtype, device=index_T.device)
        step = max(1, PIECE_ELEMENTS // max(1, width, self._packed_rows().shape[1]))
        for start in range(0, len(index), step):
            rows = self._packed_rows().index_select(0, index[start : start + step])
            blocks = rows.view(len(rows), width // self._encoding.block_elements, self._encoding.block_bytes)
            self._decode_blocks(blocks, out[start : start + step])
        return out.view(len(index), *self.shape[1:])

    def raw(self, *, rows: slice | None = None) -> Tensor:
        """See `TensorEntry.raw`."""
        if len(self.shape) >= 2:
            selected, _ = self._ranges(rows, None)
            return self._packed_rows()[selected.start : selected.stop]
        _, selected = self._ranges(rows, None)
        block = self._encoding.block_elements
        if selected.start % block or selected.stop % block:
            raise ValueError(f"{self.name}: {selected} cuts a block of {block} elements of {self.encoding}")
        blocks = self._packed.view(-1, self._encoding.block_bytes)
        return blocks[selected.start // block : selected.stop // block]

    def typed(self, *, rows: slice | None = None) -> Tensor:
        """See `TensorEntry.typed`."""
        dtype = TORCH_DTYPES.get(self.encoding)
        if dtype is None:
            return super().typed(rows=rows)
        row_range, column_range = self._ranges(rows, None)
        values = _view_as(self.raw(rows=rows), dtype)
        return values.view(self._slice_shape(row_range, column_range))

    def select(self, index: int) -> TensorEntry:
        """See `TensorEntry.select`."""
        if len(self.shape) < 2:
            raise ValueError(f"{self.name} is a vector: it has no leading dimension to select from")
        packed = self._packed_rows()[index]
        name = f"{self.name}[{index}]"
        return PackedEntry(name=name, shape=self.shape[1:], encoding=self._encoding, packed=packed, file=self._file)

    def release(self) -> None:
        """See `TensorEntry.release`."""
        self._file.release(int(self._packed.storage_offset()), self._packed.numel())

    def _decode(self, lines: range, columns: range, out_LC: Tensor) -> None:
        self._check_decodable()
        size = self._encoding.block_elements
        first, last = columns.start // size, -(-columns.stop // size)
        blocks_per_line = (self.shape[-1] if self.shape else 1) // size
        packed = self._packed.view(-1, blocks_per_line, self._encoding.block_bytes)
        blocks = packed[lines.start : lines.stop, first:last]
        if columns.start % size == 0 and columns.stop % size == 0:
            self._decode_blocks(blocks, out_LC)
            return
        offset = columns.start - first * size
        step = max(1, PIECE_ELEMENTS // ((last - first) * size))
        for start in range(0, len(lines), step):
            part = blocks[start : start + step]
            whole = torch.empty(len(part), (last - first) * size)
            self._decode_blocks(part, whole)
            out_LC[start : start + step].copy_(whole[:, offset : offset + len(columns)])

    def _decode_blocks(self, blocks: Tensor, out_LC: Tensor) -> None:
        """Whole blocks, uint8 [L, B, block bytes], into `out_LC` [L, B * block elements]."""
        decode = self._encoding.decode
        if decode is None:
            out_LC.copy_(_view_as(blocks, TORCH_DTYPES[self.encoding]).squeeze(-1))
            return
        shape = (blocks.shape[1], self._encoding.block_elements)
        aligned = blocks if blocks.storage_offset() % 2 == 0 else blocks.clone()  # scales are viewed as float16
        if out_LC.dtype == torch.float32 and out_LC.device.type == "cpu":
            decode(aligned, out_LC.unflatten(-1, shape))
            return
        decoded = torch.empty(out_LC.shape)
        decode(aligned, decoded.unflatten(-1, shape))
        out_LC.copy_(decoded)

    def _check_decodable(self) -> None:
        if self._encoding.refusal is not None:
            where = f"{self._file.path.name}: tensor {self.name!r} is stored as {self.encoding}"
            raise UnsupportedModelError(f"{where}: {self._encoding.refusal}")

    def _packed_rows(self) -> Tensor:
        """[size of dimension 0, bytes per index of it]."""
        num_blocks = math.prod(self.shape[1:]) // self._encoding.block_elements
        return self._packed.view(self.shape[0], num_blocks * self._encoding.block_bytes)


def _view_as(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [..., n * itemsize] as [..., n] elements; copied only where a file put them on an odd address."""
    aligned = blocks.storage_offset() % dtype.itemsize == 0
    return (blocks if aligned else blocks.clone(memory_format=torch.contiguous_format)).view(dtype)
