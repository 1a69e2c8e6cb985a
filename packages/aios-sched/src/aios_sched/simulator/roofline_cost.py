"""The time of a step from a datasheet: whatever takes longer, reading or computing, plus what the host adds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from aios_model.errors import ConfigError
from aios_model.inspect import count_parameters, num_parameters
from aios_sched.simulator.cost import FEMTOSECONDS, StepShape, progression

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_model.config import ModelConfig
    from aios_model.hardware import Hardware


@dataclass(frozen=True, kw_only=True)
class RooflineCost:
    """A model on a device, or on several that share each layer.

    Of a step, weights are read once, keys and values of all contexts once; every token is multiplied with the active
    weights (the head only where a token is drawn, which is taken to be once per request), and attends to its context.
    Sliding windows are not taken into account: contexts beyond a window are overcharged.

    Attributes:
        config: The model's.
        hardware: The device's limits.
        bytes_per_weight: 2 for BF16, 1 for INT8 and FP8, about 0.56 for 4 bits with group scales.
        kv_dtype_bytes: Bytes of one cached number.
        efficiency: Share of the datasheet's figures that kernels reach.
        host_s: Seconds that the host adds to each step.
        num_devices: Devices that share each layer (tensor parallelism).
        all_reduce_s: Seconds of one of the two sums per layer that several devices need.

    Raises:
        ConfigError: A figure is out of range.
    """

    config: ModelConfig
    hardware: Hardware
    bytes_per_weight: float = 2.0
    kv_dtype_bytes: int = 2
    efficiency: float = 0.7
    host_s: float = 1e-3
    num_devices: int = 1
    all_reduce_s: float = 20e-6

    def __post_init__(self) -> None:
        if not 0 < self.efficiency <= 1:
            raise ConfigError(f"an efficiency of {self.efficiency} cannot be: it is a share, above 0 and at most 1")
        if self.bytes_per_weight <= 0 or self.kv_dtype_bytes < 1 or self.num_devices < 1:
            raise ConfigError("bytes per weight, bytes per cached number and devices must be positive")
        if self.host_s < 0 or self.all_reduce_s < 0:
            raise ConfigError("times that the host and the links add cannot be negative")

    @property
    def host_time(self) -> int:
        """`host_s`."""
        return round(self.host_s * FEMTOSECONDS)

    def step(self, shape: StepShape) -> int:
        """The longer of both, and what is added to it."""
        reading = self._weights_time(shape.num_tokens) + self._context_time * shape.num_context
        computing = self._products_time(shape) + self._pair_time * shape.num_pairs
        return self._fixed_time + max(reading, computing)

    def decode_steps(self, *, num_sequences: int, num_context: int, count: int) -> Sequence[int]:
        """Two arithmetic progressions, and of each two the larger."""
        shape = StepShape(num_sequences, num_sequences, num_context, num_context)
        reading = self._fixed_time + self._weights_time(num_sequences) + self._context_time * num_context
        computing = self._fixed_time + self._products_time(shape) + self._pair_time * num_context
        read = progression(reading, self._context_time * num_sequences, count)
        computed = progression(computing, self._pair_time * num_sequences, count)
        if read[0] >= computed[0] and read[-1] >= computed[-1]:  # both are lines
            return read
        return list(map(max, read, computed))

    def max_blocks(self, *, block_size: int, memory_share: float = 0.9) -> int:
        """Pages that fit beside the weights into `memory_share` of the memory.

        Raises:
            ConfigError: Not even one fits.
        """
        weights = num_parameters(self.config) * self.bytes_per_weight
        free = self.hardware.memory_bytes * self.num_devices * memory_share - weights
        blocks = int(free // (self.config.kv_bytes_per_token(self.kv_dtype_bytes) * block_size))
        if blocks < 1:
            raise ConfigError(
                f"{memory_share:.0%} of {self.num_devices} x {self.hardware.memory_bytes / 1e9:.0f} GB "
                f"({self.hardware.name}) hold no page beside weights of {weights / 1e9:.1f} GB; take more devices "
                "(--tensor-parallel-size) or fewer bits (--weight-bytes)"
            )
        return blocks

    @cached_property
    def _fixed_time(self) -> int:
        sums = 2 * self.config.num_hidden_layers * self.all_reduce_s if self.num_devices > 1 else 0.0
        return self.host_time + round(sums * FEMTOSECONDS)

    @cached_property
    def _context_time(self) -> int:
        return self._reading(self.config.kv_bytes_per_token(self.kv_dtype_bytes))

    @cached_property
    def _pair_time(self) -> int:
        heads = sum(self.config.num_attention_heads * spec.head_dim for spec in self.config.layers)
        return self._computing(4 * heads)

    @cached_property
    def _active(self) -> dict[str, int]:
        return {part.name: part.active for part in count_parameters(self.config)}

    def _weights_time(self, num_tokens: int) -> int:
        """Of a mixture's experts those are read that any token visits."""
        active = sum(self._active.values())
        if "experts" in self._active:
            total = next(part.parameters for part in count_parameters(self.config) if part.name == "experts")
            missed = (1 - self.config.num_experts_per_tok / self.config.num_experts) ** num_tokens
            active += total * (1 - missed) - self._active["experts"]
        return self._reading(active * self.bytes_per_weight)

    def _products_time(self, shape: StepShape) -> int:
        head = self._active.get("head", 0)
        body = sum(self._active.values()) - head
        return self._computing(2 * (body * shape.num_tokens + head * shape.num_sequences))

    def _reading(self, num_bytes: float) -> int:
        return round(num_bytes / (self.hardware.bandwidth * self.efficiency * self.num_devices) * FEMTOSECONDS)

    def _computing(self, operations: float) -> int:
        return round(operations / (self.hardware.flops * self.efficiency * self.num_devices) * FEMTOSECONDS)
