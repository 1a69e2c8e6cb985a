"""All ways to spread a model over a cluster, and the best of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from aios_model.config import ModelConfig
from aios_model.errors import ConfigError
from aios_parallel.planning.costs import Memory, PlanCosts, StepTime
from aios_parallel.planning.errors import PlanError
from aios_parallel.planning.hardware import Cluster, Workload
from aios_parallel.planning.loads import Layout
from aios_parallel.planning.weights import WeightScheme

Objective = Literal["throughput", "latency", "devices"]

_ALL_SIZES_UP_TO = 8
_UNEVEN_ROUTER = 1.03


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The same model and scheme on one device.

    Attributes:
        max_batch: Sequences that fit; 0 if the model does not.
        batch: Sequences that are decoded there: the workload's, or as many as fit.
        tokens_per_second: Decoding them.
        prefill_seconds: Of the workload's prompt.
    """

    max_batch: int
    batch: int
    tokens_per_second: float
    prefill_seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to spread the model, with all that follows.

    Attributes:
        layout: How many ways.
        scheme: Of the weights.
        costs: Where the figures come from.
        baseline: One device.
    """

    layout: Layout
    scheme: WeightScheme
    costs: PlanCosts
    baseline: Baseline

    @cached_property
    def memory(self) -> Memory:
        """The rank with least room."""
        return self.costs.fullest

    @property
    def fits(self) -> bool:
        """Whether the whole workload fits."""
        return not self.memory.missing

    @cached_property
    def decode(self) -> StepTime:
        """A step of the workload's batch."""
        return self.costs.decode()

    @cached_property
    def alone(self) -> StepTime:
        """A step of one sequence on an idle system."""
        return self.costs.decode(sequences=1)

    @cached_property
    def prefill_seconds(self) -> float:
        """Until the workload's prompt is read."""
        return self.costs.prefill_seconds()

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.costs.workload.batch / self.decode.seconds

    @property
    def decode_speedup(self) -> float | None:
        """Tokens per second over those of one device; None if the model does not fit there."""
        return self.tokens_per_second / self.baseline.tokens_per_second if self.baseline.max_batch else None

    @property
    def prefill_speedup(self) -> float | None:
        """One device's time for the prompt over this one's; None if the model does not fit there."""
        return self.baseline.prefill_seconds / self.prefill_seconds if self.baseline.max_batch else None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutFilter:
    """Sizes that the user fixed; None leaves one open.

    Attributes:
        tensor: TP.
        pipeline: PP.
        data: DP.
        expert_parallel: Whether ranks hold whole experts.
    """

    tensor: int | None = None
    pipeline: int | None = None
    data: int | None = None
    expert_parallel: bool | None = None

    def __str__(self) -> str:
        sizes = (("TP", self.tensor), ("PP", self.pipeline), ("DP", self.data))
        return " ".join(f"{name}={size}" for name, size in sizes if size is not None)


def find_plans(
    config: ModelConfig,
    schemes: Sequence[WeightScheme],
    cluster: Cluster,
    workload: Workload,
    *,
    wanted: LayoutFilter = LayoutFilter(),
) -> list[Plan]:
    """A plan for every scheme and layout that the model can be cut into, whether it fits or not.

    Args:
        config: The model's.
        schemes: Of its weights.
        cluster: The hardware.
        workload: The work.
        wanted: What layouts must be like.

    Raises:
        ConfigError: More devices, replicas or experts are wanted than there are.
        PlanError: The model cannot be cut as wanted; says why.
    """
    _check_wanted(config, cluster, workload, wanted)
    plans: list[Plan] = []
    refusal: PlanError | None = None
    for scheme in schemes:
        baseline = find_baseline(config, scheme, cluster, workload)
        for layout in all_layouts(config, cluster, workload, wanted):
            try:
                plans.append(make_plan(config, scheme, cluster, workload, layout, baseline=baseline))
            except PlanError as error:
                refusal = error
    if not plans:
        assert refusal is not None, "there is always a layout to try"
        raise refusal
    return plans


def make_plan(
    config: ModelConfig,
    scheme: WeightScheme,
    cluster: Cluster,
    workload: Workload,
    layout: Layout,
    *,
    baseline: Baseline | None = None,
) -> Plan:
    """One plan; PlanError if the model cannot be cut so. `baseline` is computed unless it is given."""
    return Plan(
        layout=layout,
        scheme=scheme,
        costs=PlanCosts(config, scheme, cluster, workload, layout),
        baseline=baseline or find_baseline(config, scheme, cluster, workload),
    )


