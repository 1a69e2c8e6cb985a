"""What came of a simulation: times of requests, sums over steps, and the figures that people ask for."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aios_model.errors import ConfigError
from aios_sched.simulator.cost import FEMTOSECONDS
from aios_sched.simulator.meters import Meters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_sched.simulator.replica import Replica
    from aios_sched.simulator.system import SystemConfig
    from aios_sched.simulator.trace import TraceRequest
    from aios_sched.stats import RequestTiming

PERCENTS = (50, 90, 95, 99)

METRICS = ("ttft", "tpot", "e2e", "queue")
"""Of every request: seconds to the first token, per token after it, to the last one, and until it first ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """What a request must keep to count as good; None asks for nothing.

    Attributes:
        ttft_s: Seconds to its first token.
        tpot_s: Seconds per token after the first, on its average.
        e2e_s: Seconds to its last token.

    Raises:
        ConfigError: A limit is not positive.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def __post_init__(self) -> None:
        for limit in (self.ttft_s, self.tpot_s, self.e2e_s):
            if limit is not None and not limit > 0:
                raise ConfigError(f"an objective of {limit} s cannot be met; give more than 0")

    @property
    def any(self) -> bool:
        """Whether anything is asked for."""
        return any(limit is not None for limit in (self.ttft_s, self.tpot_s, self.e2e_s))


class Results:
    """Grows while a simulation runs: 8 bytes per request and metric, and nothing per token.

    Attributes:
        times: For each of METRICS the seconds of every finished request, in the order in which they finished; NaN
            where a request has none (of one token no time per token).
        arrivals: When these requests arrived, in seconds.
        meters: Sums over all steps of all replicas.
        num_refused: Requests that were turned away at the door.
        refusal: The first refusal's message.
        seconds: When the last step ended.
    """

    def __init__(self, system: SystemConfig, *, host_time: int) -> None:
        self.system = system
        self.host_time = host_time
        self.times = {name: array("d") for name in METRICS}
        self.arrivals = array("d")
        self._tenants = array("l")
        self._tenant_numbers: dict[str, int] = {}
        self.meters = Meters()
        self.num_refused = 0
        self.refusal = ""
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self.num_queried_tokens = 0
        self.num_evictions = 0
        self.seconds = 0.0
        self.busy_shares: list[float] = []

    @property
    def num_finished(self) -> int:
        """Requests that got all their tokens."""
        return len(self.arrivals)

    def add(self, traced: TraceRequest, timing: RequestTiming) -> None:
        """A request has finished."""
        assert timing.first_token_time is not None
        num_tokens, times = timing.num_generation_tokens, self.times
        decoding = timing.finished_time - timing.first_token_time
        self.arrivals.append(timing.arrival_time)
        self._tenants.append(self._tenant_numbers.setdefault(traced.tenant, len(self._tenant_numbers)))
        times["ttft"].append(timing.first_token_time - timing.arrival_time)
        times["tpot"].append(decoding / (num_tokens - 1) if num_tokens > 1 else math.nan)
        times["e2e"].append(timing.total_seconds)
        times["queue"].append(timing.queue_seconds)
        self.num_prompt_tokens += timing.num_prompt_tokens
        self.num_output_tokens += num_tokens

    def add_refused(self, traced: TraceRequest, error: Exception) -> None:
        """A request was turned away."""
        self.num_refused += 1
        self.refusal = self.refusal or str(error)

    def close(self, now: int, replicas: Sequence[Replica]) -> None:
        """The last event has happened."""
        self.seconds = now / FEMTOSECONDS
        for replica in replicas:
            stats = replica.scheduler.block_manager.stats
            self.meters.merge(replica.meters)
            self.num_preemptions += replica.scheduler.num_preemptions
            self.num_cached_tokens += stats.hits
            self.num_queried_tokens += stats.queries
            self.num_evictions += stats.evictions
            self.busy_shares.append(replica.meters.busy_time / max(now, 1))

    def summary(self, objectives: Objectives | None = None) -> dict[str, object]:
        """All figures as plain data; times in seconds, shares from 0 to 1.

        Args:
            objectives: What counts as good.
        """
        seconds = max(self.seconds, 1 / FEMTOSECONDS)
        figures: dict[str, object] = {
            "requests": {"finished": self.num_finished, "refused": self.num_refused, "refusal": self.refusal or None},
            "seconds": self.seconds,
            "throughput": {
                "requests_per_s": self.num_finished / seconds,
                "output_tokens_per_s": self.num_output_tokens / seconds,
                "total_tokens_per_s": (self.num_prompt_tokens + self.num_output_tokens) / seconds,
            },
            "latency": {name: _distribution(self.times[name]) for name in METRICS} | {"itl": self._gaps()},
            "memory": self._memory(),
            "prefix_cache": {
                "hit_rate": self.num_cached_tokens / max(self.num_queried_tokens, 1),
                "hits": self.num_cached_tokens,
                "queries": self.num_queried_tokens,
                "evictions": self.num_evictions,
            },
            "preemptions": self.num_preemptions,
            "steps": self._steps(),
        }
        if len(self._tenant_numbers) > 1:
            figures["tenants"] = {name: self._of_tenant(number) for name, number in self._tenant_numbers.items()}
        if objectives is not None and objectives.any:
            figures["goodput"] = self.goodput(objectives)
        return figures

    def goodput(self, objectives: Objectives) -> dict[str, float]:
        """Which share of the requests kept all objectives, and how many of those there were a second.

        A request that was refused kept nothing.
        """
        limits = [(name, getattr(objectives, f"{name}_s")) for name in ("ttft", "tpot", "e2e")]
        checks = [(self.times[name], limit) for name, limit in limits if limit is not None]
        # `not >`, since a request of one token has NaN seconds per token, and keeps any limit.
        good = sum(all(not times[i] > limit for times, limit in checks) for i in range(self.num_finished))
        total = self.num_finished + self.num_refused
        return {"share": good / max(total, 1), "requests_per_s": good / max(self.seconds, 1 / FEMTOSECONDS)}

    def percentile(self, name: str, percent: float) -> float | None:
        """Of one of METRICS, by nearest rank; None where no request has it."""
        values = sorted(value for value in self.times[name] if not math.isnan(value))
        return values[max(0, math.ceil(len(values) * percent / 100) - 1)] if values else None

    def _of_tenant(self, number: int) -> dict[str, object]:
        """Requests that finished, and the latencies of these alone."""
        mine = [index for index, tenant in enumerate(self._tenants) if tenant == number]
        latency = {name: _distribution([self.times[name][index] for index in mine]) for name in METRICS}
        return {"finished": len(mine), "latency": latency}

    def _gaps(self) -> dict[str, float | None]:
        gaps = self.meters.gaps
        if not gaps.count:
            return dict.fromkeys(("mean", *(f"p{percent}" for percent in PERCENTS)))
        ranks = {f"p{percent}": (gaps.percentile(percent) or 0.0) / FEMTOSECONDS for percent in PERCENTS}
        return {"mean": gaps.total / gaps.count / FEMTOSECONDS, **ranks}

    def _memory(self) -> dict[str, float]:
        """Averages over the time in steps."""
        meters, system = self.meters, self.system
        time = max(meters.busy_time, 1)
        slots = meters.table_time * system.block_size
        reserved = meters.sequence_time * system.max_model_len
        return {
            "pages": system.num_blocks,
            "used_share": meters.used_time / time / system.num_blocks,
            "wasted_share_of_pool": (slots - meters.context_time) / time / (system.num_blocks * system.block_size),
            "wasted_share_of_reserved": (slots - meters.context_time) / max(slots, 1),
            "contiguous_wasted_share_of_reserved": (reserved - meters.context_time) / max(reserved, 1),
        }

    def _steps(self) -> dict[str, float]:
        meters = self.meters
        time, elapsed = max(meters.busy_time, 1), max(self.seconds * FEMTOSECONDS * self.system.replicas, 1)
        host = self.host_time * meters.num_steps
        return {
            "count": meters.num_steps,
            "mean_seconds": meters.busy_time / max(meters.num_steps, 1) / FEMTOSECONDS,
            "mean_sequences": meters.sequence_time / time,
            "mean_tokens": meters.num_tokens / max(meters.num_steps, 1),
            "prefill_tokens": meters.num_prefill_tokens,
            "busy_share": meters.busy_time / elapsed,
            "device_busy_share": (meters.busy_time - host) / elapsed,
            "host_busy_share": host / elapsed,
            "busiest_replica_share": max(self.busy_shares, default=0.0),
            "idlest_replica_share": min(self.busy_shares, default=0.0),
        }


def _distribution(times: Sequence[float]) -> dict[str, float | None]:
    values = sorted(value for value in times if not math.isnan(value))
    if not values:
        return dict.fromkeys(("mean", *(f"p{percent}" for percent in PERCENTS), "max"))
    ranks = {f"p{percent}": values[max(0, math.ceil(len(values) * percent / 100) - 1)] for percent in PERCENTS}
    return {"mean": math.fsum(values) / len(values), **ranks, "max": values[-1]}
