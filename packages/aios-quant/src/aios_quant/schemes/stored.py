"""Schemes that quantise nothing: weights as the file holds them, or as plain floats."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from aios_quant.kernel import Activation


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredScheme:
    """Every weight keeps what the file holds: GGUF blocks, published INT8, INT4 and FP8 codes, or floats.

    Attributes:
        activation: How inputs of integer weights are treated.
    """

    activation: Activation = "a8"
    bits: int = 0
    keeps_stored: bool = True

    @property
    def name(self) -> str:
        """`as-stored` or `as-stored-a16`."""
        return "as-stored" if self.activation == "a8" else "as-stored-a16"

    def check_shape(self, n: int, k: int) -> None:
        """Every shape fits."""

    def quantize(self, weight_NK: Tensor) -> Tensor:
        """Floats stay floats."""
        return weight_NK


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatScheme:
    """Every weight becomes floats of the model's dtype, also one that is stored in codes."""

    name: str = "none"
    bits: int = 0
    activation: Activation = "a16"
    keeps_stored: bool = False

    def check_shape(self, n: int, k: int) -> None:
        """Every shape fits."""

    def quantize(self, weight_NK: Tensor) -> Tensor:
        """Floats stay floats."""
        return weight_NK
