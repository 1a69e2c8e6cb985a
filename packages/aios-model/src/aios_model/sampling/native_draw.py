"""Drawing in C++: what `TorchDrawer` draws, in one call for all rows, tens of times faster. See `csrc/sampling.h`.

Tokens are those of the reference wherever two candidates do not tie to the last bits of float32: exponentials,
logarithms and sums are rounded differently.
"""

from __future__ import annotations

import ctypes
import math
import struct
from typing import TYPE_CHECKING

import torch

from aios_model.native.base_library import model_library
from aios_model.sampling.drawer import require_finite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from aios_model.native.threads import ThreadPool
    from aios_model.sampling.rows import SamplingRow

_ROW = struct.Struct("=qqdiiff")
"""`DrawRow`: seed, position, top_p, index, top_k, temperature, max_depth."""


class NativeDrawer:
    """A `Drawer` for float32 logits in the host's memory.

    Args:
        vocab_size: Width of the logits.
        pool: Threads that draw.

    Raises:
        NativeBuildError: there is no native code here; ask `native_status` first.
    """

    def __init__(self, *, vocab_size: int, pool: ThreadPool) -> None:
        self._vocab_size = vocab_size
        self._pool = pool
        library, address, size = model_library(), ctypes.c_void_p, ctypes.c_int64
        self._pool_size = library.declare("aios_pool_size", ctypes.c_int32, address)
        self._scratch_bytes = library.declare("aios_draw_scratch_bytes", size, size)(vocab_size)
        self._draw = library.declare(
            "aios_draw", ctypes.c_int32, address, address, size, size, address, ctypes.c_int32, *[address] * 3
        )
        self._pointer = 0
        self._scratch = torch.empty(0)
        self._reserve(8)

    def draw(self, logits_SV: Tensor, indices: Sequence[int], rows: Sequence[SamplingRow]) -> list[int]:
        """See `Drawer.draw`; logits are float32, on the CPU."""
        assert logits_SV.dtype == torch.float32, logits_SV.dtype
        assert logits_SV.device.type == "cpu", logits_SV.device
        assert logits_SV.shape[1] == self._vocab_size, logits_SV.shape
        if logits_SV.stride(1) != 1:
            logits_SV = logits_SV.contiguous()
        self._describe(indices, rows)
        pointer = self._pool.pointer
        if pointer != self._pointer:  # the pool has another size
            self._scratch = torch.empty(self._pool_size(pointer) * self._scratch_bytes, dtype=torch.uint8)
            self._pointer = pointer
        num_failed = self._draw(
            pointer,
            logits_SV.data_ptr(),
            logits_SV.stride(0),
            self._vocab_size,
            self._rows_address,
            len(rows),
            self._token_ids,
            self._largest,
            self._scratch.data_ptr(),
        )
        if num_failed:
            require_finite(self._largest[: len(rows)], rows)
        return self._token_ids[: len(rows)]

    def _describe(self, indices: Sequence[int], rows: Sequence[SamplingRow]) -> None:
        """Writes what the C side is told of each row."""
        if len(rows) > self._capacity:
            self._reserve(2 * len(rows))
        offset = 0
        for index, row in zip(indices, rows, strict=True):
            params = row.params
            _ROW.pack_into(
                self._rows,
                offset,
                row.seed,
                row.position,
                params.top_p,
                index,
                min(params.top_k, self._vocab_size),
                0.0 if params.is_greedy else params.temperature,
                -math.log(params.min_p) if params.min_p else math.inf,
            )
            offset += _ROW.size

    def _reserve(self, num_rows: int) -> None:
        self._capacity = num_rows
        self._rows = ctypes.create_string_buffer(num_rows * _ROW.size)
        self._rows_address = ctypes.addressof(self._rows)
        self._token_ids = (ctypes.c_int32 * num_rows)()
        self._largest = (ctypes.c_float * num_rows)()
