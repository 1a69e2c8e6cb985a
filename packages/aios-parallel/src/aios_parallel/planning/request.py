"""From what a user typed to the hardware, the schemes and the work that are planned for. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from aios_model.config import ModelConfig
from aios_model.errors import ConfigError
from aios_model.weights.hub import ModelFiles
from aios_parallel.planning.collectives import CollectiveTimes, Where, read_collectives
from aios_parallel.planning.devices import Device, Link, find_device, find_link, find_network
from aios_parallel.planning.hardware import Cluster, KVCacheDType, Workload, check_context
from aios_parallel.planning.quantities import parse_bandwidth, parse_bytes, parse_flops, parse_seconds
from aios_parallel.planning.this_machine import given_processor, measure_processor
from aios_parallel.planning.weights import WeightScheme, default_kv_cache_dtype, find_scheme, stored_scheme

_AUTO_SCHEMES = ("none", "int8", "int4")
_DEFAULT_CONTEXT, _DEFAULT_PROMPT = 8192, 2048
_STEP_TOKENS = {"cpu": 256, "gpu": 2048}  # as aios-serve sets --max-num-batched-tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareRequest:
    """Options about hardware, as typed; None or `auto` leaves them to the datasheet.

    Attributes:
        device_type: `cpu`, or a name of `devices.DEVICES`.
        num_devices: In all hosts together.
        num_hosts: Hosts.
        memory: Of a device.
        bandwidth: Of its memory.
        flops: With 16-bit numbers.
        interconnect: Within a host.
        network: Between hosts.
        link_bandwidth: Of the interconnect.
        link_latency: Of the interconnect.
        network_bandwidth: Of the network.
        network_latency: Of the network.
        collectives: File of measured times.
    """

    device_type: str
    num_devices: int
    num_hosts: int
    memory: str | None = None
    bandwidth: str | None = None
    flops: str | None = None
    interconnect: str = "auto"
    network: str = "ethernet"
    link_bandwidth: str | None = None
    link_latency: str | None = None
    network_bandwidth: str | None = None
    network_latency: str | None = None
    collectives: Path | None = None

    def cluster(self) -> Cluster:
        """The hardware; ConfigError naming the option that is wrong. A processor is measured unless all is given."""
        placeholder = find_network("ethernet")
        checked = Cluster(
            device=find_device("h100"),
            num_devices=self.num_devices,
            num_hosts=self.num_hosts,
            times=CollectiveTimes(links={"host": placeholder, "network": placeholder}),
        )
        device = self._device(checked.devices_per_host)
        host = _changed(
            find_link(device, self.interconnect),
            ("--link-bandwidth", self.link_bandwidth),
            ("--link-latency", self.link_latency),
        )
        network = _changed(
            find_network(self.network),
            ("--network-bandwidth", self.network_bandwidth),
            ("--network-latency", self.network_latency),
        )
        links: dict[Where, Link] = {"host": host, "network": network}
        times = CollectiveTimes(links=links)
        if self.collectives is not None:
            times = read_collectives(self.collectives, links)
        return replace(checked, device=device, times=times)

    def _device(self, devices_per_host: int) -> Device:
        memory = None if self.memory is None else parse_bytes(self.memory, "--memory")
        bandwidth = None if self.bandwidth is None else parse_bandwidth(self.bandwidth, "--bandwidth")
        flops = None if self.flops is None else parse_flops(self.flops, "--flops")
        if self.device_type.lower() != "cpu":
            device = find_device(self.device_type)
        elif memory is not None and bandwidth is not None and flops is not None:
            return given_processor(memory_bytes=memory, bandwidth=bandwidth, flops=flops)
        else:
            device = measure_processor(devices_per_host=devices_per_host)
        return device.overridden(memory_bytes=memory, bandwidth=bandwidth, flops=flops)


def choose_schemes(text: str, config: ModelConfig, device: Device, files: ModelFiles) -> list[WeightScheme]:
    """The schemes of `--quantization`: names with commas between them, or `auto`.

    `auto` leaves a packed checkpoint as it is stored, and otherwise tries none, int8, and int4 where its groups fit.
    """
    if text != "auto":
        return [find_scheme(name.strip(), config, device, files) for name in dict.fromkeys(text.split(","))]
    stored = stored_scheme(config, device, files)
    if stored is not None:
        return [stored]
    schemes = []
    for name in _AUTO_SCHEMES:
        try:
            schemes.append(find_scheme(name, config, device))
        except ConfigError:  # groups of int4 do not divide the rows
            continue
    return schemes


def make_workload(
    config: ModelConfig,
    device: Device,
    *,
    batch: int,
    context: int | None,
    prompt: int | None,
    max_num_batched_tokens: int | None,
    kv_cache_dtype: KVCacheDType | Literal["auto"],
    utilization: float,
) -> Workload:
    """The work, with what was not said filled in; ConfigError if the model or the device cannot do it."""
    if context is None:
        context = min(_DEFAULT_CONTEXT, config.max_context_length)
    check_context(config, context)
    return Workload(
        batch=batch,
        context=context,
        prompt=min(_DEFAULT_PROMPT, context) if prompt is None else prompt,
        max_num_batched_tokens=max_num_batched_tokens or _STEP_TOKENS[device.kind],
        kv_cache_dtype=default_kv_cache_dtype(config, device) if kv_cache_dtype == "auto" else kv_cache_dtype,
        utilization=utilization,
    )


def _changed(link: Link, bandwidth: tuple[str, str | None], latency: tuple[str, str | None]) -> Link:
    """`link` with figures of one's own, given as option and text."""
    if bandwidth[1] is not None:
        link = replace(link, bandwidth=parse_bandwidth(bandwidth[1], bandwidth[0]))
    if latency[1] is not None:
        link = replace(link, latency=parse_seconds(latency[1], latency[0]))
    return link
