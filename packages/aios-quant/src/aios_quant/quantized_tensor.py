"""The common form of a quantised weight, whichever format it came from.

GGUF blocks, our own INT8 and INT4, GPTQ, AWQ and compressed-tensors all store small unsigned integers (*codes*) and,
per group of G neighbouring columns, a scale and sometimes an offset:

    w[n, k] = scale[n, k // G] * (code[n, k] - zero) + min[n, k // G]

`QuantizedTensor` holds exactly these numbers, one byte a code. It is a way station: it lives while one layer is being
loaded or converted, and a kernel then packs it as it likes. FP8 weights have a floating code and one scale per row,
so they are a type of their own.

Shapes: N output rows, K input columns, G columns per scale (here also: K / G groups per row).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import torch
from torch import Tensor

CODE_BITS = (4, 5, 6, 8)
"""Widths a code may have."""

_SCALE_DTYPES = (torch.float16, torch.float32)


STEP_COLUMNS = 256
"""Columns whose coded scales share a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedScales:
    """Scales (or minimums) of groups as GGUF's K encodings keep them: scale[n, g] = code[n, g] * step[n, k // 256].

    Attributes:
        codes_NG: int8 [N, K/G].
        steps_NS: float16 [N, K/256].
    """

    codes_NG: Tensor
    steps_NS: Tensor

    def rows(self, start: int, stop: int) -> CodedScales:
        """Rows [start, stop), not copied."""
        return CodedScales(codes_NG=self.codes_NG[start:stop], steps_NS=self.steps_NS[start:stop])

    def to(self, device: torch.device) -> CodedScales:
        """The same numbers on `device`."""
        return CodedScales(codes_NG=self.codes_NG.to(device), steps_NS=self.steps_NS.to(device))

    def empty(self, num_rows: int) -> CodedScales:
        """Room for so many rows."""
        codes, steps = self.codes_NG, self.steps_NS
        return CodedScales(
            codes_NG=codes.new_empty(num_rows, codes.shape[1]), steps_NS=steps.new_empty(num_rows, steps.shape[1])
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTensor:
    """One weight matrix in codes.

    Attributes:
        codes_NK: uint8 [N, K], unpacked, one byte a code, each below 2**bits.
        bits: 4, 5, 6 or 8.
        zero: Constant subtracted from every code: 8 (INT4, Q4_0), 128 (INT8, Q8_0), 16 (Q5_0), 32 (Q6_K), 0 with mins.
        group_size: G, columns per scale; K for one scale per row. K is a multiple of it.
        scales_NG: [N, K/G], float16 where the format stores float16 and nothing else was multiplied in, else float32.
        mins_NG: Added after scaling, shape and dtypes as the scales; None for symmetric formats.
        coded_scales: What the scales are the products of, where a format keeps them so: a kernel may store these.
        coded_mins: The same of the minimums; given if and only if there are coded scales and minimums.

    Raises:
        ValueError: The shapes, dtypes or widths contradict each other.
    """

    codes_NK: Tensor
    bits: int
    zero: int
    group_size: int
    scales_NG: Tensor
    mins_NG: Tensor | None = None
    coded_scales: CodedScales | None = None
    coded_mins: CodedScales | None = None

    def __post_init__(self) -> None:
        if self.codes_NK.dtype != torch.uint8 or self.codes_NK.dim() != 2:
            raise ValueError(f"codes are uint8 [N, K], got {self.codes_NK.dtype} {list(self.codes_NK.shape)}")
        if self.bits not in CODE_BITS:
            raise ValueError(f"bits = {self.bits}, supported are {CODE_BITS}")
        if not 0 <= self.zero < 1 << self.bits:
            raise ValueError(f"zero = {self.zero} is no code of {self.bits} bits")
        rows, columns = self.codes_NK.shape
        if self.group_size < 1 or columns % self.group_size:
            raise ValueError(f"K = {columns} is not a multiple of group_size = {self.group_size}")
        for name, tensor in (("scales", self.scales_NG), ("mins", self.mins_NG)):
            if tensor is None:
                continue
            if tuple(tensor.shape) != (rows, columns // self.group_size) or tensor.dtype not in _SCALE_DTYPES:
                raise ValueError(
                    f"{name} are float16 or float32 [{rows}, {columns // self.group_size}], "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes_NK.shape[0], self.codes_NK.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes_NK.device

    @property
    def format(self) -> tuple[object, ...]:
        """What two tensors must have in common to be one matrix: all but their rows."""
        mins = None if self.mins_NG is None else self.mins_NG.dtype
        scales = "coded" if self.coded_scales else self.scales_NG.dtype
        return (self.codes_NK.shape[1], self.bits, self.zero, self.group_size, scales, mins)

    @property
    def is_per_channel(self) -> bool:
        """Whether a row has a single scale."""
        return self.scales_NG.shape[1] == 1

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K]: scale * (code - zero) + min in float32 (float64 if asked for), then rounded to `dtype`.

        For GGUF's types the float32 result is that of ggml to the last bit.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        groups = self.codes_NK.to(wide).sub_(self.zero).unflatten(1, (-1, self.group_size))
        groups.mul_(self.scales_NG.to(wide).unsqueeze(-1))
        if self.mins_NG is not None:
            groups.add_(self.mins_NG.to(wide).unsqueeze(-1))
        return groups.flatten(1).to(dtype)

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Rows [start, stop), not copied."""
        return replace(
            self,
            codes_NK=self.codes_NK[start:stop],
            scales_NG=self.scales_NG[start:stop],
            mins_NG=None if self.mins_NG is None else self.mins_NG[start:stop],
            coded_scales=None if self.coded_scales is None else self.coded_scales.rows(start, stop),
            coded_mins=None if self.coded_mins is None else self.coded_mins.rows(start, stop),
        )

    def to(self, device: torch.device) -> QuantizedTensor:
        """The same numbers on `device`."""
        return replace(
            self,
            codes_NK=self.codes_NK.to(device),
            scales_NG=self.scales_NG.to(device),
            mins_NG=None if self.mins_NG is None else self.mins_NG.to(device),
            coded_scales=None if self.coded_scales is None else self.coded_scales.to(device),
            coded_mins=None if self.coded_mins is None else self.coded_mins.to(device),
        )

    @staticmethod
    def concat(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
        """The rows of all `tensors`, in order, as one matrix; ValueError unless they have the same format."""
        return tensors[0] if len(tensors) == 1 else collect_rows(tensors, sum(tensor.shape[0] for tensor in tensors))

    def _empty(self, num_rows: int) -> Self:
        return replace(
            self,
            codes_NK=self.codes_NK.new_empty(num_rows, self.codes_NK.shape[1]),
            scales_NG=self.scales_NG.new_empty(num_rows, self.scales_NG.shape[1]),
            mins_NG=None if self.mins_NG is None else self.mins_NG.new_empty(num_rows, self.mins_NG.shape[1]),
            coded_scales=None if self.coded_scales is None else self.coded_scales.empty(num_rows),
            coded_mins=None if self.coded_mins is None else self.coded_mins.empty(num_rows),
        )

    def _tensors(self) -> list[Tensor]:
        parts: list[Tensor | None] = [self.codes_NK, self.scales_NG, self.mins_NG]
        for coded in (self.coded_scales, self.coded_mins):
            parts += [] if coded is None else [coded.codes_NG, coded.steps_NS]
        return [part for part in parts if part is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Tensor:
    """One weight matrix in 8-bit floats (E4M3, arXiv 2209.05433): w[n, k] = scale[n] * e4m3(code[n, k]).

    Attributes:
        codes_NK: uint8 [N, K], the bits of `torch.float8_e4m3fn` (no infinities; largest magnitude 448).
        scales_N: float32 [N], one per row.

    Raises:
        ValueError: The shapes or dtypes contradict each other.
    """

    codes_NK: Tensor
    scales_N: Tensor

    def __post_init__(self) -> None:
        if self.codes_NK.dtype != torch.uint8 or self.codes_NK.dim() != 2:
            raise ValueError(f"codes are uint8 [N, K], got {self.codes_NK.dtype} {list(self.codes_NK.shape)}")
        if self.scales_N.dtype != torch.float32 or tuple(self.scales_N.shape) != (self.codes_NK.shape[0],):
            raise ValueError(
                f"scales are float32 [{self.codes_NK.shape[0]}], got {self.scales_N.dtype} {list(self.scales_N.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes_NK.shape[0], self.codes_NK.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes_NK.device

    @property
    def format(self) -> tuple[object, ...]:
        """What two tensors must have in common to be one matrix: all but their rows."""
        return (self.codes_NK.shape[1], "fp8")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K]: scale * value in float32 (float64 if asked for), then rounded to `dtype`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        # Looking 256 values up is several times quicker than torch's conversion on a CPU.
        table = torch.arange(256, dtype=torch.uint8, device=self.device).view(torch.float8_e4m3fn).to(wide)
        values = table.index_select(0, self.codes_NK.flatten().to(torch.int32)).view(self.codes_NK.shape)
        return values.mul_(self.scales_N.to(wide).unsqueeze(-1)).to(dtype)

    def rows(self, start: int, stop: int) -> Fp8Tensor:
        """Rows [start, stop), not copied."""
        return Fp8Tensor(codes_NK=self.codes_NK[start:stop], scales_N=self.scales_N[start:stop])

    def to(self, device: torch.device) -> Fp8Tensor:
        """The same numbers on `device`."""
        return Fp8Tensor(codes_NK=self.codes_NK.to(device), scales_N=self.scales_N.to(device))

    @staticmethod
    def concat(tensors: Sequence[Fp8Tensor]) -> Fp8Tensor:
        """The rows of all `tensors`, in order, as one matrix; ValueError unless they have the same K."""
        return tensors[0] if len(tensors) == 1 else collect_rows(tensors, sum(tensor.shape[0] for tensor in tensors))

    def _empty(self, num_rows: int) -> Self:
        return replace(
            self,
            codes_NK=self.codes_NK.new_empty(num_rows, self.codes_NK.shape[1]),
            scales_N=self.scales_N.new_empty(num_rows),
        )

    def _tensors(self) -> list[Tensor]:
        return [self.codes_NK, self.scales_N]


PackedWeight = QuantizedTensor | Fp8Tensor
"""A weight in codes, of either kind."""

_Packed = TypeVar("_Packed", bound=PackedWeight)


def collect_rows(pieces: Iterable[_Packed], num_rows: int) -> _Packed:
    """Makes one matrix of runs of rows that are made one after the other, never holding more than one of them.

    Args:
        pieces: At least one, all of one format, `num_rows` rows together.
        num_rows: N.

    Raises:
        ValueError: The formats differ.
    """
    whole: _Packed | None = None
    start = 0
    for piece in pieces:
        whole = piece._empty(num_rows) if whole is None else whole
        if piece.format != whole.format:
            raise ValueError(f"weights of formats {whole.format} and {piece.format} cannot be stacked into one matrix")
        stop = start + piece.shape[0]
        for to, part in zip(whole._tensors(), piece._tensors(), strict=True):
            to[start:stop] = part
        start = stop
    assert whole is not None, "a matrix has rows"
    assert start == num_rows, "pieces make up the matrix"
    return whole
