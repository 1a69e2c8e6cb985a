"""Weights made up on the spot, for trying a model's speed and memory without its checkpoint (`--load-format dummy`).

Nothing is stored: an element is a hash of the seed, the tensor's name, its line and its column, so every rank and every
slice sees the same tensor, whatever is read first. (Counter-based generators such as Philox work like this; a
sequential one would have to draw everything before the slice.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from aios_model.weights.source import PIECE_ELEMENTS, TensorEntry

# Uniform values of standard deviation 0.02, as models are initialised: activations stay finite through any depth.
_LARGEST = 0.02 * math.sqrt(3)


class DummySource:
    """Small random weights in the shapes asked for; tensors named `…norm.weight` are ones.

    Args:
        shapes: Shapes by tensor name.
        seed: Another seed, another model.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> None:
        self._entries = {
            name: DummyEntry(name, tuple(shape), key=_key(name, seed), ones=name.endswith("norm.weight"))
            for name, shape in shapes.items()
        }

    def entries(self) -> Mapping[str, TensorEntry]:
        """An entry per shape, encoding F32."""
        return self._entries

    def close(self) -> None:
        """Nothing is held."""


class DummyEntry(TensorEntry):
    """A tensor whose elements are computed when they are read.

    Args:
        name: Name in the checkpoint whose place it takes.
        shape: Its shape there.
        key: What distinguishes this tensor's values from another's.
        ones: Whether all elements are 1.
        first_line: Where the tensor begins in the one it was selected from.
    """

    def __init__(self, name: str, shape: tuple[int, ...], *, key: int, ones: bool = False, first_line: int = 0) -> None:
        super().__init__(name, shape, "F32")
        self._key = key
        self._ones = ones
        self._first_line = first_line

    def gather(self, index_T: Tensor, *, dtype: torch.dtype) -> Tensor:
        """See `TensorEntry.gather`."""
        index = index_T.cpu()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.shape[0]:
            raise IndexError(f"{self.name}: an index is not in 0 to {self.shape[0] - 1}")
        if len(self.shape) < 2:
            return self.read(dtype=dtype)[index].to(index_T.device)
        lines_per_row, width = math.prod(self.shape[1:-1]), self.shape[-1]
        lines = (index.unsqueeze(-1) * lines_per_row + torch.arange(lines_per_row)).flatten()
        out = torch.empty(len(lines), width, dtype=dtype)
        step = max(1, PIECE_ELEMENTS // max(1, width))
        for start in range(0, len(lines), step):
            self._fill(lines[start : start + step], range(width), out[start : start + step])
        return out.view(len(index), *self.shape[1:]).to(index_T.device)

    def raw(self, *, rows: slice | None = None) -> Tensor:
        """The bytes a float32 checkpoint would hold, made when asked for."""
        values = self.typed(rows=rows)
        return values.reshape(len(values) if values.dim() else 1, -1).view(torch.uint8)

    def typed(self, *, rows: slice | None = None) -> Tensor:
        """As `read`, in float32."""
        return self.read(rows=rows, dtype=torch.float32)

    def select(self, index: int) -> TensorEntry:
        """See `TensorEntry.select`."""
        if len(self.shape) < 2:
            raise ValueError(f"{self.name} is a vector: it has no leading dimension to select from")
        first_line = self._first_line + range(self.shape[0])[index] * math.prod(self.shape[1:-1])
        name = f"{self.name}[{index}]"
        return DummyEntry(name, self.shape[1:], key=self._key, ones=self._ones, first_line=first_line)

    def _decode(self, lines: range, columns: range, out_LC: Tensor) -> None:
        self._fill(torch.arange(lines.start, lines.stop), columns, out_LC)

    def _fill(self, lines_L: Tensor, columns: range, out_LC: Tensor) -> None:
        if self._ones:
            out_LC.fill_(1.0)
            return
        line_keys = _mix((lines_L + self._first_line).to(torch.int32).bitwise_xor_(self._key))
        column_keys = torch.arange(columns.start, columns.stop, dtype=torch.int32).mul_(_signed(0x9E3779B1))
        bits = line_keys.unsqueeze(-1) ^ column_keys
        values = torch.empty_like(bits)
        torch.mul(_mix(bits, values), _LARGEST / 2**31, out=values.view(torch.float32))
        out_LC.copy_(values.view(torch.float32))


def _key(name: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)


def _mix(bits: Tensor, scratch: Tensor | None = None) -> Tensor:
    """MurmurHash3's finaliser on int32, in place: every input bit changes every output bit with odds of a half."""
    scratch = torch.empty_like(bits) if scratch is None else scratch
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        torch.bitwise_right_shift(bits, shift, out=scratch)
        scratch.bitwise_and_((1 << (32 - shift)) - 1)  # int32 shifts carry the sign along
        bits.bitwise_xor_(scratch).mul_(_signed(factor))
    return bits


def _signed(value: int) -> int:
    """The int32 with the bits of a 32-bit number."""
    return value - (1 << 32) if value >= 1 << 31 else value
