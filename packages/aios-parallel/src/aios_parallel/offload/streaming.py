"""Copies the weights of offloaded layers to the device, each in time for its layer.

A few buffers take turns: offloaded layer i always computes from buffer i mod B, so its tensors are views that never
move. On a stream of their own, copies follow this order:

    copy i+B   starts when layer i has computed            (the buffer is not read any more)
    layer i    starts when copy i is done                  (the buffer holds its weights)

so up to B copies are under way while other layers compute. A step ends with the copies of the next one's first layers.
Where a buffer serves one layer only, it is copied once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

from torch import Tensor, nn

from aios_model.layers.linear import Linear
from aios_parallel.offload.device import Event, StreamingDevice

NUM_BUFFERS = 2
_ALIGNMENT = 256
"""Bytes at whose multiples a tensor begins: what torch's own allocator gives, and kernels count on."""


class HostLayer:
    """One layer whose weights are in host memory, side by side, so that a single copy brings them over.

    Args:
        layer: The layer; its Linears' tensors may be anywhere.
        device: What allocates the memory.
    """

    def __init__(self, layer: nn.Module, device: StreamingDevice) -> None:
        self.module = layer
        self._linears = linears_of(layer)
        tensors = tensors_of(layer)
        self._layouts = [(tensor.dtype, tensor.shape) for tensor in tensors]
        self.num_bytes = sum(tensor.nbytes for tensor in tensors)
        self.memory = device.allocate_host(sum(_padded(tensor.nbytes) for tensor in tensors))
        for view, tensor in zip(self._views(self.memory), tensors, strict=True):
            view.copy_(tensor)
        self.compute_from(self.memory)

    def compute_from(self, memory: Tensor) -> None:
        """Has the layer read its weights from `memory`, bytes laid out as those of `self.memory`."""
        views = iter(self._views(memory))
        for linear in self._linears:
            linear.map_tensors(lambda _: next(views))

    def _views(self, memory: Tensor) -> list[Tensor]:
        views, start = [], 0
        for dtype, shape in self._layouts:
            num_bytes = prod(shape) * dtype.itemsize
            views.append(memory[start : start + num_bytes].view(dtype).view(shape))
            start += _padded(num_bytes)
        return views


class WeightStream:
    """Copies layers to the device whenever a step comes to them.

    Steps may follow each other without waiting, and a step may break off anywhere: the next one finds its weights.

    Args:
        layers: Those in host memory, in the order in which they compute.
        device: Where they compute.
        num_buffers: How many of them may be on the device at once.
    """

    def __init__(self, layers: Sequence[HostLayer], device: StreamingDevice, *, num_buffers: int = NUM_BUFFERS) -> None:
        self._layers = layers
        self._device = device
        self._copies = device.new_stream()
        size = max(layer.memory.nbytes for layer in layers)
        memories = [device.allocate(size) for _ in range(min(num_buffers, len(layers)))]
        # What was in this memory before may still be read by work that the device has not come to.
        unread = device.current_stream().record()
        self._buffers = [_Buffer(memory=memory, released=unread) for memory in memories]
        for index, layer in enumerate(layers):
            layer.compute_from(self._buffer_of(index).memory)
            layer.module.register_forward_pre_hook(partial(self._before, index))
            layer.module.register_forward_hook(partial(self._after, index))
        for index in range(len(self._buffers)):
            self._start_copy(index)

    @property
    def num_staging_bytes(self) -> int:
        """Device memory of the buffers."""
        return sum(buffer.memory.nbytes for buffer in self._buffers)

    def _before(self, index: int, *_: object) -> None:
        buffer, compute = self._buffer_of(index), self._device.current_stream()
        if buffer.holds != index:  # an earlier step broke off: whatever it still computes comes first
            buffer.released = compute.record()
            self._start_copy(index)
        assert buffer.copied is not None, "a buffer that holds something was copied to"
        compute.wait(buffer.copied)

    def _after(self, index: int, *_: object) -> None:
        self._buffer_of(index).released = self._device.current_stream().record()
        following = index + len(self._buffers)
        self._start_copy(following if following < len(self._layers) else index % len(self._buffers))

    def _start_copy(self, index: int) -> None:
        buffer, source = self._buffer_of(index), self._layers[index].memory
        if buffer.holds == index:
            return
        self._copies.wait(buffer.released)
        self._copies.copy_async(buffer.memory[: source.nbytes], source)
        buffer.holds, buffer.copied = index, self._copies.record()

    def _buffer_of(self, index: int) -> _Buffer:
        return self._buffers[index % len(self._buffers)]


def linears_of(layer: nn.Module) -> list[Linear]:
    """The matrices of a layer: all of its weights but for norms, which are a few thousand numbers."""
    return [module for module in layer.modules() if isinstance(module, Linear)]


def tensors_of(layer: nn.Module) -> list[Tensor]:
    """What the Linears of a layer compute with, in a fixed order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    for linear in linears_of(layer):
        linear.map_tensors(note)
    return found


@dataclass(slots=True, kw_only=True)
class _Buffer:
    """Device memory for one layer.

    Attributes:
        memory: Bytes.
        released: Behind the last work that read it.
        holds: The layer whose weights are in it, or on their way.
        copied: Behind the copy of these.
    """

    memory: Tensor
    released: Event
    holds: int | None = None
    copied: Event | None = None


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
