"""Quantises a model through the socket between building and loading: every Linear becomes a `QuantizedLinear`.

A mixture's router stays as it is: it is tiny, and a rounding error there sends a token to another expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from aios_model.decoder import DecoderModel
from aios_model.errors import ConfigError
from aios_model.layers.linear import Linear
from aios_model.layers.moe import MixtureOfExperts
from aios_model.model import ModelTransform
from aios_quant.kernel import KernelFactory
from aios_quant.linear import QuantizedLinear
from aios_quant.reference import ReferenceKernel
from aios_quant.schemes.base import QuantScheme


def quantize_model(
    scheme: QuantScheme, head_scheme: QuantScheme | None = None, kernel_factory: KernelFactory | None = None
) -> ModelTransform:
    """A transform that quantises the Linear layers of a decoder while they are loaded.

    Args:
        scheme: Of the layers' weights, as `find_scheme` gives it.
        head_scheme: Of the output head; None for that of the layers.
        kernel_factory: What packs and multiplies; None for the torch reference.

    Returns:
        To be given to `load_decoder`; called, it raises ConfigError, naming the layer, if a scheme does not fit.
    """
    return _Quantize(scheme=scheme, head_scheme=head_scheme or scheme, kernel_factory=kernel_factory or ReferenceKernel)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Quantize:
    scheme: QuantScheme
    head_scheme: QuantScheme
    kernel_factory: KernelFactory

    def __call__(self, decoder: DecoderModel) -> None:
        for path, linear in list(decoder.named_modules()):
            if isinstance(linear, Linear) and not _is_router(decoder, path):
                self._replace(decoder, path, linear)

    def _replace(self, decoder: DecoderModel, path: str, linear: Linear) -> None:
        scheme = self.head_scheme if linear is decoder.head else self.scheme
        for part, width in linear.parts.items():
            try:
                scheme.check_shape(width, linear.in_features)
            except ConfigError as error:
                where = f"{path}.{part}" if part else path
                raise ConfigError(f"{where} [{width}, {linear.in_features}] cannot be quantised: {error}") from error
        parent, name = _parent(decoder, path)
        setattr(parent, name, QuantizedLinear.like(linear, scheme, self.kernel_factory))


def _is_router(decoder: DecoderModel, path: str) -> bool:
    parent, name = _parent(decoder, path)
    return isinstance(parent, MixtureOfExperts) and name == "router"


def _parent(decoder: DecoderModel, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return decoder.get_submodule(parent), name
