"""Prometheus metrics under vLLM's names, so that its dashboards work unchanged. One `engine` label per replica.

Two sources: gauges and counters are read from the engine's latest statistics when somebody scrapes, histograms are fed
by the engine as it goes (`EngineListener`). The registry belongs to the application: nothing global, no other library's
metrics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from aios_serve.async_engine import EngineState
from aios_serve.errors import EngineUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from prometheus_client.metrics_core import Metric

    from aios_sched.stats import EngineStats
    from aios_serve.async_engine import AsyncEngine
    from aios_serve.outputs import RequestTiming

Family = TypeVar("Family", GaugeMetricFamily, CounterMetricFamily)

LABELS = ("model_name", "engine")
FINISH_REASONS = ("stop", "length", "abort", "error", "timeout")

# From 1 ms: a small model answers within vLLM's first bucket, and all of its percentiles would be that bucket.
TOKEN_SECONDS = tuple(step * 10.0**power for power in range(-3, 2) for step in (1, 1.5, 2, 3, 4, 5, 7.5))
REQUEST_SECONDS = tuple(step * 10.0**power for power in range(-3, 4) for step in (1, 2, 3, 5, 8))
TOKEN_COUNTS = tuple(step * 10**power for power in range(6) for step in (1, 2, 5))
STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class ServerMetrics:
    """The metrics of one server; subscribe it to the engine."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self._families = _families(self._registry)
        self._series: dict[int, _Series] = {}

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """What a scraper gets, and its content type; `accept` is the scraper's Accept header."""
        if _is_known(self._engine):
            for replica in range(len(self._engine.replicas)):
                self._bound(replica)  # zeros before the first request, so that rates have a beginning
        encoder, content_type = choose_encoder(accept)
        return encoder(self._registry), content_type

    def on_step(self, *, stats: EngineStats, num_tokens: int, replica: int) -> None:
        """A step ended."""
        self._bound(replica).step_tokens.observe(num_tokens)

    def on_tokens(self, *, num_tokens: int, seconds: float, first: bool, replica: int) -> None:
        """A choice gained tokens, `seconds` after its last ones."""
        series = self._bound(replica)
        if first:
            series.first_token.observe(seconds)
        else:
            for _ in range(num_tokens):
                series.inter_token.observe(seconds / num_tokens)

    def on_finished(self, timing: RequestTiming) -> None:
        """A request ended."""
        series = self._bound(timing.replica)
        series.finished[timing.finish_reason].inc()
        series.prompt_tokens.observe(timing.num_prompt_tokens)
        series.generation_tokens.observe(timing.num_generation_tokens)
        series.end_to_end.observe(timing.total_seconds)
        inference = None
        if timing.prefill_seconds is not None and timing.decode_seconds is not None:
            inference = timing.prefill_seconds + timing.decode_seconds
        for histogram, seconds in (
            (series.queue, timing.queue_seconds),
            (series.prefill, timing.prefill_seconds),
            (series.decode, timing.decode_seconds),
            (series.inference, inference),
            (series.per_output_token, timing.seconds_per_output_token),
        ):
            if seconds is not None:
                histogram.observe(seconds)

    def _bound(self, replica: int) -> _Series:
        """The series with their labels, which are known only once an engine is ready."""
        if replica not in self._series:
            self._series[replica] = self._families.bind(self._engine.model_name, str(replica))
        return self._series[replica]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Series:
    """Histograms with labels filled in, and the counter of finished requests by reason."""

    step_tokens: Histogram
    first_token: Histogram
    inter_token: Histogram
    per_output_token: Histogram
    end_to_end: Histogram
    queue: Histogram
    prefill: Histogram
    decode: Histogram
    inference: Histogram
    prompt_tokens: Histogram
    generation_tokens: Histogram
    finished: dict[str, Counter]


@dataclass(frozen=True, slots=True)
class _Families:
    """Histograms and the counter before their labels are known."""

    histograms: dict[str, Histogram]
    finished: Counter

    def bind(self, model_name: str, engine: str) -> _Series:
        histograms = {name: family.labels(model_name, engine) for name, family in self.histograms.items()}
        finished = {reason: self.finished.labels(model_name, engine, reason) for reason in FINISH_REASONS}
        return _Series(**histograms, finished=finished)


def _families(registry: CollectorRegistry) -> _Families:
    def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}", text, LABELS, buckets=buckets, registry=registry)

    return _Families(
        {
            "step_tokens": histogram("iteration_tokens_total", "Tokens handled per engine step.", STEP_TOKENS),
            "first_token": histogram("time_to_first_token_seconds", "Arrival to first token.", REQUEST_SECONDS),
            "inter_token": histogram("inter_token_latency_seconds", "Between tokens of a choice.", TOKEN_SECONDS),
            "per_output_token": histogram(
                "request_time_per_output_token_seconds", "Mean time between a request's tokens.", TOKEN_SECONDS
            ),
            "end_to_end": histogram("e2e_request_latency_seconds", "Arrival to last token.", REQUEST_SECONDS),
            "queue": histogram("request_queue_time_seconds", "Arrival to first step.", REQUEST_SECONDS),
            "prefill": histogram("request_prefill_time_seconds", "First step to first token.", REQUEST_SECONDS),
            "decode": histogram("request_decode_time_seconds", "First token to last token.", REQUEST_SECONDS),
            "inference": histogram("request_inference_time_seconds", "First step to last token.", REQUEST_SECONDS),
            "prompt_tokens": histogram("request_prompt_tokens", "Prompt tokens per request.", TOKEN_COUNTS),
            "generation_tokens": histogram("request_generation_tokens", "Output tokens per request.", TOKEN_COUNTS),
        },
        Counter("vllm:request_success", "Finished requests.", (*LABELS, "finished_reason"), registry=registry),
    )


