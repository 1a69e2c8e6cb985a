"""What figures were taken on: they mean nothing without it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

# Those that matter to matrix products and integer dot products.
_INTERESTING_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
)


def describe_machine() -> dict[str, Any]:
    """Processor, its vector instructions, cores, memory and versions of what lies below."""
    info = _cpuinfo()
    flags = info.get("flags", "").split()
    return {
        "processor": info.get("model name") or platform.processor() or platform.machine(),
        "instructions": [flag for flag in _INTERESTING_FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def machine_line(machine: dict[str, Any], *, threads: int) -> str:
    """One line for below a table."""
    memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB" if machine["memory_bytes"] else ""
    cores = f"{machine['cores']} cores{memory}, {threads} threads"
    return f"{machine['processor']} ({', '.join(machine['instructions'])}), {cores}"


class Elsewhere:
    """Cores that others keep busy from now on, the host's other guests included: figures taken beside them are wrong.

    Not even ratios hold then: engines that spin at barriers lose far more of their speed than others.
    """

    def __init__(self) -> None:
        self._start = _seconds()

    def cores(self) -> float | None:
        """On average until now, without this process and the children that it has waited for; None where unknown."""
        now = _seconds()
        if now is None or self._start is None:
            return None
        wall, busy, own = (after - before for after, before in zip(now, self._start, strict=True))
        return max(0.0, busy - own) / wall if wall else None


def _seconds() -> tuple[float, float, float] | None:
    """Wall clock; cores' time that was not idle; this process's and its children's share of it."""
    file = Path("/proc/stat")
    if not file.exists():
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; guest time is in user already.
    ticks = [int(field) for field in file.read_text().split("\n", 1)[0].split()[1:9]]
    busy = (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK")
    times = os.times()
    return times.elapsed, busy, times.user + times.system + times.children_user + times.children_system


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is none."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return {}
    lines = file.read_text().split("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
