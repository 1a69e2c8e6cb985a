"""Ranks as real processes, without a model: started, killed, stopped, reached over TCP."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from aios_parallel.control.connection import Connection
from aios_parallel.control.driver import RankGroup
from aios_parallel.errors import ParallelError, RankFailedError
from aios_parallel.launch.listening import RankListener, connect_to_driver
from aios_parallel.launch.processes import RankProcesses

SCRIPT = """
import argparse, socket, time
from aios_parallel.control.connection import Connection
from aios_parallel.control.messages import command_reader
from aios_parallel.control.rank_loop import serve_rank
from aios_parallel.tracing.rank_tracer import RankTracer

class Rank:
    progress = num_exchanges = 0
    tracer = RankTracer()
    def call(self, name, arguments, report):
        if name == "sleep":
            time.sleep(60)
        return arguments["rank"]
    def execute(self, output):
        time.sleep(60)

parser = argparse.ArgumentParser()
parser.add_argument("--fd", type=int)
parser.add_argument("--rank", type=int)
given = parser.parse_args()
raise SystemExit(serve_rank(Connection(socket.socket(fileno=given.fd), command_reader()), Rank()))
"""


@pytest.fixture
def started():
    processes = RankProcesses([sys.executable, "-c", SCRIPT])
    group = RankGroup(
        [processes.start(rank) for rank in range(2)],
        end_processes=processes.end,
        describe_rank=processes.describe,
        silence=1.5,
    )
    assert group.call("name", [{"rank": 0}, {"rank": 1}], lambda *_: None) == [0, 1]
    group.start_steps()
    yield group, processes
    group.close()


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_killed_process_is_named_and_the_others_end(started) -> None:
    group, processes = started
    pids = [processes.pid(0), processes.pid(1)]
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(RankFailedError, match=rf"rank 1 \(process {pids[1]}, which was killed by SIGKILL\)"):
        group.next_event(timeout=5)
    deadline = time.monotonic() + 5
    while not all(map(is_gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(is_gone, pids))


def test_a_stopped_process_is_lost_and_killed(started) -> None:
    group, processes = started
    os.kill(processes.pid(0), signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(RankFailedError, match=r"rank 0.* gave no sign of life"):
        group.next_event(timeout=10)
    assert time.monotonic() - begun < 4
    deadline = time.monotonic() + 5
    while not is_gone(processes.pid(0)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_gone(processes.pid(0))


def test_closing_ends_ranks_in_the_middle_of_a_call(started) -> None:
    group, processes = started
    caller = threading.Thread(target=_call_and_ignore, args=(group,), daemon=True)
    caller.start()
    time.sleep(0.3)
    begun = time.monotonic()
    group.close()
    caller.join(5)
    assert not caller.is_alive()
    assert time.monotonic() - begun < 5
    assert all(is_gone(processes.pid(rank)) for rank in range(2))


def _call_and_ignore(group: RankGroup) -> None:
    with pytest.raises(RankFailedError):
        group.call("sleep", [{"rank": 0}, {"rank": 1}], lambda *_: None)


def test_ranks_join_over_tcp_and_strangers_do_not() -> None:
    listener = RankListener("127.0.0.1", 0, token="secret")
    address = ("127.0.0.1", listener.port)
    errors: list[Exception] = []
    came: list[Connection] = []

    def come(rank: int, token: str) -> None:
        try:
            came.append(connect_to_driver(address, token, rank=rank))
        except ParallelError as error:
            errors.append(error)

    for rank, token in ((0, "secret"), (1, "guessed"), (7, "secret"), (1, "secret")):
        threading.Thread(target=come, args=(rank, token), daemon=True).start()
    missing: list[int] = []
    joined = listener.wait_for({0, 1}, timeout=10, report=missing.append)
    assert {rank: peer.peer.rank for rank, peer in joined.items()} == {0: 0, 1: 1}
    assert joined[0].peer.address == "127.0.0.1"
    assert missing[0] == 2
    with pytest.raises(ParallelError, match=r"of 1 ranks, 5 did not join in 0\.3 s"):
        listener.wait_for({5}, timeout=0.3)
    listener.close()
    with pytest.raises(ParallelError, match="no driver listens"):
        connect_to_driver(address, "secret", rank=0, timeout=0.1)
    for connection in [*came, *(rank.connection for rank in joined.values())]:
        connection.close()
