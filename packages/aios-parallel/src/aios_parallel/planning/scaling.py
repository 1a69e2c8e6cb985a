"""Weak scaling: what more devices give when each gets as many sequences as before.

Within a host the ranks share every layer (TP = 1, 2, 4, …); beyond it, whole hosts are added as replicas (DP) or as
pipeline stages (PP).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from aios_model.config import ModelConfig
from aios_parallel.planning.errors import PlanError
from aios_parallel.planning.hardware import Cluster, Workload
from aios_parallel.planning.loads import Layout
from aios_parallel.planning.plans import Plan, make_plan
from aios_parallel.planning.plot import Series, log_plot
from aios_parallel.planning.quantities import show_bytes, show_number
from aios_parallel.planning.report import plan_figures
from aios_parallel.planning.weights import WeightScheme


@dataclass(frozen=True, kw_only=True)
class ScalingPoint:
    """One number of devices.

    Attributes:
        name: How hosts are joined: `TP` within one, `TP + DP` or `TP + PP` across.
        num_hosts: Hosts in use.
        plan: What runs there.
        efficiency: Tokens per second and device over those of the first point that fits; None if this one does not fit.
    """

    name: str
    num_hosts: int
    plan: Plan
    efficiency: float | None


def weak_scaling(
    config: ModelConfig,
    scheme: WeightScheme,
    cluster: Cluster,
    workload: Workload,
    *,
    expert_parallel: bool = False,
) -> list[ScalingPoint]:
    """Points from one device to all of `cluster`; its workload's batch is that of one device.

    Raises:
        PlanError: Not even the largest one fits, or the model cannot be cut so.
    """
    per_host = cluster.devices_per_host
    layouts = [("TP", 1, Layout(tensor=size)) for size in _doubling(per_host)]
    hosts = _doubling(cluster.num_hosts)[1:]
    layouts += [("TP + DP", count, Layout(tensor=per_host, data=count)) for count in hosts]
    layouts += [
        ("TP + PP", count, Layout(tensor=per_host, pipeline=count))
        for count in hosts
        if count <= config.num_hidden_layers
    ]
    points: list[ScalingPoint] = []
    for name, num_hosts, layout in layouts:
        spread = replace(layout, expert_parallel=expert_parallel and layout.tensor > 1)
        plan = _plan(config, scheme, cluster, workload, spread, num_hosts)
        first = next((point.plan for point in points if point.plan.fits), plan)
        efficiency = _per_device(plan) / _per_device(first) if plan.fits else None
        points.append(ScalingPoint(name=name, num_hosts=num_hosts, plan=plan, efficiency=efficiency))
    if not any(point.plan.fits for point in points):
        nearest = min((point.plan for point in points), key=lambda plan: plan.memory.missing)
        raise PlanError(
            f"even {nearest.layout} lacks {show_bytes(nearest.memory.missing)} per device for {scheme.name} weights "
            f"and {workload.batch} sequences per device of {workload.context} tokens; lower --batch-per-device or "
            "--context, or choose a --quantization with fewer bits"
        )
    return points


def scaling_table(points: Sequence[ScalingPoint], *, title: str) -> Table:
    """A row per point."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, caption_justify="left", padding=(0, 0, 0, 1))
    for heading in ("hosts", "TP", "PP", "DP", "batch", "GB", "step", "tok/s", "efficiency", "comm", "bubble"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, point in enumerate(points):
        if number and point.name != points[number - 1].name:
            table.add_section()
        table.add_row(*_cells(point))
    table.caption = (
        "GB: used on the fullest rank. step: ms for one token of every sequence. efficiency: tokens per second and "
        "device over those of the first row that fits; above 100% where ranks share the reading of the weights. comm: "
        "share of a step in collectives. bubble: share that a stage waits."
    )
    return table


def scaling_plot(points: Sequence[ScalingPoint], *, title: str) -> str:
    """Devices against tokens per second as SVG, with the line of perfect scaling."""
    fitting = [point for point in points if point.plan.fits]
    inside = [point for point in fitting if point.num_hosts == 1]
    series = []
    for name in dict.fromkeys(point.name for point in fitting):
        own = [point for point in fitting if point.name == name]
        joined = own if name == "TP" else [*inside[-1:], *own]
        series.append(Series(name=name, points=[_place(point) for point in joined]))
    start, end = fitting[0], max(fitting, key=lambda point: point.plan.layout.num_devices)
    devices = (start.plan.layout.num_devices, end.plan.layout.num_devices)
    ideal = [(float(count), _per_device(start.plan) * count) for count in devices]
    series.append(Series(name="perfect", points=ideal))
    return log_plot(series, title=title, x_title="devices", y_title="tokens per second")


def scaling_json(points: Sequence[ScalingPoint], *, model: str, assumptions: Sequence[str]) -> str:
    """All of it as a JSON object, unrounded."""
    rows: list[dict[str, Any]] = [
        {
            "name": point.name,
            "num_devices": point.plan.layout.num_devices,
            "num_hosts": point.num_hosts,
            "batch": point.plan.costs.workload.batch,
            "efficiency": point.efficiency,
            **plan_figures(point.plan),
        }
        for point in points
    ]
    return json.dumps({"model": model, "assumptions": list(assumptions), "points": rows}, indent=2) + "\n"


def _plan(
    config: ModelConfig, scheme: WeightScheme, cluster: Cluster, workload: Workload, layout: Layout, num_hosts: int
) -> Plan:
    part = replace(cluster, num_devices=cluster.devices_per_host * num_hosts, num_hosts=num_hosts)
    work = replace(workload, batch=workload.batch * layout.num_devices)
    return make_plan(config, scheme, part, work, layout)


def _doubling(most: int) -> list[int]:
    """1, 2, 4, … and `most` itself."""
    return sorted({*(1 << power for power in range(most.bit_length()) if 1 << power <= most), most})


def _per_device(plan: Plan) -> float:
    return plan.tokens_per_second / plan.layout.num_devices


def _place(point: ScalingPoint) -> tuple[float, float]:
    return float(point.plan.layout.num_devices), point.plan.tokens_per_second


def _cells(point: ScalingPoint) -> list[str]:
    plan = point.plan
    fixed = [
        str(point.num_hosts),
        f"{plan.layout.tensor}{' EP' if plan.layout.expert_parallel else ''}",
        str(plan.layout.pipeline),
        str(plan.layout.data),
        f"{plan.costs.workload.batch:,}",
        show_number((plan.memory.used - plan.memory.reserve) / 1e9),
    ]
    if point.efficiency is None:
        return [*fixed, "no fit", "", "", "", ""]
    return [
        *fixed,
        show_number(plan.decode.seconds * 1e3),
        show_number(plan.tokens_per_second),
        f"{point.efficiency:.0%}",
        f"{plan.decode.communicating / plan.decode.seconds:.0%}",
        f"{plan.decode.bubble:.0%}",
    ]
