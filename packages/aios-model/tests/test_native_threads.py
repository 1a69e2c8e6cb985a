"""The one thread pool, and the cores it may use."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aios_model.errors import ConfigError
from aios_model.native import cores, threads
from aios_model.native.base_library import model_library
from aios_model.native.compiler import find_compiler
from aios_model.native.cores import numa_cores, parse_cpu_list, resolve_cpu_bind, usable_cores, usable_cpus
from aios_model.native.threads import current_pool, default_num_threads, get_pool

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler here")


@pytest.fixture
def pool(monkeypatch):
    """A process's pool that nobody has asked for yet, in place of the real one; its workers end with the test."""
    fresh = threads.ThreadPool()
    monkeypatch.setattr(threads, "_pool", fresh)
    yield fresh
    fresh._close()


def native_size(pool: threads.ThreadPool) -> int:
    return model_library().declare("aios_pool_size", ctypes.c_int32, ctypes.c_void_p)(pool.pointer)


@needs_compiler
class TestPool:
    def test_there_is_none_until_somebody_asks(self, pool):
        assert current_pool() is None
        assert get_pool(1) is pool
        assert current_pool() is pool

    def test_it_has_the_size_asked_for_and_keeps_it(self, pool):
        assert native_size(get_pool(2)) == 2
        first = pool.pointer
        assert get_pool() is get_pool(2) is pool
        assert (pool.pointer, pool.num_threads) == (first, 2)

    def test_another_size_is_another_native_pool_and_the_old_one_stays_valid(self, pool):
        first = get_pool(2).pointer
        second = get_pool(3).pointer
        size = model_library().declare("aios_pool_size", ctypes.c_int32, ctypes.c_void_p)
        assert (size(first), size(second), pool.num_threads) == (2, 3, 3)
        assert get_pool(2).pointer == first

    def test_the_default_size_honours_the_limit_that_torch_honours(self, pool, monkeypatch):
        for limit, expected in (("1", 1), ("100000", usable_cores()), ("1,2", 1), ("", usable_cores())):
            monkeypatch.setenv("OMP_NUM_THREADS", limit)
            assert default_num_threads() == expected
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert get_pool().num_threads == 1

    @pytest.mark.parametrize("size", [0, -1, 2**40])
    def test_a_size_that_is_none_is_refused(self, pool, size):
        with pytest.raises(ConfigError, match=f"num_threads is {size}; it must be between 1 and 1024"):
            get_pool(size)

    def test_one_thread_for_each_cpu_that_is_named(self, pool):
        cpus = usable_cpus()
        assert get_pool(cpu_bind=cpus).setup == (len(cpus), cpus)
        assert native_size(pool) == len(cpus)
        assert get_pool(cpu_bind=str(cpus[0])).setup == (1, cpus[:1])
        assert get_pool().setup == (1, cpus[:1])
        assert get_pool(1, cpu_bind="none").setup == (1, None)

    @pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed on Linux only")
    def test_workers_run_on_their_cpu_and_the_caller_stays_free(self, pool):
        if len(usable_cpus()) < 2:
            pytest.skip("there is one CPU only")
        before = {task.name for task in Path("/proc/self/task").iterdir()}
        get_pool(cpu_bind=usable_cpus()[:2])
        worker = next(task for task in Path("/proc/self/task").iterdir() if task.name not in before)
        wait_until(lambda: os.sched_getaffinity(int(worker.name)) == {usable_cpus()[1]})
        assert sorted(os.sched_getaffinity(0)) == list(usable_cpus())

    def test_torch_is_left_alone_unless_the_caller_says_otherwise(self, pool):
        torch = pytest.importorskip("torch")
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            get_pool(1)
            assert torch.get_num_threads() == 2
            get_pool(1, own_torch_threads=True)
            assert torch.get_num_threads() == 1
        finally:
            torch.set_num_threads(before)

    def test_a_forked_child_makes_its_own(self):
        """In a process of its own: later Pythons warn of forks beside threads."""
        script = (
            "import ctypes, os\n"
            "from aios_model.native import get_pool, model_library\n"
            "size = model_library().declare('aios_pool_size', ctypes.c_int32, ctypes.c_void_p)\n"
            "pool = get_pool(2)\n"
            "before = pool.pointer\n"
            "threads = lambda: len(os.listdir('/proc/self/task')) if os.path.isdir('/proc/self/task') else 2\n"
            "assert threads() == 2\n"
            "child = os.fork()\n"
            "if child == 0:\n"
            "    code = 0 if size(pool.pointer) == 2 and threads() == 2 and get_pool() is pool else 1\n"
            "    os._exit(code)\n"
            "assert os.waitpid(child, 0)[1] == 0\n"
            "assert pool.pointer == before and size(before) == 2\n"
            "print('done')\n"
        )
        assert run_python(script) == "done\n"

    def test_the_process_ends_cleanly_with_workers_asleep_or_another_thread_at_work(self):
        script = (
            "import threading, time\n"
            "from aios_model.native import get_pool\n"
            "get_pool(3)\n"
            "get_pool(2)\n"
            "{}\n"
            "print('done')\n"
        )
        assert run_python(script.format("time.sleep(0.1)")) == "done\n"
        daemon = "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
        assert run_python(script.format(daemon)) == "done\n"

    def test_no_torch_is_imported(self):
        script = "import sys; from aios_model.native import get_pool; get_pool(2); print('torch' in sys.modules)"
        assert run_python(script) == "False\n"


