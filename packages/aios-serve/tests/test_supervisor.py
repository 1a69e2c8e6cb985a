"""An engine that dies or hangs is ended for certain and started again: over scripted processes, and over fakes."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from aios_model.sampling.params import SamplingParams
from aios_serve.async_engine import AsyncEngine, EngineState
from aios_serve.config import EngineConfig
from aios_serve.engine_client import ProcessClient
from aios_serve.errors import EngineDeadError, EngineRestartingError
from aios_serve.messages import Fatal, Heartbeat, Loading, Ready
from aios_serve.outputs import RequestOutput
from aios_serve.restart_budget import RestartBudget
from aios_serve.supervisor import EngineSupervisor

SCRIPT = Path(__file__).with_name("scripted.py")
spec = importlib.util.spec_from_file_location("scripted", SCRIPT)
scripted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripted)

CONFIG = EngineConfig(max_num_seqs=4, heartbeat_timeout=1.0)
SLOW = [ord(scripted.SLOW)]


async def started(config=CONFIG, command=(sys.executable, str(SCRIPT))):
    engine = AsyncEngine(
        config,
        new_client=lambda replica: ProcessClient(command),
        find=scripted.find_scripted,
        read=scripted.read_scripted,
        new_budget=lambda: RestartBudget(config.max_engine_restarts, first_delay=0.05),
    )
    await engine.start()
    await engine.wait_ready()
    return engine


@pytest.fixture
async def engine():
    engine = await started()
    yield engine
    await engine.shutdown()


async def whole(engine, prompt, **params):
    output = RequestOutput.empty(request_id="", prompt_token_ids=[], num_choices=1)
    async for delta in engine.generate(prompt, SamplingParams(**params)):
        output.add(delta)
    return output.outputs[0]


async def until(condition, timeout=10.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.01)


def pid_of(engine):
    return engine.replicas[0].client.pid


class Recorder:
    def __init__(self):
        self.finished = []

    def on_step(self, **kwargs):
        pass

    on_tokens = on_step

    def on_finished(self, timing):
        self.finished.append(timing)


async def busy(engine, count):
    """So many requests that have begun to answer."""
    before = engine.stats().generation_tokens
    running = [asyncio.create_task(whole(engine, SLOW, max_tokens=120)) for _ in range(count)]
    await until(lambda: engine.stats().generation_tokens > before)
    return running


async def fail_of(running):
    began = time.monotonic()
    failures = await asyncio.gather(*running, return_exceptions=True)
    return failures, time.monotonic() - began


async def test_a_killed_engine_ends_open_requests_at_once_and_comes_back(engine):
    recorder = Recorder()
    engine.subscribe(recorder)
    running = await busy(engine, 8)
    tokens = engine.stats().generation_tokens
    old = pid_of(engine)
    os.kill(old, signal.SIGKILL)
    failures, seconds = await fail_of(running)
    assert seconds < 1.0
    assert all(isinstance(failure, EngineRestartingError) for failure in failures)
    assert "SIGKILL" in str(failures[0])
    assert engine.state is EngineState.RESTARTING
    assert "SIGKILL" in engine.state_detail
    assert not engine.is_healthy()
    assert engine.num_open_requests == 0
    assert [timing.finish_reason for timing in recorder.finished] == ["error"] * 8
    assert (engine.stats().num_running, engine.stats().kv_cache_usage) == (0, 0)
    with pytest.raises(EngineRestartingError, match="SIGKILL"):
        await whole(engine, [97])
    await until(lambda: engine.state is EngineState.READY)
    assert engine.is_healthy()
    assert pid_of(engine) != old
    assert engine.replicas[0].num_restarts == 1
    assert (await whole(engine, [97, 98], max_tokens=4)).text == "abab"
    await until(lambda: engine.stats().generation_tokens >= tokens + 4)  # counters go on


async def test_an_engine_that_says_fatal_is_restarted(engine):
    running = await busy(engine, 2)
    engine.replicas[0].client._transport.write(b"\x00\x00\x00\x01\xff")  # a frame that is no message ends its loop
    failures, _ = await fail_of(running)
    assert "engine loop failed: FrameError" in str(failures[0])
    await until(engine.is_healthy)
    assert (await whole(engine, [97, 98], max_tokens=4)).text == "abab"


@pytest.mark.parametrize("idle", [True, False])
async def test_a_stopped_engine_is_killed_and_restarted(engine, idle):
    running = [] if idle else await busy(engine, 2)
    old = pid_of(engine)
    os.kill(old, signal.SIGSTOP)
    failures, seconds = await fail_of(running)
    assert seconds < 3.0
    assert all("no sign of life for 1." in str(failure) for failure in failures)
    await until(lambda: engine.state is EngineState.RESTARTING)
    await until(engine.is_healthy)
    with pytest.raises(ProcessLookupError):
        os.kill(old, 0)
    assert (await whole(engine, [97, 98], max_tokens=4)).text == "abab"


async def test_shutdown_ends_an_engine_that_is_about_to_be_killed(engine):
    old = pid_of(engine)
    os.kill(old, signal.SIGSTOP)
    await until(lambda: engine.state is EngineState.RESTARTING)
    await engine.shutdown()
    with pytest.raises(ProcessLookupError):
        os.kill(old, 0)


async def test_a_step_that_hangs_ends_with_a_new_engine_which_is_given_more_time(engine):
    with pytest.raises(EngineRestartingError, match="heartbeat_timeout"):  # the step sleeps for 3 s
        await whole(engine, [ord(scripted.SLEEP)], max_tokens=1)
    await until(engine.is_healthy)
    assert engine.replicas[0]._pulse.deadline == 2.0


async def test_a_busy_event_loop_is_not_taken_for_a_stuck_engine(engine):
    old = pid_of(engine)
    time.sleep(2.5)
    for _ in range(20):
        await asyncio.sleep(0.05)
    assert pid_of(engine) == old
    assert engine.is_healthy()


async def test_after_the_last_restart_it_stays_dead_and_says_so():
    engine = await started(EngineConfig(heartbeat_timeout=1.0, max_engine_restarts=1))
    try:
        os.kill(pid_of(engine), signal.SIGKILL)
        await until(lambda: engine.replicas[0].num_restarts == 1 and engine.state is EngineState.READY)
        running = await busy(engine, 2)
        os.kill(pid_of(engine), signal.SIGKILL)
        failures, _ = await fail_of(running)
        assert all(isinstance(failure, EngineDeadError) for failure in failures)
        assert engine.state is EngineState.DEAD
        assert "SIGKILL" in engine.state_detail
        assert "restarted once within 10 minutes" in engine.state_detail
        with pytest.raises(EngineDeadError, match="not started again"):
            await whole(engine, [97])
        await asyncio.sleep(0.3)
        assert engine.replicas[0].client is None
    finally:
        await engine.shutdown()


async def test_what_the_engine_started_is_killed_with_it(tmp_path):
    """A child that outlives the engine, as a rank of a parallel group might."""
    program = (
        "import runpy, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'a').write(f'{{child.pid}}\\n')\n"
        f"sys.argv[0] = {str(SCRIPT)!r}\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    engine = await started(command=(sys.executable, "-c", program))
    try:
        child = int((tmp_path / "pid").read_text().split()[0])
        os.kill(child, 0)
        os.kill(pid_of(engine), signal.SIGKILL)
        await until(lambda: not is_running(child))
        await until(engine.is_healthy)
    finally:
        await engine.shutdown()
    children = [int(line) for line in (tmp_path / "pid").read_text().split()]
    assert len(children) == 2
    await until(lambda: not any(map(is_running, children)))


def is_running(pid):
    """Whether it exists and is no zombie, which nobody may have buried yet."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


