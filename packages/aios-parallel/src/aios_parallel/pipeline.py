"""Pipeline parallelism: every rank holds some neighbouring layers and hands hidden states on (GPipe, arXiv 1811.06965).

A decoder whose other layers are left out runs as it is: a layer that is elsewhere passes on what it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from aios_model.decoder import DecoderLayer, DecoderModel
from aios_model.model import ModelTransform
from aios_parallel.mesh import Place


class Elsewhere(nn.Module):
    """Stands where another stage's layer was."""

    def forward(self, x: Tensor, *_rest: object) -> Tensor:
        """`x` as it is."""
        return x


def split_stages(place: Place, stages: Sequence[range]) -> ModelTransform:
    """A transform that leaves of a decoder the stage of the rank at `place`.

    Args:
        place: Of the caller.
        stages: The layers of each stage, as `plan_stages` gives them.
    """
    return _Stage(place=place, layers=stages[place.stage])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    place: Place
    layers: range

    def __call__(self, decoder: DecoderModel) -> None:
        for index, layer in enumerate(decoder.layers):
            assert isinstance(layer, DecoderLayer)
            if index in self.layers:
                layer.attention.layer = index - self.layers.start  # the stage's cache knows its own layers only
            else:
                decoder.layers[index] = Elsewhere()
        local = decoder.local_config
        decoder.local_config = replace(local, layers=local.layers[self.layers.start : self.layers.stop])
        if not self.place.is_first_stage:
            setattr(decoder, "embedding", Elsewhere())  # noqa: B010 (its declared type is the module it replaces)
        if not self.place.is_last_stage:
            setattr(decoder, "norm", Elsewhere())  # noqa: B010
            setattr(decoder, "head", Elsewhere())  # noqa: B010
