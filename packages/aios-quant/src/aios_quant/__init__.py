"""How few bits are enough? Weights in INT8, INT4, FP8 and GGUF blocks, and the kernels that run them.

Numbers:
    `QuantizedTensor`, `Fp8Tensor`   the common form of a quantised weight
    `QuantScheme`, `find_scheme`, `SCHEME_NAMES`   how a floating weight becomes codes
Running a model:
    `quantize_model`        the transform that puts a `QuantizedLinear` in every Linear's place
    `QuantizedLinear`       a layer whose weight lives in codes
    `WeightKernel`, `KernelFactory`, `ReferenceKernel`   what multiplies one matrix
Published checkpoints (GPTQ, AWQ, compressed-tensors):
    `quantized_checkpoint`  the source transform that reads them
    `open_quantized_source`, `QuantizedEntry`

Names are imported when they are first used, so importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aios_quant.checkpoints.quantized_entry import QuantizedEntry
    from aios_quant.checkpoints.source import open_quantized_source, quantized_checkpoint
    from aios_quant.kernel import KernelFactory, WeightKernel
    from aios_quant.linear import QuantizedLinear
    from aios_quant.quantized_tensor import Fp8Tensor, QuantizedTensor
    from aios_quant.reference import ReferenceKernel
    from aios_quant.schemes.base import QuantScheme
    from aios_quant.schemes.registry import SCHEME_NAMES, find_scheme
    from aios_quant.transform import quantize_model

__all__ = [
    "SCHEME_NAMES",
    "Fp8Tensor",
    "KernelFactory",
    "QuantScheme",
    "QuantizedEntry",
    "QuantizedLinear",
    "QuantizedTensor",
    "ReferenceKernel",
    "WeightKernel",
    "find_scheme",
    "open_quantized_source",
    "quantize_model",
    "quantized_checkpoint",
]

_HOMES = {
    "checkpoints.quantized_entry": ("QuantizedEntry",),
    "checkpoints.source": ("open_quantized_source", "quantized_checkpoint"),
    "kernel": ("KernelFactory", "WeightKernel"),
    "linear": ("QuantizedLinear",),
    "quantized_tensor": ("Fp8Tensor", "QuantizedTensor"),
    "reference": ("ReferenceKernel",),
    "schemes.base": ("QuantScheme",),
    "schemes.registry": ("SCHEME_NAMES", "find_scheme"),
    "transform": ("quantize_model",),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