async def test_an_engine_that_dies_while_draining_is_not_restarted(engine):
    running = await busy(engine, 2)
    drained = asyncio.create_task(engine.drain(5))
    await asyncio.sleep(0)
    os.kill(pid_of(engine), signal.SIGKILL)
    failures, _ = await fail_of(running)
    assert all(isinstance(failure, EngineDeadError) for failure in failures)
    assert await drained
    await asyncio.sleep(0.2)
    assert engine.state is EngineState.DEAD


class FakeClient:
    """An engine of which the test says what happens to it."""

    can_be_killed = True

    def __init__(self, clients):
        clients.append(self)
        self.closed = False

    async def connect(self, on_event, on_lost):
        self.tell, self.lose = on_event, on_lost

    def send(self, command):
        self.sent = command

    def is_alive(self):
        return not self.closed

    async def close(self, grace=0):
        self.closed = True
        self.lose("closed")  # as a process would


class Notes:
    def __init__(self):
        self.ready, self.deaths = 0, []

    def on_ready(self):
        self.ready += 1


def built():
    engine = scripted.build_scripted(CONFIG, lambda stage, fraction: None)
    return Ready(info=engine.info, stats=engine.port.stats())


@pytest.fixture
async def fake():
    clients, notes = [], Notes()
    supervisor = EngineSupervisor(
        CONFIG,
        new_client=partial(FakeClient, clients),
        on_event=lambda event: None,
        on_ready=notes.on_ready,
        on_death=notes.deaths.append,
        budget=RestartBudget(3, first_delay=0.01),
    )
    supervisor.start(CONFIG)
    await until(lambda: clients and hasattr(clients[-1], "sent"))
    yield SimpleNamespace(supervisor=supervisor, clients=clients, notes=notes)
    await supervisor.shutdown()


