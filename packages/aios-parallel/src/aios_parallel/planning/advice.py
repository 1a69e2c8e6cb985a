"""Which plan to take, why, and the command that runs it; or what to change if none fits."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from aios_model.config import ModelConfig
from aios_parallel.planning.errors import PlanError
from aios_parallel.planning.hardware import Cluster, Workload
from aios_parallel.planning.plans import Objective, Plan, best_plan, find_plans
from aios_parallel.planning.quantities import show_bytes, show_number, show_seconds
from aios_parallel.planning.weights import WeightScheme, default_kv_cache_dtype

_COARSE = "int4"
_NOTICEABLE = 0.05


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The plan to take.

    Attributes:
        plan: It.
        reasons: Why, a sentence each.
        command: What runs it.
    """

    plan: Plan
    reasons: tuple[str, ...]
    command: str


def recommend(plans: Sequence[Plan], objective: Objective, *, model: str | None) -> Recommendation:
    """The best plan that fits, for an objective.

    Four bits cost quality, so they are taken only where nothing else fits, where the user asked for nothing else, or
    where as few devices as possible were asked for.

    Args:
        plans: All that were looked at.
        objective: What makes a plan good.
        model: As `aios-serve` is to be told; None for the bundled model.

    Raises:
        PlanError: None fits; says what would.
    """
    fine = [plan for plan in plans if not plan.scheme.name.startswith(_COARSE)]
    best = best_plan(plans if objective == "devices" else fine, objective) or best_plan(plans, objective)
    if best is None:
        raise PlanError(_nothing_fits(plans))
    return Recommendation(plan=best, reasons=tuple(_reasons(best, plans)), command=serve_command(best, model))


def serve_command(plan: Plan, model: str | None) -> str:
    """The `aios-serve` command of a plan; on several hosts, what each of them is told but for its rank."""
    layout, costs = plan.layout, plan.costs
    device, kept = costs.cluster.device, costs.workload.kv_cache_dtype
    by_default = device.kind != "cpu" and kept == default_kv_cache_dtype(costs.config, device)
    words = ["aios-serve", *([] if model is None else [model])]
    for flag, size in (
        ("--tensor-parallel-size", layout.tensor),
        ("--pipeline-parallel-size", layout.pipeline),
        ("--data-parallel-size", layout.data),
    ):
        words += [flag, str(size)] if size > 1 else []
    words += ["--enable-expert-parallel"] if layout.expert_parallel else []
    words += ["--quantization", plan.scheme.name]
    words += ["--kv-cache-dtype", "auto" if by_default else kept]
    words += ["--max-model-len", str(costs.workload.context), "--max-num-seqs", str(costs.sequences)]
    return shlex.join(words)


