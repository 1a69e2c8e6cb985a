"""Keeps some layers' weights off the device while a model is loaded, and streams them in afterwards.

    offload = WeightOffload(num_bytes, streaming_device(device), dtype=dtype)
    decoder = load_decoder(files, transforms=[..., offload.choose], on_loaded=offload.take)
    offloaded = offload.install(decoder)

A matrix passes over the device when it is read, since it is packed there as the device wants it, and leaves at once:
beside the resident layers there is never more than one on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from aios_model.decoder import DecoderModel
from aios_model.errors import ConfigError
from aios_model.layers.linear import Linear
from aios_parallel.offload.choice import choose_layers
from aios_parallel.offload.device import StreamingDevice
from aios_parallel.offload.streaming import NUM_BUFFERS, HostLayer, WeightStream, linears_of, tensors_of

_FEWEST_BITS = 4
"""Of a packed weight: how many it will have is known once it is read, and too little on the device is the safe side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadedWeights:
    """What was moved.

    Attributes:
        layers: Indices into `DecoderModel.layers`.
        num_host_bytes: Weights in host memory, and not on the device.
        num_staging_bytes: Device memory of the buffers through which they come.
    """

    layers: tuple[int, ...]
    num_host_bytes: int
    num_staging_bytes: int


class WeightOffload:
    """One model's weights on their way.

    Args:
        num_bytes: What is to stay in host memory at least: whole layers are moved until they have so much.
        device: Where the model computes.
        dtype: Of weights that are not packed.
        num_buffers: Layers that may be on the device at once.
    """

    def __init__(
        self, num_bytes: int, device: StreamingDevice, *, dtype: torch.dtype, num_buffers: int = NUM_BUFFERS
    ) -> None:
        self._num_bytes = num_bytes
        self._device = device
        self._dtype = dtype
        self._num_buffers = num_buffers
        self._chosen: set[Linear] = set()

    def choose(self, decoder: DecoderModel) -> None:
        """A `ModelTransform`, to be the last one: decides by what is known before weights are read.

        Raises:
            ConfigError: As `install`, where it is known before weights are read.
        """
        layers = _layers_of(decoder)
        sizes = [sum(self._expected_bytes(linear) for linear in linears_of(layer)) for _, layer in layers]
        is_exact = all(type(linear) is Linear for _, layer in layers for linear in linears_of(layer))
        for place in self._decide(sizes) if is_exact else choose_layers(sizes, self._num_bytes):
            self._chosen.update(linears_of(layers[place][1]))

    def take(self, module: nn.Module) -> None:
        """Told of every module that has its weights: moves them to host memory if they are to be there."""
        if module in self._chosen:
            assert isinstance(module, Linear), "only these are chosen"
            module.map_tensors(lambda tensor: tensor.cpu())

    def install(self, decoder: DecoderModel) -> OffloadedWeights:
        """Decides anew by what the weights really take, and has steps stream in what is not on the device.

        Raises:
            ConfigError: The decoder's layers have less than was asked for, or nothing would be gained: the buffers take
                as much as the layers that would be moved.
        """
        layers = _layers_of(decoder)
        sizes = [sum(tensor.nbytes for tensor in tensors_of(layer)) for _, layer in layers]
        places = self._decide(sizes)
        for place, (_, layer) in enumerate(layers):
            if place not in places:
                self._bring_back(layer, decoder.device)
        hosted = [HostLayer(layers[place][1], self._device) for place in places]
        self._device.release_unused()
        stream = WeightStream(hosted, self._device, num_buffers=self._num_buffers)
        return OffloadedWeights(
            layers=tuple(layers[place][0] for place in places),
            num_host_bytes=sum(layer.num_bytes for layer in hosted),
            num_staging_bytes=stream.num_staging_bytes,
        )

    def _expected_bytes(self, linear: Linear) -> int:
        num_bias = linear.out_features if linear.has_bias else 0
        if type(linear) is Linear:
            return (linear.out_features * linear.in_features + num_bias) * self._dtype.itemsize
        return linear.out_features * linear.in_features * _FEWEST_BITS // 8 + num_bias * self._dtype.itemsize

    def _decide(self, sizes: list[int]) -> list[int]:
        if sum(sizes) < self._num_bytes:
            raise ConfigError(
                f"cpu_offload_gb={_gib(self._num_bytes)} cannot be used: all layers held here have "
                f"{_gib(sum(sizes))} GiB; ask for less"
            )
        places = choose_layers(sizes, self._num_bytes)
        staging = max(sizes[place] for place in places) * min(self._num_buffers, len(places))
        if sum(sizes[place] for place in places) <= staging:
            raise ConfigError(
                f"cpu_offload_gb={_gib(self._num_bytes)} would free nothing: the buffers through which layers come "
                f"take {_gib(staging)} GiB of the device, for the layer in use and the next; ask for more than "
                f"{_gib(self._num_buffers * max(sizes))}, or leave it out"
            )
        return places

    def _bring_back(self, layer: nn.Module, device: torch.device) -> None:
        for linear in linears_of(layer):
            if linear in self._chosen:
                linear.map_tensors(lambda tensor: tensor.to(device))


def _layers_of(decoder: DecoderModel) -> list[tuple[int, nn.Module]]:
    """The layers that are here; those of other stages of a pipeline have no weights."""
    return [(index, layer) for index, layer in enumerate(decoder.layers) if linears_of(layer)]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g}"
