"""Native code: compiled once, kept, called, and explained where it cannot be had."""

from __future__ import annotations

import ctypes
import logging
import os
import random
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aios_model.errors import ConfigError, NativeBuildError
from aios_model.native import library as library_module
from aios_model.native import status as status_module
from aios_model.native.build import LibrarySource, build_libraries, build_library
from aios_model.native.compiler import find_compiler
from aios_model.native.isa import PORTABLE
from aios_model.native.library import LayerKernels, NativeLibrary, build_layers, load_library, pointer, source_folder
from aios_model.native.status import native_status

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler here")

SOURCE = '#include "answer.h"\nextern "C" __attribute__((visibility("default"))) int answer() { return kAnswer; }\n'

# Opens the library in another process, says what was logged, then what `answer` returns.
SCRIPT = """
import ctypes, logging, sys
from pathlib import Path
logging.basicConfig(level="INFO", stream=sys.stdout, format="%(message)s")
from aios_model.native.library import NativeLibrary
folder = Path(sys.argv[1])
library = NativeLibrary.open(name="tiny", sources=[folder / "answer.cpp"], include_dirs=[folder])
print("answer", library.declare("answer", ctypes.c_int)())
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and nothing opened or said so far."""
    monkeypatch.setenv("AIOS_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("AIOS_NATIVE", "AIOS_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(library_module, "_opened", {})
    monkeypatch.setattr(status_module, "_said", set())
    return tmp_path / "cache"


@pytest.fixture
def answer() -> int:
    return random.randrange(1 << 30)


@pytest.fixture
def folder(tmp_path, answer) -> Path:
    """A library's sources: one that answers, and its header."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "answer.cpp").write_text(SOURCE)
    (folder / "answer.h").write_text(f"constexpr int kAnswer = {answer};\n")
    return folder


@pytest.fixture
def compilations(tmp_path, monkeypatch):
    """Counts what the compiler is asked to compile, by this process and by others; each takes `DELAY` seconds more."""
    compiler = find_compiler()
    assert compiler is not None
    log, script = tmp_path / "log", tmp_path / "counting compiler"
    log.touch()
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *" -c "*) echo "$*" >> "{log}"; sleep ${{DELAY:-0}};; esac\n'
        f'exec {compiler.command[0]} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{script}'")
    return lambda: len(log.read_text().splitlines())


def library_source(folder: Path, name: str = "tiny", extra_flags: Sequence[str] = ()) -> LibrarySource:
    sources = sorted(folder.glob("*.cpp"))
    return LibrarySource(name=name, sources=sources, include_dirs=[folder], extra_flags=extra_flags)


def build(folder: Path, *, extra_flags: Sequence[str] = (), **options) -> Path:
    return build_library(library_source(folder, extra_flags=extra_flags), PORTABLE, **options)


def call(folder: Path, name: str = "answer") -> int:
    """Open as a new process would, and call."""
    library_module._opened.clear()
    library = NativeLibrary.open(name="tiny", sources=sorted(folder.glob("*.cpp")), include_dirs=[folder], isa=PORTABLE)
    return library.declare(name, ctypes.c_int)()


@needs_compiler
class TestBuild:
    def test_a_library_is_compiled_and_called(self, folder, answer):
        assert call(folder) == answer

    def test_sources_are_compiled_apart_and_linked_into_one(self, folder, answer, compilations):
        (folder / "other.cpp").write_text(
            'int local();\nextern "C" __attribute__((visibility("default"))) int other() { return local(); }\n'
        )
        (folder / "third.cpp").write_text("int local() { return 7; }\n")
        assert (call(folder, "other"), call(folder), compilations()) == (7, answer, 3)

    def test_what_was_compiled_once_is_not_compiled_again(self, folder, answer, compilations):
        assert (call(folder), call(folder), build(folder)) == (answer, answer, build(folder))
        assert compilations() == 1

    def test_opening_twice_in_one_process_gives_the_same_object(self, folder):
        options = {"name": "tiny", "sources": [folder / "answer.cpp"], "include_dirs": [folder]}
        assert NativeLibrary.open(**options) is NativeLibrary.open(**options)

    def test_a_changed_source_header_flag_or_compiler_makes_another_library(self, folder, tmp_path, monkeypatch):
        paths = [build(folder), build(folder, extra_flags=["-DX"])]
        with (folder / "answer.h").open("a") as header:
            header.write("// changed\n")
        paths.append(build(folder))
        with (folder / "answer.cpp").open("a") as source:
            source.write("// changed\n")
        paths.append(build(folder))
        link = tmp_path / "another-g++"
        compiler = find_compiler()
        assert compiler is not None
        link.symlink_to(compiler.command[0])
        monkeypatch.setenv("CXX", str(link))
        paths.append(build(folder))
        assert len(set(paths)) == 5

    def test_arguments_in_the_variable_cxx_are_passed_on(self, folder, monkeypatch):
        compiler = find_compiler()
        assert compiler is not None
        (folder / "answer.cpp").write_text(SOURCE.replace("kAnswer", "kAnswer - kAnswer + FROM_CXX"))
        monkeypatch.setenv("CXX", f"{compiler.command[0]} -DFROM_CXX=5")
        assert call(folder) == 5

    def test_a_variable_cxx_that_names_no_compiler_is_passed_over(self, folder, answer, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        assert call(folder) == answer
        monkeypatch.setenv("CXX", "false")
        assert find_compiler() is not None

    @pytest.mark.usefixtures("compilations")
    def test_a_wait_is_announced_with_what_it_took_and_a_find_is_not(self, folder, caplog, monkeypatch):
        monkeypatch.setenv("DELAY", "0.4")
        said: list[str] = []
        build(folder, report=said.append)
        build(folder, report=said.append)
        assert len(said) == 2
        assert said[0] == "compiling the native kernels of tiny for portable (once; some seconds)"
        assert said[1].startswith("compiled the native kernels of tiny for portable in ")
        with caplog.at_level(logging.INFO):
            build(folder, rebuild=True)
        assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]

    def test_nothing_is_left_beside_the_library_but_its_lock(self, folder, cache):
        path = build(folder)
        assert sorted(file.suffix for file in cache.iterdir()) == [".lock", ".so"]
        assert path.parent == cache
        assert stat.S_IMODE(cache.stat().st_mode) == 0o700

    def test_no_openmp_runtime_is_linked(self, folder):
        contents = build(folder).read_bytes()
        assert b"libgomp" not in contents
        assert b"libomp" not in contents


@needs_compiler
class TestSeveral:
    def test_their_sources_are_compiled_side_by_side_but_never_more_than_there_are_cores(
        self, folder, answer, compilations, monkeypatch
    ):
        monkeypatch.setenv("DELAY", "0.6")
        monkeypatch.setattr("aios_model.native.build.usable_cores", lambda: 2)
        said: list[str] = []
        started = time.perf_counter()
        paths = build_libraries([library_source(folder, name) for name in "abcd"], PORTABLE, report=said.append)
        seconds = time.perf_counter() - started
        assert 1.2 < seconds < 2.4, "two rounds of two, not four of one nor one of four"
        assert [path.name[0] for path in paths] == ["a", "b", "c", "d"]
        assert {NativeLibrary(path, name="", isa=PORTABLE).declare("answer", ctypes.c_int)() for path in paths} == {
            answer
        }
        assert compilations() == 4
        assert len(said) == 2
        assert said[0] == "compiling the native kernels of a, b, c, d for portable (once; some seconds)"

    def test_only_what_is_missing_is_compiled(self, folder, compilations):
        path = build_library(library_source(folder, "b"), PORTABLE)
        paths = build_libraries([library_source(folder, name) for name in "abb"], PORTABLE)
        assert (paths[1:], compilations()) == ([path, path], 2)

    def test_one_that_is_refused_does_not_lose_the_others(self, folder, tmp_path, compilations):
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "broken.cpp").write_text("#error no\n")
        sources = [library_source(broken, "broken"), library_source(folder, "sound")]
        for _ in range(2):
            with pytest.raises(NativeBuildError, match=r"(?s)native kernels of broken for .*#error no"):
                build_libraries(sources, PORTABLE)
        assert build_library(sources[1], PORTABLE).exists()
        assert compilations() == 2

    def test_orders_that_cross_do_not_wait_for_each_other(self, folder, compilations, monkeypatch):
        monkeypatch.setenv("DELAY", "0.3")
        sources = [library_source(folder, name) for name in "abc"]
        with ThreadPoolExecutor() as threads:
            forward = threads.submit(build_libraries, sources, PORTABLE)
            backward = threads.submit(build_libraries, sources[::-1], PORTABLE)
            assert forward.result(timeout=30) == backward.result(timeout=30)[::-1]
        assert compilations() == 3


@needs_compiler
class TestCache:
    def test_two_processes_at_once_compile_once(self, folder, answer, compilations, monkeypatch):
        monkeypatch.setenv("DELAY", "0.5")
        command = [sys.executable, "-c", SCRIPT, str(folder)]
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        said = [process.communicate(timeout=60)[0] for process in processes]
        assert [text.splitlines()[-1] for text in said] == [f"answer {answer}"] * 2
        assert compilations() == 1
        assert sum("waiting for another process" in text for text in said) <= 1

    @pytest.mark.parametrize(
        "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data + b"x"]
    )
    def test_a_damaged_file_is_compiled_again(self, folder, answer, damage, compilations):
        path = build(folder)
        path.write_bytes(damage(path.read_bytes()))
        assert (call(folder), compilations()) == (answer, 2)
        assert build(folder) == path

    def test_a_library_that_does_not_load_is_compiled_again_once(self, folder, answer, cache):
        path = build(folder)
        path.write_text("not a library")
        renamed = store_again(path)
        assert call(folder) == answer
        assert not renamed.exists()

    def test_if_it_still_does_not_load_the_error_says_so(self, folder, monkeypatch):
        def refuse(path: str) -> None:
            raise OSError(f"{path}: failed to map segment from shared object")

        monkeypatch.setattr(ctypes, "CDLL", refuse)
        with pytest.raises(NativeBuildError, match=r"cannot be loaded: .*failed to map segment.*AIOS_CACHE_DIR"):
            call(folder)

    def test_a_cache_that_cannot_be_written_is_replaced_by_a_private_one(self, folder, answer, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("AIOS_CACHE_DIR", str(tmp_path / "file" / "cache"))
        said: list[str] = []
        path = build(folder, report=said.append)
        assert "file/cache cannot be written" in said[0]
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert call(folder) == answer

    def test_the_private_cache_goes_with_its_process(self, folder, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        (tmp_path / "temporary").mkdir()
        monkeypatch.setenv("AIOS_CACHE_DIR", str(tmp_path / "file" / "cache"))
        monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
        subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], check=True, stdout=subprocess.DEVNULL, timeout=60)
        assert list((tmp_path / "temporary").iterdir()) == []

    def test_without_a_variable_of_ours_the_usual_cache_folder_is_taken(self, folder, tmp_path, monkeypatch):
        monkeypatch.delenv("AIOS_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert build(folder).parent == tmp_path / "xdg" / "aios" / "native"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert build(folder).parent == tmp_path / ".cache" / "aios" / "native"

    def test_what_nobody_used_for_a_month_is_removed_and_what_is_used_stays(self, folder, cache):
        used, unused = build(folder), build(folder, extra_flags=["-DX"])
        killed = cache / "build-killed"
        killed.mkdir()
        (killed / "0-answer.o").touch()
        for path in (used, unused, killed):
            os.utime(path, (time.time() - 40 * 86400,) * 2)
        build(folder)  # found, which counts as use
        build(folder, extra_flags=["-DY"])
        assert (used.exists(), unused.exists(), killed.exists()) == (True, False, False)


@needs_compiler
class TestErrors:
    def test_broken_source_raises_the_compilers_words_and_the_command(self, folder):
        (folder / "answer.cpp").write_text("int broken( { return undeclared_name; }\n")
        with pytest.raises(NativeBuildError) as caught:
            build(folder)
        text = str(caught.value)
        assert text.startswith("could not compile the native kernels of tiny for portable: exit status 1 of ")
        assert "error: " in text
        assert f"-c {folder / 'answer.cpp'}" in text

    def test_only_the_first_lines_of_many_are_shown(self, folder):
        (folder / "answer.cpp").write_text("".join(f"int x{i} = undeclared{i};\n" for i in range(100)))
        with pytest.raises(NativeBuildError, match=r"\.\.\. and \d+ lines more") as caught:
            build(folder)
        assert len(str(caught.value).splitlines()) == 23

    def test_what_was_refused_is_refused_again_without_asking(self, folder, compilations):
        (folder / "answer.cpp").write_text("#error no\n")
        texts = []
        for _ in range(3):
            with pytest.raises(NativeBuildError) as caught:
                build(folder)
            texts.append(str(caught.value))
        assert (len(set(texts)), compilations()) == (1, 1)

    def test_once_it_is_mended_it_compiles(self, folder, answer):
        (folder / "answer.cpp").write_text("#error no\n")
        with pytest.raises(NativeBuildError):
            build(folder)
        (folder / "answer.cpp").write_text(SOURCE)
        assert call(folder) == answer

    def test_a_function_that_is_not_there_is_named(self, folder):
        with pytest.raises(AttributeError, match="no_such_function"):
            call(folder, "no_such_function")


class TestStatus:
    def test_without_a_compiler_the_reason_is_said_once(self, monkeypatch, caplog):
        hide_compilers(monkeypatch)
        statuses = [native_status() for _ in range(3)]
        assert {status.available for status in statuses} == {False}
        assert statuses[0].isa is None
        assert statuses[0].reason.startswith(
            "no C++ compiler found (looked for $CXX, c++, g++, clang++ on PATH); install"
        )
        warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert warnings[0].name == "aios_model.native.status"
        assert statuses[0].reason in warnings[0].getMessage()

    @needs_compiler
    def test_without_a_compiler_what_was_compiled_before_is_used(self, folder, answer, monkeypatch):
        path = build(folder)
        hide_compilers(monkeypatch)
        assert build(folder) == path
        assert call(folder) == answer

    @needs_compiler
    def test_a_library_that_does_not_compile_makes_natives_unavailable_not_a_crash(self, folder, caplog):
        (folder / "answer.cpp").write_text("#error this compiler is too old\n")
        status = native_status(
            lambda: NativeLibrary.open(name="tiny", sources=[folder / "answer.cpp"], include_dirs=[folder])
        )
        assert not status.available
        assert "this compiler is too old" in status.reason
        assert "this compiler is too old" in caplog.text

    @needs_compiler
    def test_with_a_compiler_they_are_available(self, folder, monkeypatch):
        monkeypatch.setenv("AIOS_ISA", "portable")
        status = native_status(
            lambda: NativeLibrary.open(name="tiny", sources=[folder / "answer.cpp"], include_dirs=[folder])
        )
        assert (status.available, status.isa) == (True, "portable")
        assert status.reason == "native kernels for portable"

    def test_they_can_be_turned_off_on_purpose_without_a_warning(self, monkeypatch, caplog):
        monkeypatch.setenv("AIOS_NATIVE", "0")
        status = native_status()
        assert (status.available, status.reason, status.isa) == (False, "AIOS_NATIVE=0 turns native kernels off", None)
        assert not caplog.records

    def test_a_value_that_is_neither_on_nor_off_is_refused(self, monkeypatch):
        monkeypatch.setenv("AIOS_NATIVE", "maybe")
        with pytest.raises(ConfigError, match="AIOS_NATIVE is 'maybe'; set it to 0"):
            native_status()


class TestCalls:
    def test_a_package_keeps_its_sources_in_one_place(self):
        assert (source_folder("aios_model") / "pool.cpp").is_file()

    @needs_compiler
    def test_a_package_may_include_the_headers_of_those_below(self, tmp_path, folder, answer, monkeypatch):
        write_package(tmp_path / "lower", "lower", headers={"answer.h": f"constexpr int kAnswer = {answer};\n"})
        write_package(tmp_path / "upper", "upper", headers={}, source=SOURCE)
        for name in ("lower", "upper"):
            monkeypatch.syspath_prepend(str(tmp_path / name))
        upper = LayerKernels("upper", below=["lower"])
        build_layers(upper)
        monkeypatch.setenv("CXX", "no-such-compiler")
        library = load_library(upper)
        assert library is load_library(upper)
        assert library.declare("answer", ctypes.c_int)() == answer
        assert "upper" not in sys.modules

    @needs_compiler
    def test_a_tensor_is_passed_by_its_address(self, folder):
        torch = pytest.importorskip("torch")
        (folder / "answer.cpp").write_text(
            'extern "C" __attribute__((visibility("default"))) float sum(const float* x, int n) {\n'
            "  float total = 0;\n  for (int i = 0; i < n; ++i) total += x[i];\n  return total;\n}\n"
        )
        x = torch.randint(-1000, 1000, (37,)).float()
        library = NativeLibrary.open(name="tiny", sources=[folder / "answer.cpp"], include_dirs=[folder])
        function = library.declare("sum", ctypes.c_float, ctypes.c_void_p, ctypes.c_int)
        assert function(pointer(x), len(x)) == x.sum().item()

    def test_a_tensor_that_is_elsewhere_or_has_gaps_is_refused(self):
        torch = pytest.importorskip("torch")
        with pytest.raises(ValueError, match="on meta"):
            pointer(torch.zeros(2, device="meta"))
        with pytest.raises(ValueError, match=r"shape \(3, 2\) has strides \(1, 3\): make it contiguous"):
            pointer(torch.zeros(2, 3).T)


def hide_compilers(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)


def store_again(path: Path) -> Path:
    """Rename a library that was changed so that its name says what it holds."""
    from aios_model.native.build_cache import _digest

    return path.rename(path.with_stem(f"{path.stem.rpartition('-')[0]}-{_digest(path)}"))


def write_package(root: Path, name: str, *, headers: dict[str, str], source: str | None = None) -> None:
    folder = root / name / "native" / "csrc"
    folder.mkdir(parents=True)
    (root / name / "__init__.py").touch()
    for header, text in headers.items():
        (folder / header).write_text(text)
    if source is not None:
        (folder / f"{name}.cpp").write_text(source)
