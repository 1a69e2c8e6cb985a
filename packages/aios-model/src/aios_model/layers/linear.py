"""Matrix multiplication with weights: where a decoder spends its time.

`Linear` is the seam at which quantisation, sharding and adapters attach, so it is ours rather than `nn.Linear`. It may
consist of several named parts stacked along the output (q, k and v; gate and up): one wide product is quicker than
three narrow ones, and each part still knows its own rows.

On a CPU the weight is repacked once, after loading, into the blocked layout in which oneDNN reads it. Measured on two
Zen 4 cores over all linears of SmolLM2-135M in float32: 60 ms a token unpacked, 32 ms packed; at 16 tokens 108 and 31.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aios_model.weights.sharded import LinearShard
from aios_model.weights.source import TensorEntry

# The number of rows oneDNN lays the packed weight out for; this one serves 1 to 64 rows best in our measurements.
_PACKED_ROWS = 64


class Linear(nn.Module):
    """y = x Wᵀ + b for x [T, in_features], where W's rows are the stacked parts.

    Built empty (its weight is on the meta device) and filled by `load`.

    Args:
        in_features: Width of the input.
        parts: Output width by part name, in stacking order; a single unnamed part for plain layers.
        bias: Whether a bias vector is added.

    Attributes:
        shard: Which part of the checkpoint's weight this is, where a rank holds only some of it; else None.
    """

    def __init__(self, in_features: int, parts: int | Mapping[str, int], *, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.parts = {"": parts} if isinstance(parts, int) else dict(parts)
        self.out_features = sum(self.parts.values())
        self.has_bias = bias
        self.shard: LinearShard | None = None
        self.weight: Tensor = torch.empty(self.out_features, in_features, device="meta")
        self.bias: Tensor | None = None
        self._packed: Tensor | None = None

    def take_shard(self, shard: LinearShard, *, bias: bool = True) -> None:
        """Makes an empty layer hold a part of itself only: what one rank of a group computes.

        Args:
            shard: Which outputs and inputs.
            bias: Whether the rank adds the bias, if there is one: of ranks whose outputs are summed, one does.
        """
        assert self.weight.is_meta, "a layer is cut before it is loaded"
        self.shard = shard
        self.parts = {part: shard.rows[part].size if part in shard.rows else n for part, n in self.parts.items()}
        self.out_features = sum(self.parts.values())
        self.in_features = self.in_features if shard.columns is None else shard.columns.size
        self.has_bias = self.has_bias and bias
        self.weight = torch.empty(self.out_features, self.in_features, device="meta")

    def load(
        self,
        weights: Mapping[str, TensorEntry],
        biases: Mapping[str, TensorEntry],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Fills the layer from one entry per part and packs it for the device."""
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=device)
        _read_parts(weight, self.parts, weights)
        if self.has_bias:
            self.bias = torch.empty(self.out_features, dtype=dtype, device=device)
            _read_parts(self.bias, self.parts, biases)
        self.set_weight(weight)

    def set_weight(self, weight: Tensor) -> None:
        """Takes `weight` [out_features, in_features], packed if the device and dtype gain from it."""
        self._packed = _pack(weight)
        self.weight = weight if self._packed is None else torch.empty_like(weight, device="meta")

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor that the layer computes with by what `change` makes of it, always in the same order.

        For whoever moves weights: `change` keeps dtype and shape. What was packed for a CPU is laid out plainly.
        """
        if self._packed is not None:
            self.weight, self._packed = self._packed.to_dense(), None
        self.weight = change(self.weight)
        if self.bias is not None:
            self.bias = change(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in_features] -> [T, out_features]."""
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def dense_weight(self) -> Tensor:
        """The weight [out_features, in_features] in its plain layout; a copy if the layer is packed."""
        return self.weight if self._packed is None else self._packed.to_dense()

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight and the bias."""
        return (self.weight.numel() + (self.out_features if self.has_bias else 0)) * self.weight.element_size()

    def extra_repr(self) -> str:
        """What print(model) shows of the layer."""
        parts = ", ".join(f"{name or 'out'}={width}" for name, width in self.parts.items())
        return f"in={self.in_features}, {parts}, bias={self.has_bias}, packed={self._packed is not None}"


def _read_parts(out: Tensor, parts: Mapping[str, int], entries: Mapping[str, TensorEntry]) -> None:
    start = 0
    for name, width in parts.items():
        entries[name].read_into(out[start : start + width])
        entries[name].release()
        start += width


def _pack(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's layout, or None where there is nothing to gain or no such operator in this torch."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS)
