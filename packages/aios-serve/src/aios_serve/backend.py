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

Pages hold what `kv_cache_dtype` says, whoever attends: native kernels read them as they are, torch converts what it has
gathered. "auto" is BF16 with native kernels, else what the decoder computes with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from aios_kvcache.native.kernels import KVCACHE_KERNELS, kvcache_library
from aios_kvcache.native.native_cache import KV_DTYPES
from aios_kvcache.sizing import native_kv_bytes_per_token, torch_kv_bytes_per_token
from aios_model.config_file import read_json
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
        kv_dtype: Numbers in the pages; None if they hold what the decoder computes with.
        native_pages: Whether native kernels attend, over pages of their layout.
        reason: Why native kernels are not used, or what they are compiled for.
    """

    scheme: str
    dtype: str
    weight_dtype: torch.dtype = torch.float32
    pool: ThreadPool | None = None
    kv_dtype: torch.dtype | None = None
    native_pages: bool = False
    reason: str = field(default="")

    @property
    def transforms(self) -> list[ModelTransform]:
        """What is done to a decoder before its weights are loaded."""
        scheme = find_scheme(self.scheme)
        if self.pool is not None:
            return [quantize_model(scheme, kernel_factory=_NativeFactory(self.pool, self.weight_dtype))]
        return [] if self.scheme == "none" else [quantize_model(scheme)]

    def kv_bytes_per_token(self, config: ModelConfig) -> int | None:
        """Bytes of one token in the pages; None if they hold what the decoder computes with."""
        if self.kv_dtype is None:
            return None
        bytes_per_token = native_kv_bytes_per_token if self.native_pages else torch_kv_bytes_per_token
        return bytes_per_token(config, KV_DTYPES[self.kv_dtype])

    def kv_dtype_name(self, computed: torch.dtype) -> str:
        """What the pages hold, in the words of `kv_cache_dtype`, if the decoder computes with `computed`."""
        kept = self.kv_dtype or computed
        return KV_DTYPES.get(kept) or str(kept).removeprefix("torch.")


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
    return Backend(
        scheme=scheme,
        dtype="float32",
        weight_dtype=torch.bfloat16 if config.dtype == "bfloat16" else torch.float32,
        pool=get_pool(config.threads, cpu_bind=config.cpu_bind, own_torch_threads=True),
        kv_dtype=_kept(config) or (torch.bfloat16 if pages_fit else None),
        native_pages=pages_fit,
        reason=status.reason,
    )


def _open_kernels() -> NativeLibrary:
    """All layers' kernels: at the first start they are compiled side by side."""
    build_layers(QUANT_KERNELS, KVCACHE_KERNELS, MODEL_KERNELS)
    for open_library in (model_library, kvcache_library):
        open_library()
    return quant_library()


def _torch_backend(config: EngineConfig, scheme: str, reason: str) -> Backend:
    return Backend(scheme=scheme, dtype=config.dtype, kv_dtype=_kept(config), reason=reason)


def _kept(config: EngineConfig) -> torch.dtype | None:
    """What the pages are to hold; None for "auto"."""
    return next((dtype for dtype, name in KV_DTYPES.items() if name == config.kv_cache_dtype), None)


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
