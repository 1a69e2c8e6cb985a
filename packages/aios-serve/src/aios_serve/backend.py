"""What computes: which weights, which kernels, which numbers in the pages. Chosen by rule, and said aloud.

On a CPU, from the first line that applies:

| asked for | weights | computed by |
|---|---|---|
| `quantization` names a scheme | that scheme | native kernels; torch where there is no compiler |
| `dtype` bfloat16 | BF16 | native kernels; torch where there is no compiler |
| any other `dtype`, or `quantization` none | that dtype (float32) | torch: the reference |
| nothing, no compiler | float32 | torch |
| nothing, a file with packed weights | as stored | native kernels |
| nothing, a file with float weights | INT8 | native kernels |

INT8 by channel is within rounding of BF16 in perplexity and reads half the bytes, and on a CPU a token costs what it
reads. Other devices compute with torch, in the checkpoint's own type.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from aios_kvcache.native.kernels import KVCACHE_KERNELS, kvcache_library
from aios_kvcache.native.native_cache import KV_DTYPES
from aios_kvcache.sizing import native_kv_bytes_per_token
from aios_model.config_file import read_json
from aios_model.errors import ConfigError
from aios_model.model import ModelTransform, resolve_device
from aios_model.native.base_library import MODEL_KERNELS, model_library
from aios_model.native.library import NativeLibrary, build_layers
from aios_model.native.status import native_status
from aios_model.native.threads import ThreadPool, get_pool
from aios_model.weights.gguf_file import GGUFFile
from aios_quant.native.matrix import NativeMatrix
from aios_quant.native.structures import QUANT_KERNELS, quant_library
from aios_quant.schemes.registry import find_scheme
from aios_quant.transform import quantize_model

if TYPE_CHECKING:
    from aios_model.config import ModelConfig
    from aios_model.weights.hub import ModelFiles
    from aios_quant.kernel import Activation, Weight
    from aios_serve.config import EngineConfig

AS_STORED = "as-stored"
DEFAULT_SCHEME = "int8"
NATIVE_LANES = 16
"""Native attention reads keys sixteen tokens at a time: pages hold a multiple of that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What was chosen.

    Attributes:
        scheme: Name of the weight scheme; `none` if weights stay numbers of `weight_dtype`.
        dtype: What the decoder is loaded as, in the words of `load_decoder`.
        weight_dtype: What float weights are packed as for native kernels.
        pool: Threads of the native kernels; None if torch computes.
        kv_dtype: Numbers in native pages; None if pages hold what the decoder computes with.
        reason: Why native kernels are not used, or what they are compiled for.
    """

    scheme: str
    dtype: str
    weight_dtype: torch.dtype = torch.float32
    pool: ThreadPool | None = None
    kv_dtype: torch.dtype | None = None
    reason: str = field(default="")

    @property
    def transforms(self) -> list[ModelTransform]:
        """What is done to a decoder before its weights are loaded."""
        scheme = find_scheme(self.scheme)
        if self.pool is not None:
            return [quantize_model(scheme, kernel_factory=_NativeFactory(self.pool, self.weight_dtype))]
        return [] if self.scheme == "none" else [quantize_model(scheme)]

    def kv_bytes_per_token(self, config: ModelConfig) -> int | None:
        """Bytes of one token in native pages; None if pages hold what the decoder computes with."""
        return None if self.kv_dtype is None else native_kv_bytes_per_token(config, KV_DTYPES[self.kv_dtype])


def choose_backend(config: EngineConfig, files: ModelFiles) -> Backend:
    """Applies the rule above to the options and the files.

    Raises:
        ConfigError: options that cannot be honoured together.
    """
    device = resolve_device(config.device)
    scheme = config.quantization
    plain = config.dtype not in ("auto", "bfloat16") or scheme == "none"
    if device.type != "cpu":
        return _torch_backend(config, "none" if scheme == "auto" else scheme, "torch computes on this device")
    if scheme in ("auto", "none") and plain and config.dtype != "bfloat16":
        return _torch_backend(config, "none", "torch computes plain weights, as the reference")
    status = native_status(_open_kernels)
    if not status.available:
        return _torch_backend(config, "none" if scheme == "auto" else scheme, status.reason)
    if scheme == "auto":
        scheme = "none" if config.dtype == "bfloat16" else AS_STORED if _is_packed(files) else DEFAULT_SCHEME
    pages_fit = config.block_size % NATIVE_LANES == 0 and config.kv_cache_policy == "paged"
    if not pages_fit and config.kv_cache_dtype != "auto":
        raise ConfigError(
            f"kv_cache_dtype={config.kv_cache_dtype!r} needs native pages, whose block_size is a multiple of "
            f"{NATIVE_LANES} (and kv_cache_policy 'paged'); block_size={config.block_size}"
        )
    kv_name = "bfloat16" if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    return Backend(
        scheme=scheme,
        dtype="float32",
        weight_dtype=torch.bfloat16 if config.dtype == "bfloat16" else torch.float32,
        pool=get_pool(config.threads, cpu_bind=config.cpu_bind, own_torch_threads=True),
        kv_dtype=getattr(torch, kv_name) if pages_fit else None,
        reason=status.reason,
    )


def _open_kernels() -> NativeLibrary:
    """All layers' kernels: at the first start they are compiled side by side."""
    build_layers(QUANT_KERNELS, KVCACHE_KERNELS, MODEL_KERNELS)
    for open_library in (model_library, kvcache_library):
        open_library()
    return quant_library()


def _torch_backend(config: EngineConfig, scheme: str, reason: str) -> Backend:
    if config.kv_cache_dtype not in ("auto", config.dtype):
        raise ConfigError(
            f"kv_cache_dtype={config.kv_cache_dtype!r} cannot be used: {reason}, and its pages hold what the model "
            "computes with; leave it out"
        )
    return Backend(scheme=scheme, dtype=config.dtype, reason=reason)


def _is_packed(files: ModelFiles) -> bool:
    """Whether the checkpoint's matrices are already quantised."""
    if files.format == "gguf":
        return any(
            tensor.block_elements > 1 for path in files.weight_paths for tensor in GGUFFile(path).tensors.values()
        )
    return "quantization_config" in read_json(files.root / "config.json")


@dataclass(frozen=True, slots=True)
class _NativeFactory:
    """Packs weights for the native kernels."""

    pool: ThreadPool
    weight_dtype: torch.dtype

    def __call__(self, weight: Weight, activation: Activation, dtype: torch.dtype, /) -> NativeMatrix:
        if isinstance(weight, torch.Tensor):
            weight = weight.to(self.weight_dtype)
        return NativeMatrix(weight, activation=activation, pool=self.pool)
