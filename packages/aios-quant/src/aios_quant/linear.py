"""`QuantizedLinear`: a Linear whose weight lives in codes and is multiplied by a kernel.

It takes a Linear's place before the weights are loaded. Its parts (q, k and v; gate and up) are read one after the
other; neighbours of one format become one matrix, so a layer usually is a single product, and a GGUF that keeps V in
finer blocks than Q and K costs two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from aios_model.layers.linear import Linear
from aios_model.weights.source import TensorEntry
from aios_quant.kernel import KernelFactory, PermutedKernel, Weight, WeightKernel
from aios_quant.quantized_tensor import Fp8Tensor
from aios_quant.reading import StoredWeight, concat_weights, read_weight, weight_format
from aios_quant.reference import ReferenceKernel
from aios_quant.schemes.base import QuantScheme


class QuantizedLinear(Linear):
    """y = x Wᵀ + b for x [T, in_features], W in the codes of a scheme.

    Args:
        in_features: Width of the input.
        parts: As for `Linear`.
        bias: As for `Linear`; it stays a float vector.
        scheme: What weights become and how inputs are treated.
        kernel_factory: Packs and multiplies.

    Attributes:
        kernels: The matrices, top to bottom; empty until weights are loaded.
    """

    def __init__(
        self,
        in_features: int,
        parts: int | Mapping[str, int],
        *,
        bias: bool = False,
        scheme: QuantScheme,
        kernel_factory: KernelFactory = ReferenceKernel,
    ) -> None:
        super().__init__(in_features, parts, bias=bias)
        self.scheme = scheme
        self.kernels: tuple[WeightKernel, ...] = ()
        self._kernel_factory = kernel_factory
        self._dtype = torch.float32
        self._formats: tuple[str, ...] = ()

    @classmethod
    def like(cls, linear: Linear, scheme: QuantScheme, kernel_factory: KernelFactory) -> Self:
        """An empty layer of the shape of `linear`."""
        return cls(linear.in_features, linear.parts, bias=linear.has_bias, scheme=scheme, kernel_factory=kernel_factory)

    def load(
        self,
        weights: Mapping[str, TensorEntry],
        biases: Mapping[str, TensorEntry],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Fills the layer from one entry per part, one part in memory at a time where formats differ.

        Raises:
            CheckpointError: A weight cannot be quantised; names the tensor.
        """
        if self.has_bias:
            self.bias = torch.cat([biases[part].read(dtype=dtype) for part in self.parts]).to(device)
        self._pack((read_weight(weights[part], self.scheme, dtype) for part in self.parts), dtype, device)

    def set_weight(self, weight: Tensor) -> None:
        """Quantises `weight` [out_features, in_features] and takes it, on its device and for inputs of its dtype."""
        self._pack([StoredWeight(weight=self.scheme.quantize(weight))], weight.dtype, weight.device)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        """As for `Linear`.

        Raises:
            ConfigError: The kernels compute from host memory.
        """
        for kernel in self.kernels:
            kernel.map_tensors(change)
        if self.bias is not None:
            self.bias = change(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in_features] -> [T, out_features]."""
        outputs = [kernel.forward(x) for kernel in self.kernels]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return out if self.bias is None else out + self.bias

    def dense_weight(self) -> Tensor:
        """The weight [out_features, in_features], dequantised, in the dtype the layer was loaded with."""
        return torch.cat([kernel.dequantize().to(self._dtype) for kernel in self.kernels])

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed matrices and the bias; 0 until weights are loaded."""
        return sum(kernel.num_bytes for kernel in self.kernels) + (0 if self.bias is None else self.bias.nbytes)

    def extra_repr(self) -> str:
        """What print(model) shows of the layer."""
        parts = ", ".join(f"{name or 'out'}={width}" for name, width in self.parts.items())
        stored = f", stored={' + '.join(self._formats)}" if self._formats else ""
        return f"in={self.in_features}, {parts}, bias={self.has_bias}, scheme={self.scheme.name}{stored}"

    def _pack(
        self, parts: Iterator[StoredWeight] | Sequence[StoredWeight], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._dtype = dtype
        kernels: list[WeightKernel] = []
        formats: list[str] = []
        for stored in _stack(parts):
            weight = stored.weight.to(device)
            kernel = self._kernel_factory(weight, self.scheme.activation, dtype)
            order = stored.column_order_K
            kernels.append(kernel if order is None else PermutedKernel(kernel, order.to(device)))
            formats.append(describe_format(weight))
        self.kernels, self._formats = tuple(kernels), tuple(formats)


def describe_format(weight: Weight) -> str:
    """A format in a few words: `4 bits in groups of 32 with minimums`, `float8`, `bfloat16`."""
    if isinstance(weight, Tensor):
        return str(weight.dtype).removeprefix("torch.")
    if isinstance(weight, Fp8Tensor):
        return "float8"
    groups = "per row" if weight.is_per_channel else f"in groups of {weight.group_size}"
    return f"{weight.bits} bits {groups}{'' if weight.mins_NG is None else ' with minimums'}"


def _stack(parts: Iterator[StoredWeight] | Sequence[StoredWeight]) -> Iterator[StoredWeight]:
    """Joins neighbours of one format and one order of columns."""
    run: list[StoredWeight] = []
    for part in parts:
        if run and not _stackable(run[-1], part):
            joined, run = _join(run), []
            yield joined
        run.append(part)
    joined, run = _join(run), []
    yield joined


def _stackable(upper: StoredWeight, lower: StoredWeight) -> bool:
    if weight_format(upper.weight) != weight_format(lower.weight):
        return False
    orders = [part.column_order_K for part in (upper, lower) if part.column_order_K is not None]
    return not orders or (len(orders) == 2 and torch.equal(*orders))


def _join(run: list[StoredWeight]) -> StoredWeight:
    weight = concat_weights([part.weight for part in run])
    return StoredWeight(weight=weight, column_order_K=run[0].column_order_K)
