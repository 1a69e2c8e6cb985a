"""Which cores this process may use, how many at once, and which to bind threads to. No torch here."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from aios_model.errors import ConfigError

_ROOT = Path("/")
_MAX_CPUS = 8192  # the most that Linux can be built for; keeps "0-999999999" from becoming a list


def usable_cores(*, root: Path = _ROOT) -> int:
    """Physical cores that this process may keep busy at once.

    Those of its affinity mask, two hardware threads of a core counted as one, but no more than the CPU quota of its
    cgroups (rounded up): threads beyond a quota are put to sleep in the middle of a barrier.

    Args:
        root: Where to look for `proc` and `sys`.
    """
    cpus = usable_cpus()
    cores = len({_siblings(cpu, root) for cpu in cpus})
    return max(1, min([cores, *_quotas(root)]))


@functools.cache
def usable_cpus() -> tuple[int, ...]:
    """Numbers of the logical CPUs in the affinity mask that this process was started with."""
    # Read once: a thread that has been bound to a core since then would answer for itself only.
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def parse_cpu_list(text: str) -> list[int]:
    """CPU numbers from the notation of `taskset` and `/sys`: `0-3,8` is 0, 1, 2, 3 and 8.

    Raises:
        ConfigError: not that notation, a range that runs backwards, a CPU named twice.
    """
    cpus = [cpu for part in text.split(",") for cpu in _parse_range(part.strip(), text)]
    twice = [cpu for cpu, count in Counter(cpus).items() if count > 1]
    if twice:
        raise ConfigError(f"the CPU list {text!r} names CPU {twice[0]} twice")
    return cpus


def resolve_cpu_bind(cpu_bind: str | Sequence[int], *, num_threads: int, root: Path = _ROOT) -> list[int] | None:
    """CPUs to bind a pool of `num_threads` threads to, one each; None to let the operating system place them.

    Args:
        cpu_bind: `none`; `auto`, which binds only where memory has several NUMA nodes: to one node if the threads fit
            into one, to different physical cores first; or the CPUs, as numbers or as a list like `0-3,8`.
        num_threads: Size of the pool.
        root: Where to look for `sys`.

    Raises:
        ConfigError: CPUs that this process may not use, or fewer than threads.
    """
    if cpu_bind == "none":
        return None
    if cpu_bind == "auto":
        return _bind_by_node(num_threads, root)
    cpus = parse_cpu_list(cpu_bind) if isinstance(cpu_bind, str) else list(cpu_bind)
    forbidden = [cpu for cpu in cpus if cpu not in usable_cpus()]
    if forbidden:
        raise ConfigError(
            f"cpu_bind names CPU {forbidden[0]}, which this process may not use; "
            f"it may use: {', '.join(map(str, usable_cpus()))}"
        )
    if len(set(cpus)) < max(num_threads, len(cpus)):
        raise ConfigError(f"cpu_bind names {len(set(cpus))} CPUs for {num_threads} threads; give each thread its own")
    return cpus[:num_threads]


def numa_cores(*, root: Path = _ROOT) -> list[list[int]]:
    """Usable CPUs of each NUMA node that has any, nodes by number; one node of all where the system names none."""
    files = root.glob("sys/devices/system/node/node[0-9]*/cpulist")
    listed = [_read(file) for file in sorted(files, key=lambda file: int(file.parent.name.removeprefix("node")))]
    allowed = set(usable_cpus())
    nodes = [[cpu for cpu in parse_cpu_list(text) if cpu in allowed] for text in listed if text]
    return [node for node in nodes if node] or [list(usable_cpus())]


def _bind_by_node(num_threads: int, root: Path) -> list[int] | None:
    nodes = numa_cores(root=root)
    if len(nodes) == 1 or num_threads > sum(map(len, nodes)):
        return None
    ranked = [_rank_in_core(node, root) for node in nodes]
    roomy = (index for index, ranks in enumerate(ranked) if list(ranks.values()).count(0) >= num_threads)
    first = next(roomy, 0)
    order = [first, *(index for index in range(len(nodes)) if index != first)]
    # Second hardware threads of a core come last, behind the cores of the other nodes.
    places = [(rank, place, cpu) for place, index in enumerate(order) for cpu, rank in ranked[index].items()]
    return [cpu for _, _, cpu in sorted(places)[:num_threads]]


def _rank_in_core(cpus: Sequence[int], root: Path) -> dict[int, int]:
    """For each CPU, how many of those before it share its physical core."""
    seen: Counter[str] = Counter()
    ranks = {}
    for cpu in cpus:
        core = _siblings(cpu, root)
        ranks[cpu] = seen[core]
        seen[core] += 1
    return ranks


def _siblings(cpu: int, root: Path) -> str:
    """The hardware threads of the core that `cpu` belongs to; itself alone where that is not known."""
    return _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu)


def _quotas(root: Path) -> Iterator[int]:
    """Quotas, in cores, of the cgroup (version 1 or 2) and of all around it."""
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            for group in _and_parents(mount, path):
                yield from _cores(*_read(group / "cpu.max").split())
        elif "cpu" in controllers.split(","):
            for group in _and_parents(mount / "cpu", path):
                yield from _cores(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))


def _and_parents(mount: Path, path: str) -> Iterator[Path]:
    """The cgroup and its ancestors. In a container the path may exist in part, or not at all."""
    group = mount / path.strip("/")
    while group.is_relative_to(mount):
        yield group
        group = group.parent


def _cores(quota: str = "", period: str = "") -> Iterator[int]:
    """Microseconds in each period of so many, as cores; nothing for `max`, -1 and files that are not there."""
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        yield max(1, -(-int(quota) // int(period)))


def _parse_range(part: str, text: str) -> range:
    first, dash, last = part.partition("-")
    ends = [first, last] if dash else [first, first]
    if not all(end.isascii() and end.isdigit() and len(end) < 6 for end in ends):
        raise ConfigError(f"the CPU list {text!r} has the part {part!r}; write numbers and ranges like 0-3,8")
    start, stop = map(int, ends)
    if not start <= stop < _MAX_CPUS:
        raise ConfigError(f"the CPU list {text!r} has the range {part!r}; it must ascend and stay below {_MAX_CPUS}")
    return range(start, stop + 1)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
