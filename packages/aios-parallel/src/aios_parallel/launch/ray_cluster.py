"""Ranks on a Ray cluster: Ray finds room for them and starts them, one actor each.

An actor runs its rank as a process, which connects to the driver as any other does; Ray takes no part in steps.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aios_model.errors import ConfigError
from aios_parallel.errors import ParallelError

if TYPE_CHECKING:
    from types import ModuleType

logger = logging.getLogger(__name__)

_READY_SECONDS = 120.0


@dataclass(slots=True, kw_only=True)
class RayRanks:
    """Actors that run ranks, and the room that is kept for them."""

    actors: list[Any] = field(default_factory=list)
    group: Any = None

    def end(self) -> None:
        """Ends the actors and gives their room back; calling it twice is fine."""
        import ray
        from ray.util import remove_placement_group

        actors, self.actors = self.actors, []
        for actor in actors:
            ray.kill(actor)
        group, self.group = self.group, None
        if group is not None:
            remove_placement_group(group)


def start_on_ray(
    command: Sequence[str],
    *,
    num_ranks: int,
    ranks_per_stage: int,
    resources: Mapping[str, float],
    environment: Mapping[str, str],
    address: str | None,
) -> RayRanks:
    """Starts a process per rank on a Ray cluster.

    Args:
        command: What runs a rank; `--rank N` is appended.
        num_ranks: How many.
        ranks_per_stage: Ranks that exchange most: they are kept on one node where there is room for them.
        resources: What a rank takes of its node, such as `{"CPU": 2}` or `{"GPU": 1, "CPU": 1}`.
        environment: Variables to set in their processes.
        address: Of the cluster; None for the one this process belongs to, or else a new one on this host.

    Raises:
        ConfigError: Ray is not installed.
        ParallelError: There is no cluster at that address, or no room on it.
    """
    ray = _import_ray()
    _connect(ray, address)
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ranks = RayRanks()
    try:
        ranks.group = placement_group([dict(resources) for _ in range(num_ranks)], strategy="PACK")
        if not ranks.group.wait(_READY_SECONDS):
            raise ParallelError(
                f"the Ray cluster has no room for {num_ranks} ranks of {dict(resources)}: it offers "
                f"{ray.cluster_resources()}; add nodes, or ask for fewer ranks or threads"
            )
        actor_class = ray.remote(max_restarts=0, max_concurrency=2)(RankActor)
        for bundle in range(num_ranks):
            strategy = PlacementGroupSchedulingStrategy(ranks.group, placement_group_bundle_index=bundle)
            options = {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0)}
            ranks.actors.append(actor_class.options(scheduling_strategy=strategy, **options).remote())
        ranks.actors = _neighbours_first(ray, ranks.actors, ranks_per_stage)
        started = [
            actor.start.remote([*command, "--rank", str(rank)], dict(environment))
            for rank, actor in enumerate(ranks.actors)
        ]
        ray.get(started, timeout=_READY_SECONDS)
    except BaseException:
        ranks.end()
        raise
    return ranks


class RankActor:
    """Holds a rank's place on its node; what it starts ends with its driver."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def node(self) -> str:
        """Which node it is on."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def start(self, command: list[str], environment: dict[str, str]) -> int:
        """Starts the process of the rank; returns its id."""
        self._process = subprocess.Popen(command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL)
        return self._process.pid


def _neighbours_first(ray: ModuleType, actors: list[Any], ranks_per_stage: int) -> list[Any]:
    """Orders actors by node, nodes with room for whole stages first, so that a stage seldom spans nodes."""
    nodes = ray.get([actor.node.remote() for actor in actors], timeout=_READY_SECONDS)
    counts = {node: nodes.count(node) for node in nodes}
    order = sorted(range(len(actors)), key=lambda i: (counts[nodes[i]] % ranks_per_stage, nodes[i], i))
    return [actors[index] for index in order]


def _import_ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "distributed_executor='ray' needs Ray, which is not installed: pip install 'aios-serve[ray]'"
        ) from error
    return ray


def _connect(ray: ModuleType, address: str | None) -> None:
    if ray.is_initialized():
        return
    try:
        ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ParallelError(f"no Ray cluster could be joined at {address or 'this host'}: {error}") from error