def hosts_in_use(plan: Plan) -> int:
    """Hosts that the plan's devices are in."""
    return -(-plan.layout.num_devices // plan.costs.cluster.devices_per_host)


def _reasons(best: Plan, plans: Sequence[Plan]) -> Iterator[str]:
    same = [plan for plan in plans if plan.scheme == best.scheme and plan.fits]
    yield from _about_scheme(best, plans)
    yield from _about_groups(best, same)
    yield from _about_hosts(best, [plan for plan in plans if plan.scheme == best.scheme])
    yield from _about_heads(best)
    yield from _about_experts(best, same)
    yield _about_bound(best)
    yield from _about_devices(best)
    yield from _about_fewer_bits(best, plans)


def _about_scheme(best: Plan, plans: Sequence[Plan]) -> Iterator[str]:
    others = dict.fromkeys(plan.scheme for plan in plans if plan.scheme.bits > best.scheme.bits)
    for scheme in others:
        theirs = [plan for plan in plans if plan.scheme == scheme]
        other = best_plan(theirs, "throughput")
        if other is None:
            missing = min(plan.memory.missing for plan in theirs)
            yield f"{_sentence(_weights(scheme))} do not fit: {show_bytes(missing)} per device are missing at best."
        elif other.tokens_per_second < best.tokens_per_second:
            yield (
                f"{_sentence(_weights(best.scheme))} are read faster: {show_number(best.tokens_per_second)} tok/s; "
                f"{_weights(scheme)} give {show_number(other.tokens_per_second)} at best ({other.layout})."
            )


def _about_groups(best: Plan, same: Sequence[Plan]) -> Iterator[str]:
    layout, step = best.layout, best.decode
    if layout.tensor == layout.pipeline == 1:
        if layout.data > 1:
            yield f"The model fits one device, and {layout.data} replicas exchange nothing."
        return
    if layout.tensor > 1:
        yield (
            f"TP={layout.tensor}: every device reads 1/{layout.tensor} of each layer; "
            f"{best.costs.sums_per_pass()} all-reduces over {_link(best, best.costs.tensor_place())} take "
            f"{step.communicating / step.seconds:.0%} of a decode step."
        )
    if layout.pipeline > 1:
        yield (
            f"PP={layout.pipeline}: {step.num_micro_batches} micro-batches in flight keep the stages busy but for "
            f"{step.bubble:.0%} of a decode step; each reads the weights once, so a larger batch gains most."
        )
    yield from _compare(best, [plan for plan in same if plan.layout.tensor == 1], "without TP")
    if not any(plan.layout.tensor == plan.layout.pipeline == 1 for plan in same):
        room = best.baseline.max_batch
        if room < best.costs.workload.batch:
            yield "One device cannot hold " + (f"more than {room} of the sequences." if room else "the model.")


def _about_hosts(best: Plan, same: Sequence[Plan]) -> Iterator[str]:
    if hosts_in_use(best) == 1:
        return
    across = [plan for plan in same if plan.costs.tensor_place() == "network"]
    if across and best.costs.tensor_place() == "host":
        widest = max(across, key=lambda plan: (plan.layout.tensor, plan.tokens_per_second))
        step = widest.decode
        yield (
            f"TP stays within a host: with {widest.layout} all-reduces over {_link(best, 'network')} would take "
            f"{show_seconds(step.communicating)} of a step of {show_seconds(step.seconds)}, reading and computing "
            f"{show_seconds(max(step.reading, step.computing))}."
        )
    yield (
        f"Start it on each of {hosts_in_use(best)} hosts with --nnodes {hosts_in_use(best)} --node-rank N "
        "--master-addr FIRST-HOST added."
    )


def _about_heads(best: Plan) -> Iterator[str]:
    config, ranks = best.costs.config, best.layout.tensor
    shards = best.costs.loads.shards[config.layers[0]]
    held = sum(len(shard.heads.kv_heads) for shard in shards)
    if held > config.num_key_value_heads:
        yield (
            f"TP={ranks} over {config.num_key_value_heads} kv heads: ranks hold {held} together, so the KV cache takes "
            f"{held / config.num_key_value_heads:.2g} times the memory."
        )
    padded = sum(shard.heads.queries.size for shard in shards)
    if padded > config.num_attention_heads:
        yield (
            f"{config.num_attention_heads} query heads do not divide by {ranks}: padding makes them {padded}, "
            "computed in vain but for the model's own."
        )


def _about_experts(best: Plan, same: Sequence[Plan]) -> Iterator[str]:
    if best.layout.expert_parallel:
        shards = best.costs.loads.shards[next(spec for spec in best.costs.config.layers if spec.moe)]
        most = max(len(shard.experts) for shard in shards)
        yield f"EP: a rank holds {most} whole experts of {best.costs.config.num_experts} at most."
        yield from _compare(best, [plan for plan in same if not plan.layout.expert_parallel], "without EP")


def _about_bound(best: Plan) -> str:
    step = best.decode
    largest = f"up to {best.costs.largest_batch:,} sequences of {best.costs.workload.context:,} tokens fit"
    if step.bound == "reading":
        return (
            f"Decoding is bound by reading ({show_seconds(step.reading)}; operations take "
            f"{show_seconds(step.computing)}): more sequences share the weights' reading, {largest}."
        )
    if step.bound == "computing":
        return (
            f"Decoding is bound by operations ({show_seconds(step.computing)}): more sequences take longer; {largest}."
        )
    return (
        f"Decoding is bound by what is sent ({show_seconds(step.communicating)}): a faster link, fewer ranks or more "
        f"sequences a step help; {largest}."
    )


def _about_devices(best: Plan) -> Iterator[str]:
    idle = best.costs.cluster.num_devices - best.layout.num_devices
    if idle:
        yield f"{idle} of {best.costs.cluster.num_devices} devices stay idle: no plan with all of them was better."


def _about_fewer_bits(best: Plan, plans: Sequence[Plan]) -> Iterator[str]:
    """Whether four bits would do with one device what takes several now, or more with as many."""
    smaller = [plan for plan in plans if plan.scheme.bits < best.scheme.bits and plan.fits]
    alone = best_plan([plan for plan in smaller if plan.layout.tensor * plan.layout.pipeline == 1], "throughput")
    fastest = best_plan(smaller, "throughput")
    if alone is not None and not best.baseline.max_batch:
        yield (
            f"{alone.scheme.name.upper()} makes it fit one device: use that first if its quality is enough (aios-quant "
            f"evaluate tells); {alone.layout} gives {show_number(alone.tokens_per_second)} tok/s."
        )
    elif fastest is not None and fastest.tokens_per_second > best.tokens_per_second * (1 + _NOTICEABLE):
        yield (
            f"{fastest.scheme.name.upper()} would give {show_number(fastest.tokens_per_second)} tok/s "
            f"({fastest.layout}) but costs quality: aios-quant evaluate tells how much."
        )


def _compare(best: Plan, others: Sequence[Plan], name: str) -> Iterator[str]:
    other = best_plan(others, "throughput")
    if other is not None and other.tokens_per_second < best.tokens_per_second * (1 - _NOTICEABLE):
        yield (
            f"The best {name} ({other.layout}) gives {show_number(other.tokens_per_second)} tok/s, this "
            f"{show_number(best.tokens_per_second)}."
        )


def _weights(scheme: WeightScheme) -> str:
    return "unquantised weights" if scheme.name == "none" else f"{scheme.name.upper()} weights"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _link(plan: Plan, where: str) -> str:
    return plan.costs.cluster.times.links["network" if where == "network" else "host"].name


def _nothing_fits(plans: Sequence[Plan]) -> str:
    nearest = min(plans, key=lambda plan: (plan.memory.missing, plan.layout.num_devices))
    costs, memory = nearest.costs, nearest.memory
    cluster, work = costs.cluster, costs.workload
    return (
        f"nothing fits {cluster.num_devices} × {cluster.device.name}, of whose {show_bytes(memory.capacity)} each "
        f"{show_bytes(memory.capacity - memory.reserve)} may be used: the nearest ({nearest.layout}, "
        f"{nearest.scheme.name}) needs {show_bytes(memory.weights)} for weights, {show_bytes(memory.kv_cache)} for the "
        f"KV cache of {costs.sequences} × {work.context} tokens and {show_bytes(memory.activations)} for activations, "
        f"and lacks {show_bytes(memory.missing)} per device. {_remedies(plans, costs.config, cluster, work)}"
    )


def _remedies(plans: Sequence[Plan], config: ModelConfig, cluster: Cluster, workload: Workload) -> str:
    found = list(_fitting_changes(plans, config, cluster, workload))
    if not found:
        return (
            "No smaller batch or context, no INT4 weights and not eight times the devices would do: take larger ones."
        )
    return f"What would fit: {'; '.join(found)}."


def _fitting_changes(plans: Sequence[Plan], config: ModelConfig, cluster: Cluster, workload: Workload) -> Iterator[str]:
    schemes = list(dict.fromkeys(plan.scheme for plan in plans))
    batch = max(plan.costs.largest_batch for plan in plans)
    if batch:
        yield f"--batch {batch}"
    context = workload.context
    while context > 256:
        context //= 2
        shorter = replace(workload, context=context, prompt=min(context, workload.prompt))
        if best_plan(find_plans(config, schemes, cluster, shorter), "devices") is not None:
            yield f"--context {context}"
            break
    for scheme in _smaller_schemes(schemes, config):
        plan = best_plan(find_plans(config, [scheme], cluster, workload), "devices")
        if plan is not None:
            yield f"--quantization {scheme.name} ({plan.layout})"
            break
    for times in (2, 3, 4, 6, 8):
        more = replace(cluster, num_devices=cluster.num_devices * times)
        plan = best_plan(find_plans(config, schemes, more, workload), "devices")
        if plan is not None:
            yield f"--devices {plan.layout.num_devices} ({plan.layout}, {plan.scheme.name})"
            break


def _smaller_schemes(tried: Sequence[WeightScheme], config: ModelConfig) -> Iterator[WeightScheme]:
    """INT8 and INT4 in groups of 32, where they are smaller than all that was tried."""
    smallest = min(tried, key=lambda scheme: scheme.bits)
    if smallest.bits > 8:
        yield replace(smallest, name="int8", bits=8, group_size=0)
    widths = (config.hidden_size, config.intermediate_size, config.moe_intermediate_size or 32)
    if smallest.bits > 4 and not any(width % 32 for width in widths):
        yield replace(smallest, name="int4", bits=4, group_size=32, group_bytes=2)
