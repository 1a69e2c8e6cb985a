"""Which instruction sets this CPU has, and code that is compiled for each of them."""

from __future__ import annotations

import ctypes
import platform

import pytest

from aios_model.errors import ConfigError
from aios_model.native import isa as isa_module
from aios_model.native.compiler import find_compiler
from aios_model.native.isa import AVX2, AVX512, AVX_VNNI, ISAS, PORTABLE, Isa, available_isas, choose_isa
from aios_model.native.library import NativeLibrary

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler here")

# Says which macro it saw, having used an instruction of that level on numbers only known when it runs.
SOURCE = """
#if defined(AIOS_ISA_AVX512) || defined(AIOS_ISA_AVX2)
#include <immintrin.h>
#endif
extern "C" __attribute__((visibility("default"))) int level(const float* x, float* y) {
#if defined(AIOS_ISA_AVX512)
  _mm512_storeu_ps(y, _mm512_fmadd_ps(_mm512_loadu_ps(x), _mm512_loadu_ps(x), _mm512_loadu_ps(x)));
  return 512;
#elif defined(AIOS_ISA_AVX2)
  for (int i = 0; i < 16; i += 8)
    _mm256_storeu_ps(y + i, _mm256_fmadd_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(x + i), _mm256_loadu_ps(x + i)));
  return 256;
#elif defined(AIOS_ISA_PORTABLE)
  for (int i = 0; i < 16; ++i) y[i] = x[i] * x[i] + x[i];
  return 0;
#endif
}
"""


@pytest.fixture
def no_wish(monkeypatch) -> None:
    monkeypatch.delenv("AIOS_ISA", raising=False)


@pytest.fixture
def with_flags(monkeypatch):
    """Plays a CPU with these flags."""

    def play(flags: frozenset[str]) -> None:
        monkeypatch.setattr(isa_module, "_cpu_flags", lambda: flags)

    return play


@needs_compiler
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_code_is_compiled_for_the_level_asked_for_and_runs(isa: Isa, tmp_path, monkeypatch):
    if isa not in available_isas():
        pytest.skip(f"this CPU has no {isa.name}")
    monkeypatch.setenv("AIOS_ISA", isa.name)
    monkeypatch.setenv("AIOS_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "level.cpp").write_text(SOURCE)
    library = NativeLibrary.open(name="level", sources=[tmp_path / "level.cpp"], include_dirs=[])
    floats = ctypes.c_float * 16
    result = floats()
    level = library.declare("level", ctypes.c_int, floats, floats)(floats(*range(16)), result)
    assert (library.isa, level) == (isa, {AVX512: 512, AVX_VNNI: 256, AVX2: 256, PORTABLE: 0}[isa])
    assert list(result) == [i * i + i for i in range(16)]
    assert f"-{isa.name}-" in library.path.name


@pytest.mark.usefixtures("no_wish")
def test_without_a_wish_the_best_level_is_taken(with_flags):
    for best in ISAS:
        with_flags(best.cpu_flags)
        assert choose_isa() == best
        assert available_isas() == tuple(isa for isa in ISAS if isa.cpu_flags <= best.cpu_flags)
    with_flags(AVX512.cpu_flags | AVX_VNNI.cpu_flags)
    assert available_isas() == ISAS


@pytest.mark.parametrize("missing", sorted(AVX512.cpu_flags - AVX2.cpu_flags))
@pytest.mark.usefixtures("no_wish")
def test_one_missing_flag_makes_it_the_next_level(missing, with_flags):
    with_flags(AVX512.cpu_flags - {missing})
    assert choose_isa() == AVX2


def test_an_unknown_level_is_refused_with_those_that_are_there(monkeypatch, with_flags):
    with_flags(AVX2.cpu_flags)
    monkeypatch.setenv("AIOS_ISA", "sse9")
    with pytest.raises(ConfigError, match=r"AIOS_ISA is 'sse9', .* this CPU has: avx2, portable"):
        choose_isa()


def test_a_level_that_the_cpu_lacks_is_refused_with_what_is_missing(monkeypatch, with_flags):
    with_flags(AVX512.cpu_flags - {"avx512_vnni"})
    monkeypatch.setenv("AIOS_ISA", "avx512")
    with pytest.raises(ConfigError, match="this CPU lacks avx512_vnni; unset it or use one of: avx2, portable"):
        choose_isa()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="lists of flags are read on x86 only")
def test_flags_are_read_from_what_linux_lists(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma f16c\nbugs\t\t: none\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    read = isa_module._cpu_flags.__wrapped__
    assert read(file) == {"fpu", "avx2", "fma", "f16c"}
    assert read(tmp_path / "missing") == frozenset()


def test_elsewhere_only_the_portable_level_is_taken_for_granted(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert isa_module._cpu_flags.__wrapped__() == frozenset()
