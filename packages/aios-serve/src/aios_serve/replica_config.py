"""How the machine is shared among replicas: threads, cores to bind to, GPUs. Never imports torch."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from aios_model.errors import ConfigError
from aios_model.native.cores import parse_cpu_list, resolve_cpu_bind, usable_cores
from aios_serve.launching import resolve_executor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aios_serve.config import EngineConfig

_GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"


def replica_config(config: EngineConfig, replica: int, *, num_cores: int | None = None) -> EngineConfig:
    """The options of one of `config.data_parallel` engines: its share of the cores. One alone keeps what it has.

    `threads` are those of a rank, `cpu_bind` is that of all ranks of the engine, as everywhere.

    Args:
        config: The options of all.
        replica: Number of the engine.
        num_cores: Cores that the process may use; None asks the system.

    Raises:
        ConfigError: `cpu_bind` names fewer CPUs than the replicas have threads.
    """
    count = config.data_parallel
    if count == 1:
        return config
    cpus = None if config.cpu_bind in ("auto", "none") else parse_cpu_list(config.cpu_bind)
    cores = len(cpus) if cpus else usable_cores() if num_cores is None else num_cores
    threads = config.threads or max(1, cores // (count * config.num_ranks))
    width = threads * config.num_ranks
    if config.cpu_bind != "none":
        cpus = resolve_cpu_bind(cpus or "auto", num_threads=width * count)
    mine = "none" if cpus is None else ",".join(map(str, cpus[replica * width : (replica + 1) * width]))
    return replace(config, threads=threads, cpu_bind=mine)


def replica_environment(config: EngineConfig, replica: int, *, gpus: Sequence[str] | None = None) -> Mapping[str, str]:
    """Variables to set for the process of one engine, so that each replica sees GPUs of its own.

    Args:
        config: The options of all.
        replica: Number of the engine.
        gpus: Names of the GPUs that may be used; None asks the system.

    Raises:
        ConfigError: there are GPUs, but not enough of them; or ranks come from torchrun, which starts them for one.
    """
    if config.data_parallel == 1:
        return {}
    if config.num_ranks > 1 and resolve_executor(config) == "torchrun":
        raise ConfigError(
            f"data_parallel={config.data_parallel} cannot be used under torchrun, which starts the ranks of one "
            "engine; run a server per replica, or use distributed_executor='ray'"
        )
    if config.device == "cpu" or config.distributed_executor == "ray":
        return {}  # Ray gives GPUs to ranks by itself
    gpus = visible_gpus() if gpus is None else gpus
    if not gpus:
        return {}
    each = config.num_ranks
    if len(gpus) < config.data_parallel * each:
        raise ConfigError(
            f"data_parallel={config.data_parallel} cannot be used: the replicas need {config.data_parallel * each} "
            f"GPUs and {len(gpus)} can be seen; ask for fewer replicas, or for device=cpu"
        )
    return {_GPU_VARIABLE: ",".join(gpus[replica * each : (replica + 1) * each])}


def visible_gpus(*, environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> list[str]:
    """Names of NVIDIA's GPUs as CUDA_VISIBLE_DEVICES would have them, without loading a driver.

    Args:
        environment: Where the variable may be set already.
        devices: Where device files are.
    """
    if _GPU_VARIABLE in environment:
        names = [name.strip() for name in environment[_GPU_VARIABLE].split(",")]
        return [name for name in names if name and name != "-1"]
    return [str(number) for number, _ in enumerate(devices.glob("nvidia[0-9]*"))]
