"""The hardware and the work that a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aios_model.config import ModelConfig
from aios_model.errors import ConfigError
from aios_parallel.planning.collectives import CollectiveTimes, Where
from aios_parallel.planning.devices import Device

KVCacheDType = Literal["float32", "bfloat16", "int8", "fp8"]
_KV_BYTES: dict[KVCacheDType, int] = {"float32": 4, "bfloat16": 2, "int8": 1, "fp8": 1}
_INT8_SCALE_BYTES = 4  # float32, one per token and head, for keys and for values
_PAGE_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal devices in equal hosts.

    Attributes:
        device: What each is.
        num_devices: How many in all hosts together.
        num_hosts: Hosts.
        times: What collectives take.
    """

    device: Device
    num_devices: int
    num_hosts: int
    times: CollectiveTimes

    def __post_init__(self) -> None:
        if self.num_devices < 1 or self.num_hosts < 1 or self.num_devices % self.num_hosts:
            raise ConfigError(
                f"{self.num_devices} devices cannot be spread evenly over {self.num_hosts} hosts; "
                "--devices counts those of all hosts and must be a multiple of --hosts"
            )

    @property
    def devices_per_host(self) -> int:
        """Devices in one host."""
        return self.num_devices // self.num_hosts

    def between(self, first: int, last: int) -> Where:
        """What connects two devices, numbered host after host."""
        return "host" if first // self.devices_per_host == last // self.devices_per_host else "network"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the model is to do.

    Attributes:
        batch: Sequences that are decoded together, over all replicas.
        context: Tokens of each in the KV cache.
        prompt: Tokens of the prompt whose prefill is timed.
        max_num_batched_tokens: Tokens per step at most: prompts are read in chunks of so many.
        kv_cache_dtype: Numbers in the KV pages.
        utilization: Share of a device's memory to use; the rest is the reserve.
    """

    batch: int
    context: int
    prompt: int
    max_num_batched_tokens: int
    kv_cache_dtype: KVCacheDType
    utilization: float = 0.9

    def __post_init__(self) -> None:
        for option, value in (
            ("batch", self.batch),
            ("context", self.context),
            ("prompt", self.prompt),
            ("max-num-batched-tokens", self.max_num_batched_tokens),
        ):
            if value < 1:
                raise ConfigError(f"--{option} is {value}; it must be 1 or more")
        if self.prompt > self.context:
            raise ConfigError(f"--prompt {self.prompt} is longer than --context {self.context}, which has to hold it")
        if not 0 < self.utilization <= 1:
            raise ConfigError(f"--device-memory-utilization is {self.utilization:g}; it must be above 0, at most 1")

    def kv_bytes(self, *, head_dim: int) -> int:
        """Bytes of one token's key and value in one head of one layer."""
        scale = _INT8_SCALE_BYTES if self.kv_cache_dtype == "int8" else 0
        return 2 * (head_dim * _KV_BYTES[self.kv_cache_dtype] + scale)

    @property
    def page_tokens(self) -> int:
        """Tokens of the pages that one sequence fills."""
        return -(-self.context // _PAGE_TOKENS) * _PAGE_TOKENS


def check_context(config: ModelConfig, context: int) -> None:
    """Raises ConfigError if the model cannot address so many tokens."""
    if context > config.max_context_length:
        raise ConfigError(
            f"--context {context} exceeds the {config.max_context_length} tokens this model supports; "
            f"ask for {config.max_context_length} or less"
        )
