"""Llama 3's rotary scaling, recognised in the tensor that a GGUF file keeps instead of its parameters."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from aios_model.config import ModelConfig, RopeScaling
from aios_model.errors import UnsupportedModelError
from aios_model.layers.rope import scaled_frequencies

# Published: Llama 3.1 and 3.3, and Llama 3.2. The context they were pre-trained on comes first in what follows.
_FACTORS = (8.0, 32.0)
_CONTEXTS = (8192, 4096, 2048, 16384, 32768, 64, 32)


def with_llama3_scaling(config: ModelConfig, factors: Tensor) -> ModelConfig:
    """`config` with the `llama3` scaling whose divisors of the frequencies are `factors` [H/2].

    Raises:
        UnsupportedModelError: No usual parameters give these factors.
    """
    plain, _ = scaled_frequencies(replace(config, rope_scaling=None), config.max_position_embeddings)
    factor = float(factors.max())
    for candidate in (factor, *_FACTORS):
        for context in (*_CONTEXTS, config.max_position_embeddings):
            scaling = RopeScaling(
                rope_type="llama3",
                factor=candidate,
                original_max_position_embeddings=context,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
            )
            scaled_config = replace(config, rope_scaling=scaling)
            scaled, _ = scaled_frequencies(scaled_config, config.max_position_embeddings)
            if bool(((plain / scaled - factors).abs() <= 1e-4 * factors).all()):
                return scaled_config
    raise UnsupportedModelError(
        "the file scales rotary frequencies by a table (rope_freqs.weight) that no usual llama3 parameters give; "
        "convert from the original checkpoint, which has a config.json of its own"
    )
