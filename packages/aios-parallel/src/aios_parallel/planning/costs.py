"""How long a step takes, and what fits: the arithmetic behind a plan.

A pass of T tokens through a stage takes, on its slowest rank,

    max(bytes read / bandwidth, operations / rate) + collectives

Read are the weights once (of experts those that T tokens are expected to visit) and the keys and values of the
sequences. A layer has two all-reduces of [T, hidden], an embedding table that is cut one; the head gathers one row of
the vocabulary per sampled token; a stage hands [T, hidden] to the next. With m micro-batches in flight, a stage works
on one while the others work on the rest, so that all m are through after

    max(m · slowest stage, sum of all stages)

Not modelled: reading and writing activations, starting kernels, the host's own work between steps, and how far real
kernels stay below a datasheet. Times are therefore lower bounds, and good for comparing plans.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from aios_model.config import ModelConfig
from aios_parallel.planning.collectives import Where, sent_bytes
from aios_parallel.planning.hardware import Cluster, Workload
from aios_parallel.planning.loads import Layout, ModelLoads, StageLoad, spread_model
from aios_parallel.planning.weights import WeightScheme

_LOGIT_BYTES = 4
_TOKEN_BYTES = 8
_LIVE_HIDDEN_STATES = 3  # residual, normed input, output


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        weights: Its shard of the model.
        kv_cache: Keys and values of the workload's sequences.
        activations: Of the largest step.
        reserve: What is left to the driver, the allocator and others.
        capacity: Of the device.
    """

    weights: float
    kv_cache: float
    activations: float
    reserve: float
    capacity: float

    @property
    def used(self) -> float:
        """All of it together, reserve included."""
        return self.weights + self.kv_cache + self.activations + self.reserve

    @property
    def missing(self) -> float:
        """Bytes that the device lacks; 0 if all fits."""
        return max(0.0, self.used - self.capacity)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTime:
    """Seconds of one pass through one stage on its slowest rank: the longer of two, and what is sent."""

    reading: float
    computing: float
    communicating: float

    @property
    def total(self) -> float:
        """Seconds of the pass."""
        return max(self.reading, self.computing) + self.communicating


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """A decode step: every sequence gets one token.

    Attributes:
        seconds: How long it takes.
        reading: Seconds that the busiest stage reads.
        computing: Seconds it computes, at the same time.
        communicating: Seconds it spends in collectives.
        bubble: Share of the time that a stage waits for others, on average.
        num_micro_batches: Parts of the batch that are in flight.
    """

    seconds: float
    reading: float
    computing: float
    communicating: float
    bubble: float
    num_micro_batches: int

    @property
    def bound(self) -> str:
        """What takes most of the time: `reading`, `computing` or `communicating`."""
        return max(("reading", "computing", "communicating"), key=lambda name: getattr(self, name))


