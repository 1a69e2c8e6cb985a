"""How evenly a mixture's tokens fall on its experts, and on the ranks that hold them.

A step of an expert-parallel stage takes as long as the rank with the most tokens: what others wait for it is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aios_parallel.shares import share_experts

if TYPE_CHECKING:
    from aios_model.decoder import DecoderModel


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """Tokens that were sent to each expert.

    Attributes:
        tokens: By layer of the whole model, the tokens of each of its experts.
    """

    tokens: Mapping[int, tuple[int, ...]]

    @classmethod
    def merged(cls, loads: Iterable[ExpertLoad]) -> ExpertLoad:
        """What several ranks have seen: a layer that more than one has counted was counted alike by all."""
        return cls({layer: tokens for load in loads for layer, tokens in load.tokens.items()})

    def by_rank(self, num_ranks: int) -> list[int]:
        """Tokens that each of `num_ranks` ranks computes where experts are dealt out, over all layers."""
        totals = [0] * num_ranks
        for tokens in self.tokens.values():
            for rank, held in enumerate(share_experts(len(tokens), num_ranks)):
                totals[rank] += sum(tokens[held.start : held.stop])
        return totals

    def imbalance(self, num_ranks: int) -> float:
        """How much longer than an even share the busiest rank computes, layer by layer: 1.0 is perfect."""
        busiest = even = 0.0
        for tokens in self.tokens.values():
            shares = [sum(tokens[held.start : held.stop]) for held in share_experts(len(tokens), num_ranks)]
            busiest += max(shares)
            even += sum(shares) / num_ranks
        return busiest / even if even else 1.0


class ExpertCounter:
    """Counts what a decoder's mixtures route, whoever holds their experts.

    Args:
        decoder: Whose layers; those that other stages hold are left out.
    """

    def __init__(self, decoder: DecoderModel) -> None:
        from aios_model.decoder import DecoderLayer
        from aios_model.layers.moe import MixtureOfExperts

        self._tokens: dict[int, list[int]] = {}
        for index, layer in enumerate(decoder.layers):
            if isinstance(layer, DecoderLayer) and isinstance(layer.mlp, MixtureOfExperts):
                self._tokens[index] = totals = [0] * len(layer.mlp.experts)
                layer.mlp.on_routed = _adder(totals)

    def load(self) -> ExpertLoad:
        """What was counted so far."""
        return ExpertLoad({layer: tuple(tokens) for layer, tokens in self._tokens.items()})


def _adder(totals: list[int]) -> Callable[[list[int]], None]:
    def add(counts: list[int]) -> None:
        totals[:] = map(int.__add__, totals, counts)

    return add
