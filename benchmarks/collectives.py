"""How long ranks on this host take to exchange tensors: shared memory of our own beside gloo, in one run.

Each row is one operation on float32 tensors of one size. The transports take turns, every rank is a process with one
thread, and a figure is the median of what the slowest rank saw, with the 10th and the 99th percentile beside it.

    uv run python benchmarks/collectives.py                              # two ranks, under a minute
    uv run python benchmarks/collectives.py --ranks 4 --sizes 2048 1048576 --json times.json
    uv run aios-parallel scaling --collectives times.json                # plans with these times

Rows:
    all-reduce shared        sums in the order of ranks, `SharedMemoryCommunicator`
    all-reduce native        the same, as native steps call it, without Python around it
    all-reduce gloo          sums in the order of ranks, `TorchCommunicator`
    all-reduce gloo's own    round a ring: an element's sum depends on where it lies
    gather shared, gloo      every rank's tensor to the first rank
    one way shared, gloo     half of a tensor's way to another rank and back, as between stages of a pipeline
GB/s are bytes of the tensor over time, whatever is moved for it.

`--json` writes the medians of shared memory as those within a host, and of gloo, which goes over the loopback here, as
those between hosts: a network that costs nothing but the software.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import secrets
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from aios_parallel.communicator import Communicator
from aios_parallel.shared_memory import SharedMemoryCommunicator
from aios_parallel.torch_group import TorchCommunicator

Operation = Callable[[Tensor], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Microseconds of one operation on `numel` float32."""

    operation: str
    numel: int
    median: float
    tenth: float
    ninety_ninth: float

    @property
    def kind(self) -> str:
        """The operation without the transport."""
        return self.operation.rpartition(" ")[0]

    def row(self) -> str:
        """A line of the Markdown table."""
        rate = 4 * self.numel / self.median / 1e3
        return (
            f"| {self.operation} | {self.numel:,} | {self.median:.1f} | {self.tenth:.1f} | {self.ninety_ninth:.1f} | "
            f"{rate:.2f} |"
        )


def operations(rank: int, size: int, run: str, port: int) -> dict[str, Operation]:
    """What is measured, by name; all ranks make the same ones."""
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0, timeout=timedelta(seconds=60))
    shared = SharedMemoryCommunicator.open(f"/dev/shm/aios-bench-{run}", rank=rank, size=size, timeout=60)
    gloo = gloo_group("ordered", store, rank, size)
    ring = gloo_group("ring", store, rank, size, batch_invariant=False)
    return {
        "all-reduce shared": shared.all_reduce,
        "all-reduce native": native_reduce(shared),
        "all-reduce gloo": gloo.all_reduce,
        "all-reduce gloo's own": ring.all_reduce,
        "gather shared": shared.gather,
        "gather gloo": gloo.gather,
        "one way shared": there_and_back(shared),
        "one way gloo": there_and_back(gloo),
    }


def gloo_group(
    name: str, store: dist.Store, rank: int, size: int, *, batch_invariant: bool = True
) -> TorchCommunicator:
    """A group of its own over gloo."""
    own = dist.PrefixStore(name, store)
    return TorchCommunicator.create(own, rank=rank, size=size, timeout=60, batch_invariant=batch_invariant)


def native_reduce(shared: SharedMemoryCommunicator) -> Operation:
    """The C function that native steps are given."""
    reduce = shared.native_reduce
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(reduce.function)
    return lambda x: function(reduce.context, x.data_ptr(), x.numel())


def there_and_back(group: Communicator) -> Operation:
    """From rank 0 to rank 1 and back; others do nothing."""

    def move(x: Tensor) -> None:
        if group.rank == 0:
            group.send(x, to=1)
            group.receive(x, source=1)
        elif group.rank == 1:
            group.receive(x, source=0)
            group.send(x, to=0)

    return move


