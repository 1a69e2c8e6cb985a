"""Levels of instruction sets that the native kernels are written for, and which of them this CPU has. No torch here.

A kernel is compiled for one level at a time, with that level's flags and one macro that tells its sources which vectors
to use. A result may differ between levels in rounding, never within one.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from aios_model.errors import ConfigError

VARIABLE = "AIOS_ISA"


@dataclass(frozen=True, slots=True, kw_only=True)
class Isa:
    """One level of instruction sets.

    Attributes:
        name: What `AIOS_ISA` calls it.
        cpu_flags: What Linux must list among the flags in `/proc/cpuinfo`.
        compiler_flags: What g++ and clang++ need to be told, the macro for the sources included.
    """

    name: str
    cpu_flags: frozenset[str]
    compiler_flags: tuple[str, ...]


AVX512 = Isa(
    name="avx512",
    cpu_flags=frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx2", "fma", "f16c"}),
    compiler_flags=(
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512vnni",
        "-mfma",
        "-mf16c",
        "-mavx2",
        "-mprefer-vector-width=512",
        "-DAIOS_ISA_AVX512=1",
    ),
)
"""Sixteen lanes, four 8-bit products in each at once. Intel from Ice Lake (servers) on, AMD from Zen 4 on."""

AVX_VNNI = Isa(
    name="avx_vnni",
    cpu_flags=frozenset({"avx_vnni", "avx2", "fma", "f16c"}),
    compiler_flags=("-mavx2", "-mavxvnni", "-mfma", "-mf16c", "-DAIOS_ISA_AVX2=1"),
)
"""AVX2 with the 8-bit products of AVX-512, in eight lanes: what Intel's laptops have from Alder Lake on."""

AVX2 = Isa(
    name="avx2",
    cpu_flags=frozenset({"avx2", "fma", "f16c"}),
    compiler_flags=("-mavx2", "-mfma", "-mf16c", "-DAIOS_ISA_AVX2=1"),
)
"""Eight lanes. Intel from Haswell on, AMD from Zen on."""

PORTABLE = Isa(name="portable", cpu_flags=frozenset(), compiler_flags=("-DAIOS_ISA_PORTABLE=1",))
"""What the compiler makes of plain loops on any architecture."""

ISAS = (AVX512, AVX_VNNI, AVX2, PORTABLE)
"""All levels, the best first."""


def available_isas() -> tuple[Isa, ...]:
    """The levels that this CPU has, the best first. Where that cannot be read (not Linux on x86), the portable one."""
    flags = _cpu_flags()
    return tuple(isa for isa in ISAS if isa.cpu_flags <= flags)


def choose_isa() -> Isa:
    """The best level of this CPU, or the one that the environment variable `AIOS_ISA` asks for.

    Raises:
        ConfigError: `AIOS_ISA` names no level, or one that this CPU lacks.
    """
    available = available_isas()
    name = os.environ.get(VARIABLE, "")
    if not name:
        return available[0]
    wanted = next((isa for isa in ISAS if isa.name == name), None)
    names = ", ".join(isa.name for isa in available)
    if wanted is None:
        raise ConfigError(f"{VARIABLE} is {name!r}, which is no instruction set AIOS knows; this CPU has: {names}")
    if wanted not in available:
        missing = ", ".join(sorted(wanted.cpu_flags - _cpu_flags()))
        raise ConfigError(f"{VARIABLE} is {name!r}, but this CPU lacks {missing}; unset it or use one of: {names}")
    return wanted


@functools.cache
def _cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Flags of the first CPU listed. The kernel leaves out what it does not save on a context switch."""
    if sys.platform != "linux" or platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    try:
        lines = cpuinfo.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    listed = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(listed.partition(":")[2].split())
