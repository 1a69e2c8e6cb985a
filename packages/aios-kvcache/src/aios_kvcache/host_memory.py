"""How much memory this process may still take, on the host and inside a container."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_UNLIMITED = 1 << 60  # version 1 of cgroups writes a number near 2**63 for "no limit"


def available_memory(*, root: Path = Path("/")) -> int:
    """Bytes that can be taken without swapping and without being killed for it.

    The least of what the host calls available and of what each enclosing memory cgroup (version 1 or 2) leaves: its
    limit, less its usage, with file pages not in use counted as free, as Kubernetes counts its working set.

    Args:
        root: Where to look for `proc` and `sys`.
    """
    return max(0, min([_host_available(root), *_cgroup_available(root)]))


def _host_available(root: Path) -> int:
    fields = _read_fields(root / "proc/meminfo")
    if "MemAvailable:" in fields:
        return fields["MemAvailable:"] * 1024
    import psutil  # where there is no /proc: macOS and Windows

    return psutil.virtual_memory().available


def _cgroup_available(root: Path) -> Iterator[int]:
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            names = ("memory.max", "memory.current", "inactive_file")
            yield from _walk_up(root / "sys/fs/cgroup", path, names)
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _walk_up(root / "sys/fs/cgroup/memory", path, names)


def _walk_up(mount: Path, path: str, names: tuple[str, str, str]) -> Iterator[int]:
    """What the cgroup and each of its ancestors leave. In a container the path may exist in part, or not at all."""
    limit_name, usage_name, reclaimable_name = names
    group = mount / path.strip("/")
    while group.is_relative_to(mount):
        limit, usage = _read(group / limit_name).strip(), _read(group / usage_name).strip()
        if limit.isdigit() and usage.isdigit() and int(limit) < _UNLIMITED:
            yield int(limit) - int(usage) + _read_fields(group / "memory.stat").get(reclaimable_name, 0)
        group = group.parent


def _read_fields(file: Path) -> dict[str, int]:
    rows = [line.split() for line in _read(file).splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