def find_baseline(config: ModelConfig, scheme: WeightScheme, cluster: Cluster, workload: Workload) -> Baseline:
    """What one device of the cluster does."""
    costs = PlanCosts(config, scheme, cluster, workload, Layout())
    fitting = costs.largest_batch
    batch = min(workload.batch, fitting)
    return Baseline(
        max_batch=fitting,
        batch=batch,
        tokens_per_second=batch / costs.decode(sequences=batch).seconds if batch else 0.0,
        prefill_seconds=costs.prefill_seconds(),
    )


def all_layouts(config: ModelConfig, cluster: Cluster, workload: Workload, wanted: LayoutFilter) -> Iterator[Layout]:
    """Every TP × PP that the cluster has devices for, alone and with as many replicas as there is room and work for."""
    sizes = _group_sizes(cluster)
    for tensor in sizes if wanted.tensor is None else [wanted.tensor]:
        for pipeline in sizes if wanted.pipeline is None else [wanted.pipeline]:
            replicas = cluster.num_devices // (tensor * pipeline)
            counts = sorted({1, min(replicas, workload.batch)}) if wanted.data is None else [wanted.data]
            if not replicas or counts[-1] > replicas:
                continue
            for data in counts:
                for expert_parallel in _expert_choices(config, tensor, wanted):
                    yield Layout(tensor=tensor, pipeline=pipeline, data=data, expert_parallel=expert_parallel)


def _expert_choices(config: ModelConfig, tensor: int, wanted: LayoutFilter) -> tuple[bool, ...]:
    possible = (False, True) if config.num_experts and tensor > 1 else (False,)
    return possible if wanted.expert_parallel is None else tuple(set(possible) & {wanted.expert_parallel})


def _check_wanted(config: ModelConfig, cluster: Cluster, workload: Workload, wanted: LayoutFilter) -> None:
    needed = (wanted.tensor or 1) * (wanted.pipeline or 1) * (wanted.data or 1)
    if needed > cluster.num_devices:
        raise ConfigError(
            f"{wanted} needs {needed} devices, there are {cluster.num_devices}: lower a size, or raise --devices"
        )
    if (wanted.data or 1) > workload.batch:
        raise ConfigError(f"{wanted} has more replicas than the {workload.batch} sequences of --batch")
    if wanted.expert_parallel and not config.num_experts:
        raise ConfigError("--enable-expert-parallel is for mixtures of experts; this model has none")
    if wanted.expert_parallel and (wanted.tensor == 1 or cluster.num_devices == 1):
        raise ConfigError("--enable-expert-parallel spreads experts over the ranks of a TP group; TP must be 2 or more")


def rank_plans(plans: Iterable[Plan], objective: Objective) -> list[Plan]:
    """Those that fit, the best first. Of equals the one with fewer devices comes first, then with fewer collectives."""
    return sorted((plan for plan in plans if plan.fits), key=lambda plan: _rank(plan, objective))


def best_plan(plans: Iterable[Plan], objective: Objective) -> Plan | None:
    """The best of those that fit; None if none does."""
    return next(iter(rank_plans(plans, objective)), None)


def _rank(plan: Plan, objective: Objective) -> tuple[float, ...]:
    """Smaller is better. Times count to three digits, so that the last ones do not pick the devices.

    Expert parallelism has to win by a margin: no router spreads tokens as evenly as the model of times takes it to.
    """
    margin = _UNEVEN_ROUTER if plan.layout.expert_parallel else 1.0
    seconds_per_token = float(f"{margin / plan.tokens_per_second:.3g}")
    alone = float(f"{margin * plan.alone.seconds:.3g}")
    devices = plan.layout.num_devices
    tie = (plan.costs.collectives_per_pass(), plan.layout.tensor * plan.layout.pipeline, plan.prefill_seconds)
    match objective:
        case "throughput":
            return (seconds_per_token, devices, *tie)
        case "latency":
            return (alone, plan.prefill_seconds, seconds_per_token, devices, *tie)
        case "devices":
            return (devices, seconds_per_token, *tie)


def _group_sizes(cluster: Cluster) -> list[int]:
    """Sizes of groups that are worth a look: all small ones, then powers of two and what divides the cluster."""
    total, per_host = cluster.num_devices, cluster.devices_per_host
    sizes = range(1, total + 1)
    even = {size for size in sizes if total % size == 0 or per_host % size == 0 or size & (size - 1) == 0}
    return sorted(even | set(sizes[:_ALL_SIZES_UP_TO]))
