"""The socket for kernels: what runs one weight matrix, however it packs it.

`QuantizedLinear` reads weights in the common form and hands each matrix to a `KernelFactory`. `ReferenceKernel` is
plain torch; native kernels fill the same socket.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from aios_quant.quantized_tensor import Fp8Tensor, QuantizedTensor

Activation = Literal["a8", "a16"]
"""`a8`: a layer's inputs are rounded to 8-bit integers per token and group of columns; `a16`: they stay floats."""

Weight = QuantizedTensor | Fp8Tensor | Tensor
"""A matrix [N, K] as a checkpoint or a scheme gives it; a plain tensor is a floating one."""


class WeightKernel(Protocol):
    """One packed matrix [N, K]."""

    @property
    def num_rows(self) -> int:
        """N."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes that the packed matrix occupies, scales included."""
        ...

    def forward(self, x_TK: Tensor) -> Tensor:
        """[T, K] -> [T, N], in the dtype of the input."""
        ...

    def dequantize(self) -> Tensor:
        """The matrix [N, K] as the kernel sees it, in a floating dtype."""
        ...

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor that the kernel reads by what `change` makes of it, of the same dtype and shape.

        Raises:
            ConfigError: The kernel's weights cannot be elsewhere than they are.
        """
        ...


class KernelFactory(Protocol):
    """Packs a matrix for the kernels of one kind."""

    def __call__(self, weight: Weight, activation: Activation, dtype: torch.dtype, /) -> WeightKernel:
        """A kernel for `weight`, on the weight's device.

        Args:
            weight: What to pack; it is dropped afterwards.
            activation: How inputs of integer weights are treated; floating weights always take floats.
            dtype: Of the model's activations.
        """
        ...


class PermutedKernel:
    """A kernel whose columns lie in another order than the layer's inputs.

    GPTQ with `desc_act` gives neighbouring groups to columns of similar importance, wherever they are. The columns are
    brought together by group when the checkpoint is read, and the inputs follow them here.

    Args:
        kernel: The matrix with its columns brought together.
        column_order_K: For each of its columns the layer's, int64 [K], on the kernel's device.
    """

    def __init__(self, kernel: WeightKernel, column_order_K: Tensor) -> None:
        self._kernel = kernel
        self._column_order_K = column_order_K

    @property
    def num_rows(self) -> int:
        """N."""
        return self._kernel.num_rows

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed matrix and the order of its columns."""
        return self._kernel.num_bytes + self._column_order_K.nbytes

    def forward(self, x_TK: Tensor) -> Tensor:
        """[T, K] -> [T, N], in the dtype of the input."""
        return self._kernel.forward(x_TK[:, self._column_order_K])

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        """See WeightKernel."""
        self._kernel.map_tensors(change)
        self._column_order_K = change(self._column_order_K)

    def dequantize(self) -> Tensor:
        """The matrix [N, K], its columns in the layer's order."""
        together = self._kernel.dequantize()
        apart = torch.empty_like(together)
        apart[:, self._column_order_K] = together
        return apart