_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_requests_running": ("Requests in the running batch.", lambda stats: stats.num_running),
    "num_requests_waiting": ("Requests waiting for a place in it.", lambda stats: stats.num_waiting),
    "kv_cache_usage_perc": ("Share of the KV pages in use, 0 to 1.", lambda stats: stats.kv_cache_usage),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "prompt_tokens": ("Prompt tokens processed.", lambda stats: stats.prompt_tokens),
    "generation_tokens": ("Tokens generated.", lambda stats: stats.generation_tokens),
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", lambda stats: stats.prefix_cache_queries),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", lambda stats: stats.prefix_cache_hits),
    "external_prefix_cache_queries": (
        "Prompt tokens looked up in the tiers below the pool: host memory and disk.",
        lambda stats: stats.tier_cache_queries,
    ),
    "external_prefix_cache_hits": (
        "Prompt tokens found in those tiers; prefix_cache_hits counts them too.",
        lambda stats: stats.tier_cache_hits,
    ),
    "num_preemptions": ("Times a running request lost its pages.", lambda stats: stats.num_preemptions),
    "spec_decode_num_drafts": ("Times a request had drafted tokens in a step.", lambda stats: stats.num_drafts),
    "spec_decode_num_draft_tokens": ("Tokens drafted and checked.", lambda stats: stats.num_draft_tokens),
    "spec_decode_num_accepted_tokens": (
        "Drafted tokens that were right, each of them gained beside the token of its step.",
        lambda stats: stats.num_accepted_tokens,
    ),
}


_TIER_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "swap_preemptions": ("Preempted requests whose pages were saved.", lambda stats: stats.num_swap_preemptions),
    "kv_pages_offloaded": ("Pages copied from the pool to host memory.", lambda stats: stats.num_pages_stored),
    "kv_pages_fetched": ("Pages copied back from host memory or disk.", lambda stats: stats.num_pages_fetched),
    "kv_pages_lost": ("Pages that could not be read back.", lambda stats: stats.num_pages_lost),
}


class _EngineCollector(Collector):
    """Gauges and counters, read from the engines at the moment of a scrape. Empty until one is ready."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """The families with their values."""
        if not _is_known(self._engine):
            return
        replicas = list(enumerate(self._engine.replicas))
        for name, (text, value) in _GAUGES.items():
            yield self._filled(GaugeMetricFamily(f"vllm:{name}", text, labels=LABELS), self._values(value))
        for name, (text, value) in _COUNTERS.items():
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=LABELS)
            yield self._filled(
                counter, {index: value(each.stats) for index, each in replicas if each.stats is not None}
            )
        for name, (text, value) in _TIER_COUNTERS.items():
            counter = CounterMetricFamily(f"aios:{name}", text, labels=LABELS)
            yield self._filled(counter, self._values(value))
        yield from self._cache_config()
        ready = GaugeMetricFamily("aios:engine_ready", "Whether the engine takes requests.", labels=LABELS)
        yield self._filled(ready, {index: each.state is EngineState.READY for index, each in replicas})
        restarts = CounterMetricFamily("aios:engine_restarts", "Times a dead engine was restarted.", labels=LABELS)
        yield self._filled(restarts, {index: each.num_restarts for index, each in replicas})
        text = "Requests whose engine died before they had an output and that another one got."
        moved = CounterMetricFamily("aios:requests_moved", text, labels=("model_name",))
        moved.add_metric((self._engine.model_name,), self._engine.num_moved_requests)
        yield moved

    def _values(self, value: Callable[[EngineStats], float]) -> dict[int, float]:
        """By replica, of those that have been ready."""
        replicas = enumerate(self._engine.replicas)
        return {index: value(each.stats) for index, each in replicas if each.stats is not None}

    def _filled(self, family: Family, values: Mapping[int, float]) -> Family:
        for index, value in values.items():
            family.add_metric((self._engine.model_name, str(index)), value)
        return family

    def _cache_config(self) -> Iterator[Metric]:
        """The pool of pages as labels of a gauge that is always 1."""
        names = ("engine", "block_size", "num_gpu_blocks", "enable_prefix_caching", "cache_dtype", "kv_cache_policy")
        gauge = GaugeMetricFamily("vllm:cache_config_info", "How the KV cache is set up.", labels=names)
        for index, replica in enumerate(self._engine.replicas):
            if (info := replica.info) is not None:
                values = (index, info.block_size, info.num_blocks, info.enable_prefix_caching)
                gauge.add_metric((*map(str, values), info.kv_dtype, info.kv_cache_policy), 1)
        yield gauge


def _is_known(engine: AsyncEngine) -> bool:
    """Whether the engine has been ready, so that there is a model name to label samples with."""
    try:
        return bool(engine.model_name) and engine.stats() is not None
    except EngineUnavailableError:
        return False
