"""What a quantisation scheme is: how a floating weight becomes codes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from aios_model.errors import CheckpointError
from aios_quant.kernel import Activation, Weight


class QuantScheme(Protocol):
    """Turns one weight matrix into codes and says how its product treats the inputs.

    A scheme works row by row: a piece of a matrix gives the same codes as the matrix.
    """

    @property
    def name(self) -> str:
        """As `find_scheme` knows it."""
        ...

    @property
    def bits(self) -> int:
        """Bits of a code; 0 where the scheme leaves weights as they are."""
        ...

    @property
    def activation(self) -> Activation:
        """`a8` rounds the inputs of integer weights to 8 bits, `a16` leaves them floats."""
        ...

    @property
    def keeps_stored(self) -> bool:
        """Whether weights that a checkpoint holds in codes keep those codes."""
        ...

    def check_shape(self, n: int, k: int) -> None:
        """Raises ConfigError, saying what to use instead, if a weight [n, k] cannot be quantised so."""
        ...

    def quantize(self, weight_NK: Tensor) -> Weight:
        """Quantises a floating weight [N, K] by rounding to nearest.

        Raises:
            CheckpointError: The weight holds NaN or infinity, or numbers beyond the range of its scales.
            ConfigError: Its shape does not fit; see `check_shape`.
        """
        ...


def check_finite(largest: Tensor) -> None:
    """Raises CheckpointError if one of the largest magnitudes of rows or groups is NaN or infinite."""
    if not bool(torch.isfinite(largest).all()):
        raise CheckpointError("the weight holds NaN or infinity; the checkpoint is damaged")


def as_float16_scales(scales: Tensor) -> Tensor:
    """`scales` rounded to float16; CheckpointError if one is NaN, infinite or out of the range of float16."""
    rounded = scales.to(torch.float16)
    if not bool(torch.isfinite(rounded).all()):
        check_finite(scales)
        raise CheckpointError(
            f"the weight holds a group whose scale, {float(scales.abs().max()):.3g}, is out of the range of float16; "
            "use the scheme 'int8', whose scales are float32"
        )
    return rounded
