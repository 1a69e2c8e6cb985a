"""Starts the ranks of a group in the way that the options name."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aios_model.errors import ConfigError
from aios_parallel.control.driver import RankGroup
from aios_parallel.control.handshake import host_identity, new_token
from aios_parallel.launch.listening import RankListener
from aios_parallel.launch.processes import RankProcesses
from aios_parallel.launch.torchrun import TorchrunPlace, publish_driver

if TYPE_CHECKING:
    from collections.abc import Callable

    from aios_parallel.control.connection import Connection
    from aios_parallel.launch.listening import JoinedRank
    from aios_parallel.mesh import Mesh
    from aios_serve.config import EngineConfig

    Progress = Callable[[str, float | None], None]

TOKEN_VARIABLE = "AIOS_RUN_TOKEN"
JOIN_SECONDS = 600.0
"""How long ranks of other hosts may take to come: pods and nodes do not start at the same moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedRanks:
    """Ranks that run, and have done nothing yet.

    Attributes:
        group: To talk to them.
        hosts: Of each rank, what tells hosts apart.
        addresses: Of each rank, where other hosts reach it; empty within a host.
    """

    group: RankGroup
    hosts: list[str]
    addresses: list[str]


def start_ranks(config: EngineConfig, mesh: Mesh, progress: Progress) -> StartedRanks:
    """Starts them all.

    Raises:
        ParallelError: Some did not come up.
        ConfigError: This way of starting them is not possible here.
    """
    match resolve_executor(config):
        case "torchrun":
            return _torchrun(config, mesh, progress)
        case "ray":
            return _ray(config, mesh, progress)
        case _:
            return _processes(config, mesh)


def resolve_executor(config: EngineConfig) -> str:
    """Who starts the ranks: `mp`, `torchrun` or `ray`."""
    place = TorchrunPlace.from_environment(os.environ)
    if config.distributed_executor == "torchrun" and place is None:
        raise ConfigError(
            "distributed_executor='torchrun' cannot be used: this process was not started by torchrun; run "
            "`torchrun --nnodes=… --nproc-per-node=… -m aios_serve …` on every host"
        )
    if config.distributed_executor == "auto":
        return "mp" if place is None else "torchrun"
    return config.distributed_executor


def _processes(config: EngineConfig, mesh: Mesh) -> StartedRanks:
    """All ranks on this host."""
    processes = RankProcesses(_command(config))
    group = RankGroup(
        [processes.start(rank) for rank in range(mesh.size)],
        end_processes=processes.end,
        describe_rank=processes.describe,
        silence=config.rank_timeout,
    )
    return StartedRanks(group=group, hosts=["here"] * mesh.size, addresses=[""] * mesh.size)


def _torchrun(config: EngineConfig, mesh: Mesh, progress: Progress) -> StartedRanks:
    """The first rank beside this process, the others where torchrun has started them."""
    place = TorchrunPlace.from_environment(os.environ)
    assert place is not None, "asked for torchrun without it"
    check_world(mesh, place)
    token = os.environ.get(TOKEN_VARIABLE) or new_token()
    listener = RankListener("", 0, token=token)
    try:
        store = place.open_store()
        publish_driver(store, place.master_addr, listener.port, token)
        joined = _wait_for(listener, set(range(1, mesh.size)), progress)
    finally:
        listener.close()
    processes = RankProcesses(_command(config))
    connections = {0: processes.start(0), **{rank: each.connection for rank, each in joined.items()}}
    group = _group(config, connections, joined, processes.end)
    hosts = {0: host_identity(), **{rank: each.peer.host for rank, each in joined.items()}}
    addresses = {0: place.master_addr, **{rank: each.peer.address for rank, each in joined.items()}}
    return StartedRanks(
        group=group,
        hosts=[hosts[rank] for rank in range(mesh.size)],
        addresses=[addresses[rank] for rank in range(mesh.size)],
    )


def check_world(mesh: Mesh, place: TorchrunPlace) -> None:
    """Raises ConfigError unless torchrun has started as many processes as there are to be ranks."""
    if place.world_size != mesh.size:
        raise ConfigError(
            f"torchrun has started {place.world_size} processes, but tensor_parallel={mesh.tensor} times "
            f"pipeline_parallel={mesh.pipeline} makes {mesh.size} ranks; nnodes times nproc-per-node must be that"
        )


def _ray(config: EngineConfig, mesh: Mesh, progress: Progress) -> StartedRanks:
    """All ranks where Ray finds room for them."""
    from aios_parallel.launch.ray_cluster import start_on_ray

    token = os.environ.get(TOKEN_VARIABLE) or new_token()
    listener = RankListener("", 0, token=token)
    address = _own_address(config.ray_address)
    progress("asking Ray for room", None)
    resources = {"CPU": float(config.threads or 1)} if config.device == "cpu" else {"GPU": 1.0, "CPU": 1.0}
    try:
        actors = start_on_ray(
            [*_command(config), "--connect", f"{address}:{listener.port}"],
            num_ranks=mesh.size,
            ranks_per_stage=mesh.tensor,
            resources=resources,
            environment={TOKEN_VARIABLE: token},
            address=config.ray_address,
        )
        try:
            joined = _wait_for(listener, set(range(mesh.size)), progress)
        except BaseException:
            actors.end()
            raise
    finally:
        listener.close()
    group = _group(config, {rank: each.connection for rank, each in joined.items()}, joined, actors.end)
    peers = [joined[rank].peer for rank in range(mesh.size)]
    return StartedRanks(group=group, hosts=[peer.host for peer in peers], addresses=[peer.address for peer in peers])


def _group(
    config: EngineConfig,
    connections: dict[int, Connection],
    joined: dict[int, JoinedRank],
    end_processes: Callable[[], None],
) -> RankGroup:
    def describe(rank: int) -> str:
        return f"rank {rank} on {joined[rank].peer.address}" if rank in joined else f"rank {rank}"

    return RankGroup(
        [connections[rank] for rank in sorted(connections)],
        end_processes=end_processes,
        describe_rank=describe,
        silence=config.rank_timeout,
    )


def _wait_for(listener: RankListener, ranks: set[int], progress: Progress) -> dict[int, JoinedRank]:
    def report(missing: int) -> None:
        progress(f"waiting for {missing} of {len(ranks)} ranks", None)

    return listener.wait_for(ranks, timeout=JOIN_SECONDS, report=report)


def _own_address(peer: str | None) -> str:
    """The address by which hosts of the cluster reach this one: that of the route to its head, if it has one."""
    host = (peer or "").rpartition(":")[0].rpartition("/")[2]
    if not host:
        import ray.util

        return ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return probe.getsockname()[0]


def _command(config: EngineConfig) -> list[str]:
    return [sys.executable, "-m", "aios_serve.rank_process", "--log-level", config.log_level]