async def test_a_failure_at_the_first_start_is_final(fake):
    fake.clients[0].tell(Fatal(message="too little memory: ask for less"))
    with pytest.raises(EngineDeadError, match="ask for less"):
        await fake.supervisor.wait_ready()
    await asyncio.sleep(0.05)
    assert fake.supervisor.state is EngineState.DEAD
    assert len(fake.clients) == 1
    assert fake.clients[0].closed


async def test_a_restart_that_fails_is_tried_again_until_none_is_left(fake):
    fake.clients[0].tell(built())
    fake.clients[0].lose("first")
    for number in range(1, 4):
        await until(lambda number=number: len(fake.clients) == number + 1 and hasattr(fake.clients[-1], "sent"))
        assert fake.clients[number - 1].closed
        assert fake.supervisor.state is EngineState.RESTARTING
        fake.clients[number].tell(Loading(stage="loading weights", fraction=0.41))
        assert fake.supervisor.detail == "loading weights 41%"
        fake.clients[number].tell(Fatal(message="no memory"))
    await until(lambda: fake.supervisor.state is EngineState.DEAD)
    assert [type(death) for death in fake.notes.deaths] == [EngineRestartingError] * 3 + [EngineDeadError]
    assert fake.notes.ready == 1


async def test_what_an_engine_says_after_its_death_is_not_heard(fake):
    first = fake.clients[0]
    first.tell(built())
    first.lose("gone")
    first.tell(built())
    first.lose("gone again")
    assert fake.supervisor.state is EngineState.RESTARTING
    await until(lambda: len(fake.clients) == 2 and hasattr(fake.clients[-1], "sent"))
    first.tell(built())
    first.lose("and again")
    assert fake.supervisor.state is EngineState.RESTARTING
    fake.clients[1].tell(built())
    assert fake.supervisor.state is EngineState.READY
    assert len(fake.notes.deaths) == 1


async def test_counters_go_on_and_gauges_do_not(fake):
    ready = built()
    counted = [replace(ready.stats, generation_tokens=tokens, num_running=2) for tokens in (7, 5)]
    fake.clients[0].tell(ready)
    fake.clients[0].tell(Heartbeat(stats=counted[0]))
    fake.clients[0].lose("gone")
    assert (fake.supervisor.stats.generation_tokens, fake.supervisor.stats.num_running) == (7, 0)
    await until(lambda: len(fake.clients) == 2 and hasattr(fake.clients[-1], "sent"))
    fake.clients[1].tell(ready)
    fake.clients[1].tell(Heartbeat(stats=counted[1]))
    assert (fake.supervisor.stats.generation_tokens, fake.supervisor.stats.num_running) == (12, 2)
    fake.clients[1].lose("gone")
    assert fake.supervisor.stats.generation_tokens == 12