class PlanCosts:
    """Bytes and times of one way to spread a model; PlanError on creation if it cannot be cut so.

    Args:
        config: The model's.
        scheme: Of its weights.
        cluster: The hardware.
        workload: The work.
        layout: How many ways.
    """

    def __init__(
        self, config: ModelConfig, scheme: WeightScheme, cluster: Cluster, workload: Workload, layout: Layout
    ) -> None:
        self.config = config
        self.scheme = scheme
        self.cluster = cluster
        self.workload = workload
        self.layout = layout
        self.loads: ModelLoads = spread_model(config, scheme, workload, layout)
        self.sequences = math.ceil(workload.batch / layout.data)
        self._busiest = [tuple(dict.fromkeys(stage)) for stage in self.loads.ranks]  # equal ranks cost the same

    def memory(self, *, sequences: int | None = None) -> list[list[Memory]]:
        """By stage and rank, for a number of sequences per replica; None for the workload's."""
        count = self.sequences if sequences is None else sequences
        known = {load: self._memory(load, count) for stage in self._busiest for load in stage}
        return [[known[load] for load in stage] for stage in self.loads.ranks]

    @cached_property
    def fullest(self) -> Memory:
        """The rank with least room."""
        return self._fullest(self.sequences)

    @cached_property
    def largest_batch(self) -> int:
        """Sequences of the workload's context that fit in all replicas together; 0 if not even one does."""
        low, high = 0, 1
        while high < 1 << 24 and not self._fullest(high).missing:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fullest(middle).missing else (middle, high)
        return low * self.layout.data

    def decode(self, *, sequences: int | None = None) -> StepTime:
        """The fastest step, over numbers of micro-batches from one to two per stage."""
        count = self.sequences if sequences is None else sequences
        stages = self.layout.pipeline
        tries = dict.fromkeys(min(number, count) for number in (1, stages, 2 * stages))
        return min((self._decode(count, number) for number in tries), key=lambda step: step.seconds)

    def prefill_seconds(self) -> float:
        """Time until the workload's prompt is read and its first token is known, on an idle replica.

        Its chunks follow each other through the stages.
        """
        prompt = self.workload.prompt
        num_chunks = math.ceil(prompt / self.workload.max_num_batched_tokens)
        context, tokens = (prompt + 1) / 2, prompt / num_chunks
        first = [self._pass(stage, tokens, 1, context, sampled=0).total for stage in range(self.layout.pipeline)]
        last = [self._pass(stage, tokens, 1, context, sampled=1).total for stage in range(self.layout.pipeline)]
        return sum(last) + (num_chunks - 1) * max(first)

    def collectives_per_pass(self) -> int:
        """Collectives and sends that a token's pass through the whole model takes."""
        group = self.sums_per_pass() + 1 if self.layout.tensor > 1 else 0
        return group + self.layout.pipeline - 1

    def sums_per_pass(self) -> int:
        """All-reduces that a token's pass through the whole model takes in a tensor-parallel group."""
        return sum(self._num_sums(stage) for stage in range(self.layout.pipeline))

    def bytes_sent_per_token(self) -> float:
        """Bytes that the rank that sends most sends for one decoded token."""
        return max(self._sent_bytes(stage) for stage in range(self.layout.pipeline))

    def tensor_place(self) -> Where:
        """What connects the ranks of a tensor-parallel group, at worst."""
        width = self.layout.tensor
        groups = range(0, self.layout.num_devices, width)
        places = [self.cluster.between(start, start + width - 1) for start in groups]
        return "network" if "network" in places else "host"

    def border_place(self, stage: int) -> Where:
        """What connects `stage` with the next one, in the replica where it is worst."""
        width, replica = self.layout.tensor, self.layout.tensor * self.layout.pipeline
        starts = range(stage * width, self.layout.num_devices, replica)
        pairs = [(start + rank, start + width + rank) for start in starts for rank in (0, width - 1)]
        return "network" if any(self.cluster.between(*pair) == "network" for pair in pairs) else "host"

    def _decode(self, sequences: int, num_micro_batches: int) -> StepTime:
        rows = math.ceil(sequences / num_micro_batches)
        stages = range(self.layout.pipeline)
        passes = [self._pass(stage, rows, rows, self.workload.context, sampled=rows) for stage in stages]
        slowest = max(passes, key=lambda each: each.total)
        through = sum(each.total for each in passes) + self._return_seconds(rows)
        seconds = max(num_micro_batches * slowest.total, through)
        busy = num_micro_batches * sum(each.total for each in passes) / len(passes)
        return StepTime(
            seconds=seconds,
            reading=num_micro_batches * slowest.reading,
            computing=num_micro_batches * slowest.computing,
            communicating=num_micro_batches * slowest.communicating,
            bubble=max(0.0, 1 - busy / seconds),
            num_micro_batches=num_micro_batches,
        )

    def _pass(self, stage: int, tokens: float, sequences: int, context: float, *, sampled: int) -> PassTime:
        loads = self._busiest[stage]
        return PassTime(
            reading=max(self._reading(load, tokens, sequences, context, sampled) for load in loads),
            computing=max(self._computing(load, tokens, context, sampled) for load in loads),
            communicating=self._communicating(stage, tokens, sampled),
        )

    def _reading(self, load: StageLoad, tokens: float, sequences: int, context: float, sampled: int) -> float:
        num_bytes = load.head_bytes if sampled else 0.0
        visited = self._visited_share(tokens)
        for layer, count in load.layers:
            kv_bytes = sequences * layer.kv_bytes * layer.visible(context)
            num_bytes += count * (layer.fixed_bytes + visited * layer.expert_bytes + kv_bytes)
        return num_bytes / self.cluster.device.bandwidth

    def _computing(self, load: StageLoad, tokens: float, context: float, sampled: int) -> float:
        products = sampled * load.head_params
        pairs = 0.0
        for layer, count in load.layers:
            products += tokens * count * (layer.params + layer.expert_params)
            pairs += tokens * count * layer.score_width * layer.visible(context)
        device = self.cluster.device
        return 2 * products / device.rate(self.scheme.operands) + 4 * pairs / device.rate("float")

    def _communicating(self, stage: int, tokens: float, sampled: int) -> float:
        times, ranks = self.cluster.times, self.layout.tensor
        hidden = tokens * self._hidden_bytes
        each = times.seconds("all_reduce", ranks=ranks, num_bytes=hidden, where=self.tensor_place())
        seconds = self._num_sums(stage) * each
        if stage < self.layout.pipeline - 1:
            return seconds + times.seconds("send", ranks=2, num_bytes=hidden, where=self.border_place(stage))
        if sampled:
            logits = sampled * self._gathered_rows * _LOGIT_BYTES
            seconds += times.seconds("gather", ranks=ranks, num_bytes=logits, where=self.tensor_place())
        return seconds

    def _return_seconds(self, rows: int) -> float:
        """The last stage tells the first what it sampled."""
        last = self.layout.pipeline - 1
        if not last:
            return 0.0
        place: Where = "network" if any(self.border_place(stage) == "network" for stage in range(last)) else "host"
        return self.cluster.times.seconds("send", ranks=2, num_bytes=rows * _TOKEN_BYTES, where=place)

    def _sent_bytes(self, stage: int) -> float:
        ranks = self.layout.tensor
        num_bytes = self._num_sums(stage) * sent_bytes("all_reduce", ranks=ranks, num_bytes=self._hidden_bytes)
        if stage < self.layout.pipeline - 1:
            return num_bytes + self._hidden_bytes
        return num_bytes + sent_bytes("gather", ranks=ranks, num_bytes=self._gathered_rows * _LOGIT_BYTES)

    def _visited_share(self, tokens: float) -> float:
        """Share of the experts that so many tokens are expected to visit, if the router spreads them evenly."""
        if not self.config.num_experts:
            return 0.0
        return 1 - (1 - self.config.num_experts_per_tok / self.config.num_experts) ** tokens

    def _fullest(self, sequences: int) -> Memory:
        return max(
            (self._memory(load, sequences) for stage in self._busiest for load in stage), key=lambda memory: memory.used
        )

    def _memory(self, load: StageLoad, sequences: int) -> Memory:
        capacity = self.cluster.device.memory_bytes
        tokens = max(self.workload.max_num_batched_tokens, sequences)
        widest = max(layer.widest for layer, _ in load.layers)
        states = tokens * (_LIVE_HIDDEN_STATES * self.config.hidden_size + widest) * self.scheme.float_bytes
        logits = sequences * self.config.vocab_size * _LOGIT_BYTES if load.vocabulary else 0
        return Memory(
            weights=load.weight_bytes,
            kv_cache=sequences * self.workload.page_tokens * load.kv_bytes,
            activations=states + logits,
            reserve=capacity * (1 - self.workload.utilization),
            capacity=capacity,
        )

    def _num_sums(self, stage: int) -> int:
        """All-reduces of [tokens, hidden] in a pass: two per layer, and one behind an embedding table that is cut."""
        cuts_table = stage == 0 and self.scheme.table_bytes > 0
        return 2 * len(self.loads.stages[stage]) + cuts_table

    @property
    def _gathered_rows(self) -> int:
        """Rows of the head on all ranks together, those that fill up the last ones included."""
        return sum(load.vocabulary for load in self.loads.ranks[-1])

    @property
    def _hidden_bytes(self) -> int:
        return self.config.hidden_size * self.scheme.float_bytes
