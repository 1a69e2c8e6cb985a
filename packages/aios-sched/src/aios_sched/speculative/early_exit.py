"""The target as its own draft model: its first layers, then its norm and head, all shared and none copied.

Self-speculation by early exit (LayerSkip, Elhoushi et al. 2024, arXiv 2404.16710). Models that were not trained to exit
early agree with themselves only near the last layers; the adaptive controller finds out whether that pays.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from aios_model.errors import ConfigError

if TYPE_CHECKING:
    from aios_model.decoder import DecoderModel


def early_exit(decoder: DecoderModel, *, num_layers: int) -> DecoderModel:
    """A decoder of the first `num_layers` layers of `decoder`; it is for a `DraftModelProposer`, with pages of its own.

    Args:
        decoder: Loaded, whole: with embedding, all layers, norm and head. Its modules are shared.
        num_layers: How many layers to run, at least 1 and fewer than there are.

    Raises:
        ConfigError: `num_layers` is out of range, or the decoder holds a rank's part of a model.
    """
    config = decoder.config
    if decoder.local_config != config:
        raise ConfigError("early exit needs a whole model, and this rank holds a part of one; draft with another model")
    if not 1 <= num_layers < len(config.layers):
        raise ConfigError(
            f"early exit after {num_layers} layers cannot be used: this model has {len(config.layers)}, "
            f"choose 1 to {len(config.layers) - 1}"
        )
    shallow = copy.copy(decoder)
    shallow.__dict__["_modules"] = dict(decoder._modules)  # a copied module shares its table of children
    shallow.layers = nn.ModuleList(list(decoder.layers)[:num_layers])
    shallow.config = shallow.local_config = replace(config, layers=config.layers[:num_layers])
    return shallow
