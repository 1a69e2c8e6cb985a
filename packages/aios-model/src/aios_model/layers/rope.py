"""Rotary position embedding (arXiv 2104.09864) and the four ways in which it is stretched.

A head's H numbers form H/2 pairs (i, i + H/2); the pair i of a token at position p is turned by the angle p * θ_i. The
dot product of a query and a key then depends on their distance only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aios_model.config import ModelConfig, RopeScaling


@dataclass(frozen=True, slots=True)
class Rotation:
    """The rotations of one step's tokens, computed once for all layers.

    Attributes:
        cos_T1H: Cosines, the same in both halves of H.
        sin_T1H: Sines, negated in the first half, so that x * cos + swap_halves(x) * sin rotates.
    """

    cos_T1H: Tensor
    sin_T1H: Tensor

    def apply(self, x_TNH: Tensor) -> Tensor:
        """Turns every head of every token, [T, N, H] -> [T, N, H]."""
        swapped = torch.roll(x_TNH, x_TNH.shape[-1] // 2, dims=-1)
        return torch.addcmul(x_TNH * self.cos_T1H, swapped, self.sin_T1H)


class RotaryEmbedding(nn.Module):
    """Computes the rotation of each position.

    Args:
        config: The model's.
        context_length: Longest context that will be served, in tokens; only `dynamic` scaling depends on it. Its
            base is fixed by this length: one that grew with the sequence would make keys already cached wrong.
    """

    def __init__(self, config: ModelConfig, *, context_length: int) -> None:
        super().__init__()
        self._config = config
        self._context_length = context_length
        self.inverse_frequencies: Tensor = torch.empty(config.head_dim // 2, device="meta")
        self.attention_factor = 1.0

    def load(self, *, device: torch.device, dtype: torch.dtype, frequency_factors: Tensor | None = None) -> None:
        """Computes the frequencies; `frequency_factors` [H/2] divide them (GGUF's `rope_freqs.weight`)."""
        # float64 models are the tests' oracle for bookkeeping; everything else computes angles as HF does.
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        frequencies, self.attention_factor = scaled_frequencies(self._config, self._context_length)
        if frequency_factors is not None:
            frequencies = frequencies / frequency_factors.float().cpu()
        self.inverse_frequencies = frequencies.to(device=device, dtype=exact)
        self._dtype = dtype

    def forward(self, positions_T: Tensor) -> Rotation:
        """[T] int64 -> rotations of those positions."""
        angles = positions_T.to(self.inverse_frequencies.dtype)[:, None] * self.inverse_frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return Rotation(
            torch.cat((cos, cos), dim=-1)[:, None].to(self._dtype),
            torch.cat((-sin, sin), dim=-1)[:, None].to(self._dtype),
        )


def scaled_frequencies(config: ModelConfig, context_length: int) -> tuple[Tensor, float]:
    """Inverse frequencies [H/2] in float32, and the factor that cos and sin are multiplied with.

    Args:
        config: The model's; its `rope_scaling` says which formula applies.
        context_length: Longest context served, for `dynamic`.
    """
    scaling = config.rope_scaling
    base = _inverse_frequencies(config.rope_theta, config.head_dim)
    if scaling is None:
        return base, 1.0
    if scaling.rope_type == "linear":
        return base / scaling.factor, 1.0
    if scaling.rope_type == "dynamic":
        return _dynamic(config, scaling, context_length), 1.0
    if scaling.rope_type == "llama3":
        return _llama3(base, scaling), 1.0
    return _yarn(config, scaling, base)


def _inverse_frequencies(theta: float, head_dim: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def _dynamic(config: ModelConfig, scaling: RopeScaling, context_length: int) -> Tensor:
    """NTK-aware scaling: a larger base, by how far the context exceeds the trained one."""
    length = max(context_length, config.max_position_embeddings)
    stretch = scaling.factor * length / config.max_position_embeddings - (scaling.factor - 1)
    return _inverse_frequencies(
        config.rope_theta * stretch ** (config.head_dim / (config.head_dim - 2)), config.head_dim
    )


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between blended (Llama 3.1)."""
    original = scaling.original_max_position_embeddings or 1
    rotations = original * frequencies / (2 * math.pi)
    blend = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _yarn(config: ModelConfig, scaling: RopeScaling, frequencies: Tensor) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071, section 3.2): interpolates slow dimensions, keeps fast ones, sharpens attention."""
    original = scaling.original_max_position_embeddings or config.max_position_embeddings

    def dimension_turning(rotations: float) -> float:
        return config.head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension_turning(scaling.beta_fast), dimension_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    ramp = (torch.arange(config.head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)
    stretched = frequencies / scaling.factor * interpolated + frequencies * (1 - interpolated)
    return stretched, _yarn_attention_factor(scaling)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def sharpening(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return sharpening(scaling.mscale) / sharpening(scaling.mscale_all_dim)
    return sharpening(1.0)
