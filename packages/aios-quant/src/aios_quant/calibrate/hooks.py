"""What each Linear of a layer is fed: the calibration windows on their way through the decoder.

Only the hidden states between two layers are kept, [W, S, D] float32, so that one layer at a time needs to be in
memory. A layer is run over them once per question asked about it, and once more, with its quantised weights, to move
them on: later layers see the inputs that they will see.

W windows, S tokens per window, D model, K columns of a Linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aios_model.cache import causal_attention
from aios_model.config import LayerSpec
from aios_model.decoder import DecoderLayer
from aios_model.layers.linear import Linear
from aios_model.layers.moe import MixtureOfExperts
from aios_model.layers.rope import Rotation


class InputStatistics:
    """Sums over the tokens that a Linear has seen.

    Attributes:
        gram_KK: Σ x xᵀ, float32: with it, the squared output error of a changed weight is Σ (δ gram δᵀ) over its rows.
        total_abs_K: Σ |x|, float32.
        num_tokens: How many there were; an expert sees only those sent to it.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.gram_KK = torch.zeros(columns, columns, device=device)
        self.total_abs_K = torch.zeros(columns, device=device)
        self.num_tokens = 0

    def add(self, x_TK: Tensor) -> None:
        """Counts the inputs of T tokens."""
        x_TK = x_TK.float()
        self.gram_KK.addmm_(x_TK.T, x_TK)
        self.total_abs_K += x_TK.abs().sum(dim=0)
        self.num_tokens += len(x_TK)


class CalibrationRun:
    """The calibration windows in front of a layer.

    Args:
        hidden_WSD: Their hidden states, float32; changed in place by `advance`.
        rotation: Of positions 0 to S - 1.
    """

    def __init__(self, hidden_WSD: Tensor, rotation: Rotation) -> None:
        self.hidden_WSD = hidden_WSD
        self._rotation = rotation

    @torch.inference_mode()
    def collect(self, layer: DecoderLayer, spec: LayerSpec, names: list[str]) -> dict[str, InputStatistics]:
        """Runs `layer` over all windows, as far as needed, and sums up the inputs of its Linears called `names`."""
        linears = {name: layer.get_submodule(name) for name in names}
        statistics: dict[str, InputStatistics] = {}
        for hidden_SD in self.hidden_WSD:
            with _watching(linears, statistics):
                layer(hidden_SD, self._rotation, _WindowAttention(spec))
        return statistics

    @torch.inference_mode()
    def advance(self, layer: DecoderLayer, spec: LayerSpec) -> None:
        """Moves the windows behind `layer`."""
        for hidden_SD in self.hidden_WSD:
            hidden_SD.copy_(layer(hidden_SD, self._rotation, _WindowAttention(spec)))


def quantizable_linears(layer: nn.Module) -> dict[str, Linear]:
    """The Linears of a layer that are quantised, by their path in it: all but a mixture's router."""
    found = {path: module for path, module in layer.named_modules() if isinstance(module, Linear)}
    mixtures = [path for path, module in layer.named_modules() if isinstance(module, MixtureOfExperts)]
    routers = {f"{path}.router" for path in mixtures}
    return {path: module for path, module in found.items() if path not in routers}


class _WindowAttention:
    """A `KVCache` that keeps nothing: each window attends over itself."""

    def __init__(self, spec: LayerSpec) -> None:
        self._spec = spec

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        k_KSH, v_KSH = k_TKH.transpose(0, 1), v_TKH.transpose(0, 1)
        return causal_attention(q_TNH, k_KSH, v_KSH, scale=self._spec.scale, window=self._spec.window)


class _AllSeenError(Exception):
    """Ends a forward pass whose remaining part nobody asked about."""


@contextmanager
def _watching(linears: Mapping[str, nn.Module], statistics: dict[str, InputStatistics]) -> Iterator[None]:
    waiting = set(linears)

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x_TK = inputs[0]
            if name not in statistics:
                statistics[name] = InputStatistics(x_TK.shape[1], x_TK.device)
            statistics[name].add(x_TK)
            waiting.discard(name)
            if not waiting:
                raise _AllSeenError

        return hook

    handles = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    try:
        yield
    except _AllSeenError:
        pass
    finally:
        for handle in handles:
            handle.remove()