class TestCpuLists:
    @pytest.mark.parametrize(
        ("text", "cpus"), [("0", [0]), ("0-3,8", [0, 1, 2, 3, 8]), ("5,2", [5, 2]), (" 1 , 3-3 ", [1, 3])]
    )
    def test_numbers_and_ranges_are_read(self, text, cpus):
        assert parse_cpu_list(text) == cpus

    @pytest.mark.parametrize("text", ["", ",", "a", "1-", "-1", "1-2-3", "1;2", "0x1", "1.5", "²", "0-999999999"])
    def test_what_is_none_is_refused(self, text):
        with pytest.raises(ConfigError, match=r"the CPU list .* has the part"):
            parse_cpu_list(text)

    @pytest.mark.parametrize("text", ["3-1", "0-99999"])
    def test_ranges_that_fall_or_never_end_are_refused(self, text):
        with pytest.raises(ConfigError, match="must ascend and stay below"):
            parse_cpu_list(text)

    def test_a_cpu_named_twice_is_refused(self):
        with pytest.raises(ConfigError, match="'0-2,1' names CPU 1 twice"):
            parse_cpu_list("0-2,1")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Plays a machine: its usable CPUs, NUMA nodes, cores of several hardware threads, and files of its cgroups."""

    def play(*, cpus=range(8), nodes=(), siblings=(), files=None) -> Path:
        monkeypatch.setattr(cores, "usable_cpus", lambda: tuple(cpus))
        texts = {f"sys/devices/system/node/node{i}/cpulist": text for i, text in enumerate(nodes)}
        for core in siblings:
            path = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
            texts |= {path.format(cpu): core for cpu in parse_cpu_list(core)}
        for name, text in (texts | (files or {})).items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")
        return tmp_path

    return play


class TestUsableCores:
    def test_they_are_those_of_the_affinity_mask(self, machine):
        assert usable_cores(root=machine(cpus=(1, 5, 6))) == 3

    def test_hardware_threads_of_one_core_count_once(self, machine):
        assert usable_cores(root=machine(siblings=("0,4", "1,5", "2,6", "3,7"))) == 4
        assert usable_cores(root=machine(cpus=(0, 4, 1), siblings=("0,4", "1,5"))) == 2

    @pytest.mark.parametrize(("quota", "expected"), [("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1)])
    def test_the_quota_of_the_cgroup_limits_them(self, machine, quota, expected):
        files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": quota}
        assert usable_cores(root=machine(files=files)) == expected

    def test_no_quota_or_one_beyond_the_cores_changes_nothing(self, machine):
        for quota in ("max 100000", "9900000 100000", "", "nonsense"):
            files = {"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": quota}
            assert usable_cores(root=machine(files=files)) == 8

    def test_the_least_quota_of_the_cgroups_around_it_counts(self, machine):
        files = {
            "proc/self/cgroup": "0::/outer/inner",
            "sys/fs/cgroup/outer/cpu.max": "300000 100000",
            "sys/fs/cgroup/outer/inner/cpu.max": "500000 100000",
        }
        assert usable_cores(root=machine(files=files)) == 3

    def test_version_1_of_cgroups_is_read_too(self, machine):
        files = {
            "proc/self/cgroup": "3:cpu,cpuacct:/a\n2:memory:/a",
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "400000",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        }
        assert usable_cores(root=machine(files=files)) == 4

    def test_of_this_machine_there_is_at_least_one(self):
        assert 1 <= usable_cores() <= len(usable_cpus()) <= (os.cpu_count() or 1)


class TestBinding:
    def test_nodes_list_the_usable_cpus_in_order_of_their_numbers(self, machine):
        root = machine(cpus=(0, 1, 4, 5, 40), nodes=("0-3", "4-7", "", *[""] * 7, "40-43"))
        assert numa_cores(root=root) == [[0, 1], [4, 5], [40]]

    def test_without_nodes_all_cpus_are_one(self, machine):
        assert numa_cores(root=machine()) == [list(range(8))]

    def test_none_binds_nothing_and_auto_nothing_on_one_node(self, machine):
        root = machine(nodes=("0-7",))
        assert resolve_cpu_bind("none", num_threads=2, root=root) is None
        assert resolve_cpu_bind("auto", num_threads=2, root=root) is None

    def test_auto_fills_one_node_before_the_next(self, machine):
        root = machine(nodes=("0-3", "4-7"))
        assert resolve_cpu_bind("auto", num_threads=3, root=root) == [0, 1, 2]
        assert resolve_cpu_bind("auto", num_threads=6, root=root) == [0, 1, 2, 3, 4, 5]

    def test_auto_takes_the_first_node_that_has_room(self, machine):
        root = machine(cpus=(3, 4, 5, 6), nodes=("0-3", "4-7"))
        assert resolve_cpu_bind("auto", num_threads=2, root=root) == [4, 5]

    def test_auto_takes_second_hardware_threads_last(self, machine):
        root = machine(nodes=("0-1,4-5", "2-3,6-7"), siblings=("0,4", "1,5", "2,6", "3,7"))
        assert resolve_cpu_bind("auto", num_threads=2, root=root) == [0, 1]
        assert resolve_cpu_bind("auto", num_threads=6, root=root) == [0, 1, 2, 3, 4, 5]

    def test_auto_binds_nothing_if_threads_outnumber_the_cpus(self, machine):
        assert resolve_cpu_bind("auto", num_threads=9, root=machine(nodes=("0-3", "4-7"))) is None

    def test_a_list_is_taken_as_it_is(self, machine):
        root = machine(nodes=("0-3", "4-7"))
        assert resolve_cpu_bind("7,2-3", num_threads=2, root=root) == [7, 2]
        assert resolve_cpu_bind([7, 2, 3], num_threads=3, root=root) == [7, 2, 3]

    def test_a_cpu_that_may_not_be_used_is_refused(self, machine):
        root = machine(cpus=(2, 3))
        with pytest.raises(ConfigError, match="names CPU 1, which this process may not use; it may use: 2, 3"):
            resolve_cpu_bind("1-2", num_threads=2, root=root)

    @pytest.mark.parametrize("cpus", [[2], [2, 2], []])
    def test_threads_that_would_share_a_cpu_are_refused(self, machine, cpus):
        with pytest.raises(ConfigError, match=r"names \d CPUs for 2 threads; give each thread its own"):
            resolve_cpu_bind(cpus, num_threads=2, root=machine())


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def run_python(script: str) -> str:
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout
