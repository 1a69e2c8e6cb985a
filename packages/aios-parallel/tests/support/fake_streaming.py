"""A device for tests that computes on the CPU and knows every order between copies and reads.

Copies happen as late as they may: when somebody waits for them. Until then the memory they go to holds garbage, as it
may on a GPU. Beside that, each stream knows how far it has seen the others (a vector clock), so that a read that
nothing orders behind the copy is a RaceError, and a copy that nothing orders behind the last read, however they fell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

COMPUTE = "compute"


class RaceError(AssertionError):
    """Two uses of a piece of memory that nothing orders."""


@dataclass
class FakeEvent:
    """What a stream had seen, and how much of its work stood before."""

    clock: dict[str, int]
    stream: FakeStream
    num_pending: int


@dataclass
class FakeStream:
    name: str
    device: FakeDevice
    clock: dict[str, int] = field(default_factory=dict)
    pending: list[Callable[[], object]] = field(default_factory=list)
    num_done: int = 0

    def tick(self) -> int:
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return self.clock[self.name]

    def record(self) -> FakeEvent:
        return FakeEvent(dict(self.clock), self, self.num_done + len(self.pending))

    def wait(self, event: FakeEvent) -> None:
        for name, time in event.clock.items():
            self.clock[name] = max(self.clock.get(name, 0), time)
        event.stream.run_until(event.num_pending)

    def run_until(self, num_done: int) -> None:
        while self.num_done < num_done:
            self.pending.pop(0)()
            self.num_done += 1

    def copy_async(self, to: Tensor, source: Tensor) -> None:
        assert to.shape == source.shape
        assert to.dtype == source.dtype == torch.uint8
        memory = self.device.memory_of(to)
        if memory.read > self.clock.get(COMPUTE, 0):
            raise RaceError("a copy may overwrite weights that a layer still reads")
        memory.copy = (self.name, self.tick())
        to.fill_(255)  # NaN in every floating dtype
        self.pending.append(lambda: to.copy_(source))
        self.device.num_copied_bytes += source.nbytes
        self.device.num_copies += 1


@dataclass
class Memory:
    """A piece of device memory: the copy that filled it, and its last read."""

    tensor: Tensor
    copy: tuple[str, int] | None = None
    read: int = 0


class FakeDevice:
    def __init__(self) -> None:
        self.compute = FakeStream(COMPUTE, self)
        self.num_host_bytes = 0
        self.num_copies = 0
        self.num_copied_bytes = 0
        self.num_streams = 0
        self.memories: list[Memory] = []

    def allocate_host(self, num_bytes: int) -> Tensor:
        self.num_host_bytes += num_bytes
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def allocate(self, num_bytes: int) -> Tensor:
        tensor = torch.full((num_bytes,), 255, dtype=torch.uint8)
        self.memories.append(Memory(tensor))
        return tensor

    def new_stream(self) -> FakeStream:
        self.num_streams += 1
        return FakeStream(f"copies {self.num_streams}", self)

    def current_stream(self) -> FakeStream:
        return self.compute

    def release_unused(self) -> None:
        pass

    def memory_of(self, tensor: Tensor) -> Memory | None:
        at = tensor.untyped_storage().data_ptr()
        return next((each for each in self.memories if each.tensor.untyped_storage().data_ptr() == at), None)

    def watch(self, layer: nn.Module, tensors: list[Tensor]) -> None:
        """Checks what orders the layer's reads of `tensors`, when it begins and when it has ended."""

        def read(*_: object) -> None:
            for tensor in tensors:
                memory = self.memory_of(tensor)
                if memory is None:
                    continue
                stream, time = memory.copy or ("nobody", 1)
                if self.compute.clock.get(stream, 0) < time:
                    raise RaceError("a layer may read weights before they have come")
                memory.read = self.compute.tick()

        layer.register_forward_pre_hook(read)
        layer.register_forward_hook(read, prepend=True)