def work(rank: int, arguments: argparse.Namespace, run: str, pipe: Connection) -> None:
    """A rank: measures everything and hands in its seconds, {(operation, numel): [...]}."""
    torch.set_num_threads(1)
    measured: dict[tuple[str, int], list[float]] = {}
    named = operations(rank, arguments.ranks, run, arguments.port)
    for _ in range(arguments.repeats):
        for numel in arguments.sizes:
            for name, operation in named.items():
                measured.setdefault((name, numel), []).extend(seconds(operation, numel, arguments.budget))
    pipe.send(measured)


def seconds(operation: Operation, numel: int, budget: int) -> list[float]:
    """Times of some calls in a row: fewer of large tensors, and the same number on all ranks."""
    x = torch.randn(numel)
    times = []
    for _ in range(3 + max(20, min(1000, budget // numel))):
        started = time.perf_counter()
        operation(x)
        times.append(time.perf_counter() - started)
        x.clamp_(-1, 1)  # sums of sums would not stay finite
    return times[3:]


def figures(ranks: list[dict[tuple[str, int], list[float]]]) -> list[Figure]:
    """Of each call the slowest rank's time, then their order statistics."""
    result = []
    for name, numel in ranks[0]:
        slowest = [max(times) for times in zip(*(rank[name, numel] for rank in ranks), strict=True)]
        half = 0.5 if name.startswith("one way") else 1.0
        cuts = [1e6 * half * cut for cut in statistics.quantiles(slowest, n=100)]
        result.append(Figure(operation=name, numel=numel, median=cuts[49], tenth=cuts[9], ninety_ninth=cuts[98]))
    return sorted(result, key=lambda figure: (figure.numel, not figure.operation.startswith("all"), figure.operation))


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """Starts the ranks and collects what they measured."""
    context = multiprocessing.get_context("spawn")
    run = secrets.token_hex(8)
    pipes = [context.Pipe(duplex=False) for _ in range(arguments.ranks)]
    processes = [
        context.Process(target=work, args=(rank, arguments, run, sender)) for rank, (_, sender) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    measured = [receiver.recv() for receiver, _ in pipes]
    for process in processes:
        process.join()
    return figures(measured)


def planning_times(measured: list[Figure], num_ranks: int) -> dict[str, object]:
    """The figures as `aios-parallel plan --collectives` reads them; see docs/en/planning.md."""
    operations = {"all-reduce": "all_reduce", "gather": "gather", "one way": "send"}
    links = {"shared": "host", "gloo": "network"}
    rows = [
        {
            "operation": operations[figure.kind],
            "link": links[transport],
            "bytes": 4 * figure.numel * (num_ranks if figure.kind == "gather" else 1),
            "ranks": 2 if figure.kind == "one way" else num_ranks,
            "seconds": figure.median / 1e6,
        }
        for figure in measured
        if (transport := figure.operation.rpartition(" ")[2]) in links
    ]
    name = f"{num_ranks} ranks on {os.cpu_count()} CPUs of {platform.machine()}: shared memory, gloo over loopback"
    return {"name": name, "rows": rows}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes, at least 2")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 16_384, 262_144, 1_048_576])
    parser.add_argument("--repeats", type=int, default=3, help="turns that each transport takes")
    parser.add_argument("--budget", type=int, default=10_000_000, help="numbers per operation, size and turn")
    parser.add_argument("--port", type=int, default=29_517, help="where the ranks of gloo find each other")
    parser.add_argument("--json", type=Path, help="write times for aios-parallel plan --collectives there")
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        parser.error("--ranks: one rank has nobody to exchange tensors with")
    print(f"{arguments.ranks} ranks, {os.cpu_count()} CPUs of {platform.machine()}, torch {torch.__version__}\n")
    print("| operation | float32 | median us | 10% | 99% | GB/s |\n|---|---|---|---|---|---|")
    result = measure(arguments)
    for figure in result:
        print(figure.row(), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(planning_times(result, arguments.ranks), indent=1))


if __name__ == "__main__":
    main()
