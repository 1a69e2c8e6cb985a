"""What a plan takes for granted, in words: printed above every table of times."""

from __future__ import annotations

from collections.abc import Sequence

from aios_model.config import ModelConfig
from aios_parallel.planning.devices import Link
from aios_parallel.planning.hardware import Cluster, Workload
from aios_parallel.planning.quantities import show_bytes, show_seconds
from aios_parallel.planning.weights import WeightScheme


def list_assumptions(
    config: ModelConfig, schemes: Sequence[WeightScheme], cluster: Cluster, workload: Workload
) -> list[str]:
    """A sentence each."""
    return [
        _device(cluster),
        _links(cluster),
        "Kernels reach these figures; activations, kernel launches and the host's work between steps cost nothing: "
        "times are lower bounds.",
        _weights(schemes),
        "Two all-reduces of [tokens, hidden] per layer, one gather of the vocabulary per sampled token, one send of "
        "[tokens, hidden] per border of stages; none overlaps with computing.",
        _embedding(cluster),
        f"{workload.batch} sequences with {workload.context:,} tokens of {workload.kv_cache_dtype} KV cache each; "
        f"prompts of {workload.prompt:,} tokens, {workload.max_num_batched_tokens:,} per step; "
        f"{workload.utilization:.0%} of the memory may be used.",
        *_experts(config),
    ]


def _device(cluster: Cluster) -> str:
    device = cluster.device
    rates = ", ".join(f"{name} {rate / 1e12:,.4g}" for name, rate in device.flops.items())
    return (
        f"{device.name} ({device.source}): {show_bytes(device.memory_bytes)}, {show_bytes(device.bandwidth)}/s, "
        f"TFLOP/s: {rates}."
    )


def _links(cluster: Cluster) -> str:
    times = cluster.times
    text = f"Within a host {_link(times.links['host'])}"
    if cluster.num_hosts > 1:
        text += f", between hosts {_link(times.links['network'])}"
    if times.name:
        measured = sorted({f"{operation} ({where})" for where, operation, _ in times.measured})
        text += f"; times of {', '.join(measured)} as measured ({times.name})"
    return f"{text}; all-reduce: 2 log2(n) latencies and 2 (n - 1) / n times the bytes."


def _embedding(cluster: Cluster) -> str:
    if cluster.device.kind == "cpu":
        return "The embedding table stays in the mapped file."
    return "The ranks of the first stage share the embedding table, for one more all-reduce; a tied head is held too."


def _link(link: Link) -> str:
    return f"{link.name}, {show_bytes(link.bandwidth)}/s and {show_seconds(link.latency)}"


def _weights(schemes: Sequence[WeightScheme]) -> str:
    text = "Weights are read once per pass"
    for scheme in schemes:
        if scheme.is_packed:
            text += f"; {scheme.name} weights multiply at the rate of {scheme.operands}"
    return f"{text}. Norms, biases, routers and the embedding table stay floats."


def _experts(config: ModelConfig) -> list[str]:
    if not config.num_experts:
        return []
    return [
        f"The router spreads tokens evenly over {config.num_experts} experts, {config.num_experts_per_tok} each: a "
        "step of T tokens reads those that it is expected to visit."
    ]
