"""The `aios-parallel` command: how to spread a model over hardware, before renting it. Torch is never imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from aios_model.command_line import Revision, run_command
from aios_model.errors import ConfigError
from aios_parallel import cli_options as options
from aios_parallel.cli_options import CHOICE, HARDWARE, OUTPUT, WORK

if TYPE_CHECKING:
    from aios_model.config import ModelConfig
    from aios_model.weights.hub import ModelFiles

HELP = """
Tells how to spread a model over the devices you have, or think of renting, and what that gives.

[bold]Examples[/bold]

  [cyan]aios-parallel plan Qwen/Qwen3-8B --devices 2 --device-type rtx-4090[/cyan]
  shards, bytes per rank, predicted times, and the aios-serve command to run

  [cyan]aios-parallel plan ./llama-70b --devices 16 --hosts 2 --device-type h100 --network infiniband --batch 256[/cyan]
  two hosts: what goes between them, what stays within

  [cyan]aios-parallel scaling Qwen/Qwen3-8B --device-type h100 --plot scaling.svg[/cyan]
  tokens per second from 1 to 8 x 8 devices
"""

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich", help=HELP)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `aios-parallel`; ends the process. A mistake in the arguments is one line and status 2."""
    run_command(app, "aios-parallel", args)


@app.command()
def plan(
    model: options.ModelArgument = None,
    *,
    devices: Annotated[int, typer.Option(rich_help_panel=HARDWARE, min=1, help="Devices, in all hosts together.")] = 1,
    hosts: Annotated[int, typer.Option(rich_help_panel=HARDWARE, min=1, help="Hosts they are in, evenly.")] = 1,
    device_type: options.DeviceType = "cpu",
    memory: options.Memory = None,
    bandwidth: options.Bandwidth = None,
    flops: options.Flops = None,
    interconnect: options.Interconnect = "auto",
    link_bandwidth: options.LinkBandwidth = None,
    link_latency: options.LinkLatency = None,
    network: options.Network = "ethernet",
    network_bandwidth: options.NetworkBandwidth = None,
    network_latency: options.NetworkLatency = None,
    collectives: options.Collectives = None,
    batch: Annotated[int, typer.Option(rich_help_panel=WORK, min=1, help="Sequences decoded together.")] = 64,
    context: options.Context = None,
    prompt: options.Prompt = None,
    max_num_batched_tokens: options.StepTokens = None,
    kv_cache_dtype: options.KVDType = "auto",
    device_memory_utilization: options.Utilization = 0.9,
    quantization: Annotated[
        str,
        typer.Option(
            rich_help_panel=CHOICE,
            metavar="SCHEME,…",
            help="Weights to plan with: none, int8, fp8, int4 (int4-g32, -g64, -g128), as-stored. auto: as stored if "
            "the checkpoint is packed, else none, int8 and int4.",
        ),
    ] = "auto",
    objective: Annotated[
        options.Objective,
        typer.Option(
            rich_help_panel=CHOICE,
            help="throughput: most tokens per second. latency: fastest for one user alone. devices: fewest devices.",
        ),
    ] = "throughput",
    tensor_parallel_size: Annotated[
        int | None,
        typer.Option(
            "--tensor-parallel-size",
            "-tp",
            rich_help_panel=CHOICE,
            min=1,
            help="Only plans with this TP.",
            show_default="any",
        ),
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None,
        typer.Option(
            "--pipeline-parallel-size",
            "-pp",
            rich_help_panel=CHOICE,
            min=1,
            help="Only plans with this PP.",
            show_default="any",
        ),
    ] = None,
    data_parallel_size: Annotated[
        int | None,
        typer.Option(
            "--data-parallel-size",
            "-dp",
            rich_help_panel=CHOICE,
            min=1,
            help="Only plans with this DP.",
            show_default="any",
        ),
    ] = None,
    enable_expert_parallel: Annotated[
        bool,
        typer.Option(
            "--enable-expert-parallel", rich_help_panel=CHOICE, help="Only plans with whole experts per rank."
        ),
    ] = False,
    top: Annotated[int, typer.Option(rich_help_panel=OUTPUT, min=1, help="Plans to list.")] = 12,
    json: options.Json = False,
    plot: options.Plot = None,
    revision: Revision = None,
) -> int:
    """Recommends how to spread MODEL over devices, with the reasons and the aios-serve command.

    It reads the configuration only: no weights, no torch, no such device needed here.

    [dim]aios-parallel plan Qwen/Qwen3-8B --devices 8 --device-type h100 --batch 256 --objective latency[/dim]
    """
    from aios_parallel.planning.advice import recommend
    from aios_parallel.planning.assumptions import list_assumptions
    from aios_parallel.planning.plans import LayoutFilter, find_plans
    from aios_parallel.planning.report import PlanReport, plan_json, plan_plot, print_plan, write_text
    from aios_parallel.planning.request import HardwareRequest, choose_schemes, make_workload

    files, config = _read_model(model, revision)
    cluster = HardwareRequest(
        device_type=device_type,
        num_devices=devices,
        num_hosts=hosts,
        memory=memory,
        bandwidth=bandwidth,
        flops=flops,
        interconnect=interconnect,
        network=network,
        link_bandwidth=link_bandwidth,
        link_latency=link_latency,
        network_bandwidth=network_bandwidth,
        network_latency=network_latency,
        collectives=collectives,
    ).cluster()
    schemes = choose_schemes(quantization, config, cluster.device, files)
    work = make_workload(
        config,
        cluster.device,
        batch=batch,
        context=context,
        prompt=prompt,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_dtype=kv_cache_dtype,
        utilization=device_memory_utilization,
    )
    wanted = LayoutFilter(
        tensor=tensor_parallel_size,
        pipeline=pipeline_parallel_size,
        data=data_parallel_size,
        expert_parallel=enable_expert_parallel or None,
    )
    plans = find_plans(config, schemes, cluster, work, wanted=wanted)
    report = PlanReport(
        model=files.name,
        config=config,
        cluster=cluster,
        workload=work,
        assumptions=list_assumptions(config, schemes, cluster, work),
        recommendation=recommend(plans, objective, model=model),
        plans=plans,
        objective=objective,
    )
    if json:
        typer.echo(plan_json(report), nl=False)
    else:
        print_plan(Console(), report, num_rows=top)
    if plot is not None:
        write_text(plot, plan_plot(report))
    return 0


