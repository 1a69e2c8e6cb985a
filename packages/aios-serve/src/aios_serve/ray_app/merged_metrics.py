"""The metrics of several replicas as those of one server: the label `engine` tells them apart, as in vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from prometheus_client.samples import Sample


def merge_expositions(expositions: Sequence[tuple[int, str]], accept: str) -> tuple[bytes, str]:
    """What a scraper gets, and its content type.

    Args:
        expositions: Rank of each replica, with its metrics in the text format.
        accept: The scraper's Accept header.
    """
    registry = CollectorRegistry()
    registry.register(_Merged(expositions))
    encoder, content_type = choose_encoder(accept)
    return encoder(registry), content_type


class _Merged(Collector):
    """Families of the same name become one family."""

    def __init__(self, expositions: Sequence[tuple[int, str]]) -> None:
        self._expositions = expositions

    def collect(self) -> Iterator[Metric]:
        merged: dict[str, Metric] = {}
        for rank, text in self._expositions:
            for family in text_string_to_metric_families(text):
                whole = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                whole.samples.extend(_labelled(family.samples, rank))
        yield from merged.values()


def _labelled(samples: Iterable[Sample], rank: int) -> Iterator[Sample]:
    for sample in samples:
        yield sample._replace(labels={**sample.labels, "engine": str(rank)})
