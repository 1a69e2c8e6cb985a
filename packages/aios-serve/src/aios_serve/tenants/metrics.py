"""Figures of tenants for Prometheus: one label, the tenant's name, of which there are as many as the file has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.utils import floatToGoString

from aios_serve.tenants.account import FIRST_TOKEN_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from prometheus_client.metrics_core import Metric

    from aios_serve.tenants.account import TenantAccount

_COUNTERS: dict[str, tuple[str, Callable[[TenantAccount], float]]] = {
    "prompt_tokens": ("Prompt tokens of requests that got an answer.", lambda account: account.num_prompt_tokens),
    "cached_tokens": ("Of those, tokens found in the prefix cache.", lambda account: account.num_cached_tokens),
    "generation_tokens": ("Tokens generated.", lambda account: account.num_generation_tokens),
}
_BY_LABEL: dict[str, tuple[str, str, Callable[[TenantAccount], dict[str, int]]]] = {
    "requests": ("Requests by how they ended.", "outcome", lambda account: account.outcomes),
    "throttled": ("Requests answered with 429, by limit.", "limit", lambda account: account.throttled),
}


def tenant_families(accounts: Sequence[TenantAccount]) -> Iterator[Metric]:
    """`aios_tenant_*` of these tenants, as they are now; nothing if there are none."""
    if not accounts:
        return
    for name, (text, value) in _COUNTERS.items():
        counter = CounterMetricFamily(f"aios_tenant_{name}", text, labels=("tenant",))
        for account in accounts:
            counter.add_metric((account.tenant.name,), value(account))
        yield counter
    for name, (text, label, values) in _BY_LABEL.items():
        counter = CounterMetricFamily(f"aios_tenant_{name}", text, labels=("tenant", label))
        for account in accounts:
            for key, count in values(account).items():
                counter.add_metric((account.tenant.name, key), count)
        yield counter
    yield _running(accounts)
    yield _first_tokens(accounts)


def _running(accounts: Sequence[TenantAccount]) -> Metric:
    gauge = GaugeMetricFamily(
        "aios_tenant_concurrent_sequences",
        "Sequences that run or wait; max_concurrent limits them.",
        labels=("tenant",),
    )
    for account in accounts:
        gauge.add_metric((account.tenant.name,), account.num_running)
    return gauge


def _first_tokens(accounts: Sequence[TenantAccount]) -> Metric:
    histogram = HistogramMetricFamily(
        "aios_tenant_time_to_first_token_seconds", "From the request to its first token.", labels=("tenant",)
    )
    bounds = [floatToGoString(bound) for bound in (*FIRST_TOKEN_SECONDS, float("inf"))]
    for account in accounts:
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip(bounds, account.first_tokens, strict=True):
            total += count
            buckets.append((bound, total))
        histogram.add_metric((account.tenant.name,), buckets, account.first_token_seconds)
    return histogram