@app.command()
def scaling(
    model: options.ModelArgument = None,
    *,
    max_devices_per_host: Annotated[
        int, typer.Option(rich_help_panel=HARDWARE, min=1, help="Largest TP, within a host.")
    ] = 8,
    max_hosts: Annotated[int, typer.Option(rich_help_panel=HARDWARE, min=1, help="Most hosts.")] = 8,
    device_type: options.DeviceType = "h100",
    memory: options.Memory = None,
    bandwidth: options.Bandwidth = None,
    flops: options.Flops = None,
    interconnect: options.Interconnect = "auto",
    link_bandwidth: options.LinkBandwidth = None,
    link_latency: options.LinkLatency = None,
    network: options.Network = "ethernet",
    network_bandwidth: options.NetworkBandwidth = None,
    network_latency: options.NetworkLatency = None,
    collectives: options.Collectives = None,
    batch_per_device: Annotated[
        int, typer.Option(rich_help_panel=WORK, min=1, help="Sequences decoded together, per device.")
    ] = 16,
    context: options.Context = None,
    prompt: options.Prompt = None,
    max_num_batched_tokens: options.StepTokens = None,
    kv_cache_dtype: options.KVDType = "auto",
    device_memory_utilization: options.Utilization = 0.9,
    quantization: Annotated[
        str,
        typer.Option(rich_help_panel=WORK, metavar="SCHEME", help="Weights: none, int8, fp8, int4, as-stored."),
    ] = "none",
    enable_expert_parallel: Annotated[
        bool, typer.Option("--enable-expert-parallel", rich_help_panel=WORK, help="Whole experts per rank.")
    ] = False,
    json: options.Json = False,
    plot: options.Plot = None,
    revision: Revision = None,
) -> int:
    """Models weak scaling: tokens per second as devices are added and each keeps its number of sequences.

    TP grows within a host; beyond it, hosts are added as replicas (DP) and as pipeline stages (PP).

    [dim]aios-parallel scaling Qwen/Qwen3-8B --device-type h100 --network infiniband --plot scaling.svg[/dim]
    """
    from aios_parallel.planning.assumptions import list_assumptions
    from aios_parallel.planning.report import print_assumptions, write_text
    from aios_parallel.planning.request import HardwareRequest, choose_schemes, make_workload
    from aios_parallel.planning.scaling import scaling_json, scaling_plot, scaling_table, weak_scaling

    files, config = _read_model(model, revision)
    cluster = HardwareRequest(
        device_type=device_type,
        num_devices=max_devices_per_host * max_hosts,
        num_hosts=max_hosts,
        memory=memory,
        bandwidth=bandwidth,
        flops=flops,
        interconnect=interconnect,
        network=network,
        link_bandwidth=link_bandwidth,
        link_latency=link_latency,
        network_bandwidth=network_bandwidth,
        network_latency=network_latency,
        collectives=collectives,
    ).cluster()
    schemes = choose_schemes(quantization, config, cluster.device, files)
    if len(schemes) != 1:
        raise ConfigError(f"--quantization {quantization!r} names several schemes; a curve is drawn for one")
    work = make_workload(
        config,
        cluster.device,
        batch=batch_per_device,
        context=context,
        prompt=prompt,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_dtype=kv_cache_dtype,
        utilization=device_memory_utilization,
    )
    points = weak_scaling(config, schemes[0], cluster, work, expert_parallel=enable_expert_parallel)
    assumptions = list_assumptions(config, schemes, cluster, work)
    title = f"{files.name} ({schemes[0].name}) on {cluster.device.name}, {batch_per_device} sequences per device"
    if json:
        typer.echo(scaling_json(points, model=files.name, assumptions=assumptions), nl=False)
    else:
        console = Console()
        print_assumptions(console, assumptions)
        console.print(scaling_table(points, title=title))
    if plot is not None:
        write_text(plot, scaling_plot(points, title=title))
    return 0


def _read_model(model: str | None, revision: str | None) -> tuple[ModelFiles, ModelConfig]:
    from aios_model.config_file import read_model_config
    from aios_model.weights.hub import resolve_model

    files = resolve_model(model, revision=revision, tokenizer_only=True)
    return files, read_model_config(files, allow_quantized=True)


if __name__ == "__main__":
    main()
