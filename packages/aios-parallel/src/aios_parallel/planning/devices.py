"""What devices can do, as their datasheets say: memory, bytes and operations per second, and the links between them.

Memory, memory bandwidth and the 16-bit rate of devices that `aios-model inspect` knows come from its table; the rest:

- NVIDIA's datasheets of H100 (SXM), H200, A100 (SXM), HGX B200, L40S, L4, T4 and the whitepapers of GeForce RTX 4090
  and 3090; AMD's datasheet of the Instinct MI300X. Rates are dense ones: half of those stated with sparsity.
- Links, one way: NVLink 3, 4 and 5 have 300, 450 and 900 GB/s per GPU (datasheets add both ways up); the MI300X has
  seven Infinity Fabric links of 64 GB/s; PCIe 3, 4 and 5 with 16 lanes 16, 32 and 64 GB/s; Ethernet and InfiniBand an
  eighth of their line rate in bits.
- Latencies are in no datasheet. Those here are the order of magnitude of one small message between two ranks, software
  included; shared memory is fitted to measurements of ours (an all-reduce of 8 KiB between two processes in 4 µs, of
  64 KiB in 14 µs). `--collectives` takes measured times instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from aios_model.errors import ConfigError
from aios_model.hardware import DATASHEETS

RateName = Literal["float", "int8", "fp8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What connects two devices.

    Attributes:
        name: What it is called.
        bandwidth: Bytes per second that a device sends while it receives as much.
        latency: Seconds that a tiny message takes from one rank to another.
    """

    name: str
    bandwidth: float
    latency: float

    def __post_init__(self) -> None:
        if not (self.bandwidth > 0 and self.latency >= 0):
            raise ConfigError(
                f"the link {self.name} has a bandwidth of {self.bandwidth:g} bytes/s and a latency of "
                f"{self.latency:g} s; the first must be above 0, the second 0 or more"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What one rank computes with.

    Attributes:
        name: What it is called.
        kind: `gpu`, or `cpu` for a process on a processor.
        memory_bytes: Its memory.
        bandwidth: Memory reads, bytes per second.
        flops: Dense operations per second by kind of operands: `float` (16 bits; float32 on a processor), `int8`,
            `fp8`. One that is missing computes at the rate of `float`.
        links: What may connect it with its neighbours in one host, the best first.
        source: Where the figures come from.
    """

    name: str
    kind: Literal["gpu", "cpu"] = "gpu"
    memory_bytes: float
    bandwidth: float
    flops: Mapping[RateName, float]
    links: tuple[Link, ...]
    source: str

    def __post_init__(self) -> None:
        for what, value in (("memory", self.memory_bytes), ("bandwidth", self.bandwidth), *self.flops.items()):
            if not value > 0:
                raise ConfigError(f"the {what} of device {self.name} is {value:g}; it must be above 0")

    def rate(self, operands: RateName) -> float:
        """Operations per second with such operands."""
        return self.flops.get(operands, self.flops["float"])

    def overridden(self, *, memory_bytes: float | None, bandwidth: float | None, flops: float | None) -> Device:
        """With one's own figures in place of the datasheet's; `flops` scales all rates alike."""
        if memory_bytes is None and bandwidth is None and flops is None:
            return self
        scale = 1.0 if flops is None else flops / self.flops["float"]
        return replace(
            self,
            memory_bytes=self.memory_bytes if memory_bytes is None else memory_bytes,
            bandwidth=self.bandwidth if bandwidth is None else bandwidth,
            flops={operands: rate * scale for operands, rate in self.flops.items()},
            source=f"{self.source}, changed by options",
        )


def find_device(name: str) -> Device:
    """The device of that name, in any case, with or without its dashes; ConfigError with the known ones."""
    wanted = _squeezed(name)
    for device in DEVICES:
        if wanted in (_squeezed(device.name), *_ALIASES.get(device.name, ())):
            return device
    known = ", ".join(device.name for device in DEVICES)
    raise ConfigError(
        f"device type {name!r} is unknown; use cpu, which measures this machine, or one of {known}; for another one "
        "take the nearest and set --memory, --bandwidth, --flops, --link-bandwidth and --link-latency"
    )


def find_link(device: Device, name: str) -> Link:
    """What connects devices of one host: `auto` is the device's best, other names must be there for it."""
    if name == "auto":
        return device.links[0]
    if name in NETWORKS:
        return NETWORKS[name]
    for link in device.links:
        if link.name == name:
            return link
    choices = ", ".join(["auto", *(link.name for link in device.links), *NETWORKS])
    raise ConfigError(f"--interconnect {name} does not exist for {device.name}; choose one of {choices}")


def find_network(name: str) -> Link:
    """What connects hosts; ConfigError with the known ones."""
    if name not in NETWORKS:
        raise ConfigError(f"--network {name!r} is unknown; choose one of {', '.join(NETWORKS)}")
    return NETWORKS[name]


def _network(name: str, gigabits: float, latency: float) -> Link:
    return Link(name=name, bandwidth=gigabits * 1e9 / 8, latency=latency)


NETWORKS: dict[str, Link] = {
    link.name: link
    for link in (
        _network("ethernet", 100, 30e-6),
        _network("ethernet-10", 10, 40e-6),
        _network("ethernet-25", 25, 35e-6),
        _network("ethernet-400", 400, 25e-6),
        _network("infiniband", 400, 6e-6),
        _network("infiniband-200", 200, 6e-6),
    )
}
"""By name: 100 Gbit/s Ethernet, 400 Gbit/s InfiniBand (NDR), and others with their line rate in the name."""

SHARED_MEMORY = Link(name="shared-memory", bandwidth=5.7e9, latency=1.2e-6)
"""Between processes of one host."""

_PCIE_3 = Link(name="pcie", bandwidth=16e9, latency=6e-6)
_PCIE_4 = Link(name="pcie", bandwidth=32e9, latency=6e-6)
_PCIE_5 = Link(name="pcie", bandwidth=64e9, latency=6e-6)


def _nvlink(bandwidth: float) -> Link:
    return Link(name="nvlink", bandwidth=bandwidth, latency=3e-6)


def _listed(name: str, listed: str, rates: Mapping[RateName, float], *links: Link) -> Device:
    """A device whose memory, bandwidth and 16-bit rate `aios-model inspect` knows as `listed`."""
    sheet = DATASHEETS[listed]
    return Device(
        name=name,
        memory_bytes=sheet.memory_bytes,
        bandwidth=sheet.bandwidth,
        flops={"float": sheet.flops, **rates},
        links=links,
        source=sheet.source,
    )


DEVICES: tuple[Device, ...] = (
    Device(
        name="b200",
        memory_bytes=180e9,
        bandwidth=8e12,
        flops={"float": 2250e12, "int8": 4500e12, "fp8": 4500e12},
        links=(_nvlink(900e9), _PCIE_5),
        source="datasheet, HGX",
    ),
    _listed("h200", "h200", {"int8": 1979e12, "fp8": 1979e12}, _nvlink(450e9), _PCIE_5),
    _listed("h100", "h100", {"int8": 1979e12, "fp8": 1979e12}, _nvlink(450e9), _PCIE_5),
    Device(
        name="mi300x",
        memory_bytes=192e9,
        bandwidth=5.3e12,
        flops={"float": 1307.4e12, "int8": 2614.9e12, "fp8": 2614.9e12},
        links=(Link(name="infinity-fabric", bandwidth=448e9, latency=4e-6), _PCIE_5),
        source="datasheet",
    ),
    _listed("a100-80", "a100", {"int8": 624e12}, _nvlink(300e9), _PCIE_4),
    Device(
        name="a100-40",
        memory_bytes=40e9,
        bandwidth=1.555e12,
        flops={"float": 312e12, "int8": 624e12},
        links=(_nvlink(300e9), _PCIE_4),
        source="datasheet, SXM 40 GB",
    ),
    _listed("l40s", "l40s", {"int8": 733e12, "fp8": 733e12}, _PCIE_4),
    _listed("l4", "l4", {"int8": 242e12, "fp8": 242e12}, _PCIE_4),
    _listed("t4", "t4", {"int8": 130e12}, _PCIE_3),
    _listed("rtx-4090", "rtx4090", {"int8": 660e12, "fp8": 330e12}, _PCIE_4),
    _listed("rtx-3090", "rtx3090", {"int8": 284e12}, _PCIE_4),
)
"""Known devices."""

_ALIASES = {"a100-80": ("a100",), "rtx-4090": ("4090",), "rtx-3090": ("3090",)}


def _squeezed(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")
