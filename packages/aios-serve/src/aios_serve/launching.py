"""Starts the ranks of a group in the way that the options name."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aios_parallel.control.driver import RankGroup
from aios_parallel.launch.processes import RankProcesses

if TYPE_CHECKING:
    from collections.abc import Callable

    from aios_parallel.mesh import Mesh
    from aios_serve.config import EngineConfig


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


def start_ranks(config: EngineConfig, mesh: Mesh, progress: Callable[[str, float | None], None]) -> StartedRanks:
    """Starts them all.

    Raises:
        ParallelError: Some did not come up.
        ConfigError: This way of starting them is not possible here.
    """
    return _processes(config, mesh)


def _processes(config: EngineConfig, mesh: Mesh) -> StartedRanks:
    """All ranks on this host."""
    command = [sys.executable, "-m", "aios_serve.rank_process", "--log-level", config.log_level]
    processes = RankProcesses(command)
    group = RankGroup(
        [processes.start(rank) for rank in range(mesh.size)],
        end_processes=processes.end,
        describe_rank=processes.describe,
        silence=config.rank_timeout,
    )
    return StartedRanks(group=group, hosts=["here"] * mesh.size, addresses=[""] * mesh.size)
