"""AsyncEngine over several engines: who gets a request, and what becomes of it when its engine dies.

Most tests play the engines by hand; the last ones run scripted engine processes and kill them.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from aios_model.sampling.params import SamplingParams
from aios_serve.async_engine import AsyncEngine, EngineState
from aios_serve.config import EngineConfig
from aios_serve.engine_client import ProcessClient
from aios_serve.errors import EngineDeadError, EngineRestartingError
from aios_serve.messages import (
    Abort,
    AddRequest,
    ChildOutput,
    Fatal,
    Outputs,
    PrefixCacheReset,
    Ready,
    ResetPrefixCache,
)
from aios_serve.outputs import RequestOutput
from aios_serve.restart_budget import RestartBudget

SCRIPT = Path(__file__).with_name("scripted.py")
spec = importlib.util.spec_from_file_location("scripted", SCRIPT)
scripted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripted)

BUILT = scripted.build_scripted(EngineConfig(), lambda stage, fraction: None)
INFO, STATS = BUILT.info, BUILT.port.stats()


class PlayedEngine:
    """An engine of which the test says what it does."""

    can_be_killed = True

    def __init__(self, replica, started):
        self.replica = replica
        self.commands = []
        self.alive = True
        self._started = started

    async def connect(self, on_event, on_lost):
        self.tell, self.lose = on_event, on_lost
        self._started.append(self)

    def send(self, command):
        self.commands.append(command)

    def is_alive(self):
        return self.alive

    async def close(self, grace=0):
        self.alive = False

    def ready(self):
        self.tell(Ready(info=INFO, stats=STATS))

    def of(self, kind):
        return [command for command in self.commands if isinstance(command, kind)]

    @property
    def requests(self):
        return self.of(AddRequest)

    def answer(self, request, text, *, finish_reason=None):
        outputs = [
            ChildOutput(engine_id=child.engine_id, token_ids=list(text.encode()), finish_reason=finish_reason)
            for child in request.children
        ]
        self.tell(Outputs(outputs=outputs, stats=STATS, num_tokens=1))


class Cluster:
    """An AsyncEngine and the engines it started, newest last."""

    def __init__(self, *, wait_seconds=5.0, **options):
        self.started = []
        config = EngineConfig(**options)
        self.engine = AsyncEngine(
            config,
            new_client=lambda replica: PlayedEngine(replica, self.started),
            find=scripted.find_scripted,
            read=scripted.read_scripted,
            new_budget=lambda: RestartBudget(config.max_engine_restarts, first_delay=0.01),
            wait_seconds=wait_seconds,
        )

    def __getitem__(self, replica):
        """The engine of now."""
        return [each for each in self.started if each.replica == replica][-1]

    async def start(self, *, ready=True):
        await self.engine.start()
        await until(lambda: len(self.started) == self.engine.config.data_parallel)
        if ready:
            for each in list(self.started):
                each.ready()
            await self.engine.wait_ready()

    async def restarted(self, replica):
        """The engine that comes after the one of now."""
        count = len([each for each in self.started if each.replica == replica])
        await until(lambda: len([each for each in self.started if each.replica == replica]) > count)
        return self[replica]

    def open(self, text="ab", **options):
        """A request under way: its output, once it has ended."""

        async def run():
            params = SamplingParams(max_tokens=8, **options.pop("params", {}))
            output = RequestOutput.empty(request_id="", prompt_token_ids=[], num_choices=params.n)
            async for delta in self.engine.generate(list(text.encode()), params, **options):
                output.add(delta)
            return output.outputs[0].text

        return asyncio.create_task(run())

    async def open_all(self, count, **options):
        """So many at once, and where they went: for each engine its tasks."""
        tasks = {0: [], 1: []}
        for number in range(count):
            before = {replica: len(self[replica].requests) for replica in tasks}
            task = self.open(f"{number}{number}", **options)
            await until(lambda before=before: any(len(self[each].requests) > before[each] for each in tasks))
            tasks[next(each for each in tasks if len(self[each].requests) > before[each])].append(task)
        return tasks


async def until(condition, timeout=5.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.005)


@pytest.fixture
async def make_cluster():
    clusters = []

    async def make(*, ready=True, **options):
        clusters.append(Cluster(**{"data_parallel": 2, "data_parallel_routing": "least-loaded"} | options))
        await clusters[-1].start(ready=ready)
        return clusters[-1]

    yield make
    for cluster in clusters:
        await cluster.engine.shutdown()


async def test_requests_are_spread_and_answers_find_their_way(make_cluster):
    cluster = await make_cluster()
    tasks = await cluster.open_all(6)
    assert [len(tasks[replica]) for replica in (0, 1)] == [3, 3]
    for replica in (0, 1):
        for number, request in enumerate(cluster[replica].requests):
            cluster[replica].answer(request, f"{replica}{number}", finish_reason="length")
        assert await asyncio.gather(*tasks[replica]) == [f"{replica}{number}" for number in range(3)]
    assert cluster.engine.num_open_requests == 0
    assert {cluster.engine._dispatcher._router.loads[replica].num_tokens for replica in (0, 1)} == {0}


async def test_seeds_are_drawn_in_order_of_arrival_whoever_gets_the_request(make_cluster):
    seeds = []
    for count in (1, 2):
        cluster = await make_cluster(data_parallel=count)
        requests = {}
        for number in range(4):
            cluster.open(f"{number}")
            await until(lambda: sum(len(each.requests) for each in cluster.started) == number + 1)  # noqa: B023
        for each in cluster.started:
            requests |= {request.prompt_token_ids[0]: request.children[0].seed for request in each.requests}
        seeds.append([requests[ord(str(number))] for number in range(4)])
    assert seeds[0] == seeds[1]


async def test_the_first_engine_that_is_ready_serves_while_the_other_loads(make_cluster):
    cluster = await make_cluster(ready=False)
    assert cluster.engine.state is EngineState.LOADING
    waiting = asyncio.create_task(cluster.engine.wait_ready())
    cluster[1].ready()
    await until(lambda: cluster.engine.state is EngineState.READY)
    assert cluster.engine.is_healthy()
    assert not waiting.done()
    task = cluster.open()
    await until(lambda: cluster[1].requests)
    cluster[1].answer(cluster[1].requests[0], "x", finish_reason="stop")
    await task
    cluster[0].ready()
    await waiting


async def test_a_failure_of_one_at_the_first_start_ends_all(make_cluster):
    cluster = await make_cluster(ready=False)
    cluster[1].ready()
    cluster[0].tell(Fatal(message="too little memory: ask for less"))
    with pytest.raises(EngineDeadError, match="ask for less"):
        await cluster.engine.wait_ready()
    assert cluster.engine.state is EngineState.DEAD
    assert "ask for less" in cluster.engine.state_detail
    assert not cluster[1].alive


async def test_what_a_dead_engine_had_not_begun_is_answered_by_the_other(make_cluster):
    cluster = await make_cluster()
    tasks = await cluster.open_all(6)
    begun, *silent = cluster[0].requests
    cluster[0].answer(begun, "x")
    await asyncio.sleep(0.02)
    cluster[0].lose("killed")
    with pytest.raises(EngineRestartingError, match="killed"):
        await tasks[0][0]
    assert cluster.engine.state is EngineState.READY
    assert cluster.engine.is_healthy()
    assert [request.key for request in cluster[1].requests[3:]] == [request.key for request in silent]
    assert cluster[1].requests[3:] == silent  # with their seeds
    assert cluster.engine.num_moved_requests == 2
    for request in cluster[1].requests:
        cluster[1].answer(request, "done", finish_reason="length")
    assert await asyncio.gather(*tasks[0][1:], *tasks[1]) == ["done"] * 5


async def test_one_of_two_choices_with_a_token_is_a_beginning(make_cluster):
    cluster = await make_cluster()
    task = cluster.open(params={"n": 2})
    await until(lambda: cluster[0].requests)
    child = cluster[0].requests[0].children[1]
    cluster[0].tell(
        Outputs(outputs=[ChildOutput(engine_id=child.engine_id, token_ids=[97])], stats=STATS, num_tokens=1)
    )
    cluster[0].lose("killed")
    with pytest.raises(EngineRestartingError):
        await asyncio.wait_for(task, 1)


async def test_a_request_is_moved_once_for_it_may_be_to_blame(make_cluster):
    cluster = await make_cluster()
    task = cluster.open()
    await until(lambda: cluster[0].requests)
    cluster[0].lose("killed")
    assert len(cluster[1].requests) == 1
    cluster[1].lose("killed too")
    with pytest.raises(EngineRestartingError, match="killed too"):
        await asyncio.wait_for(task, 1)


async def test_with_no_engine_left_a_request_waits_for_the_first_to_come_back(make_cluster):
    cluster = await make_cluster()
    cluster[1].lose("first")
    task = cluster.open()
    await until(lambda: cluster[0].requests)
    [request] = cluster[0].requests
    coming = asyncio.create_task(cluster.restarted(0))
    cluster[0].lose("second")
    assert cluster.engine.state is EngineState.RESTARTING
    with pytest.raises(EngineRestartingError):  # new ones are told to come later
        await cluster.open()
    (await coming).lose("died again while loading")  # which is nothing to those who wait
    await until(lambda: len(cluster.started) == 5)
    cluster[1].ready()
    assert cluster[1].requests == [request]
    cluster[1].answer(request, "ab", finish_reason="length")
    assert await task == "ab"


async def test_waiting_has_an_end(make_cluster):
    cluster = await make_cluster(wait_seconds=0.1)
    cluster[1].lose("first")
    task = cluster.open()
    await until(lambda: cluster[0].requests)
    cluster[0].lose("second")
    with pytest.raises(EngineRestartingError, match="second"):
        await asyncio.wait_for(task, 2)
    assert cluster.engine.num_open_requests == 0


async def test_nobody_waits_for_engines_that_will_not_come(make_cluster):
    cluster = await make_cluster(max_engine_restarts=1)
    cluster[1].lose("first")
    again = await cluster.restarted(1)
    task = cluster.open()
    await until(lambda: cluster[0].requests)
    cluster[0].lose("second")
    last = await cluster.restarted(0)
    assert not task.done()
    again.lose("third")
    last.lose("fourth")
    with pytest.raises(EngineRestartingError, match="second"):
        await asyncio.wait_for(task, 1)
    assert cluster.engine.state is EngineState.DEAD
    with pytest.raises(EngineDeadError, match="restarted once"):
        await cluster.open()


async def test_one_that_is_dead_for_good_is_left_out(make_cluster):
    cluster = await make_cluster(max_engine_restarts=0)
    cluster[0].lose("killed")
    assert cluster.engine.state is EngineState.READY
    cluster.open("a")
    cluster.open("b")
    await until(lambda: len(cluster[1].requests) == 2)


async def test_a_reader_that_leaves_while_its_request_waits_leaves_nothing_behind(make_cluster):
    cluster = await make_cluster()
    cluster[1].lose("first")
    task = cluster.open()
    await until(lambda: cluster[0].requests)
    coming = asyncio.create_task(cluster.restarted(0))
    cluster[0].lose("second")
    task.cancel()
    await asyncio.wait([task])
    again = await coming
    again.ready()
    assert again.requests == []
    assert cluster.engine._dispatcher._waiting == {}
    assert cluster.engine.num_open_requests == 0


async def test_a_request_that_was_moved_is_aborted_where_it_runs(make_cluster):
    cluster = await make_cluster()
    task = cluster.open(request_id="mine")
    await until(lambda: cluster[0].requests)
    cluster[0].lose("killed")
    assert await cluster.engine.abort("mine") == 1
    [request] = cluster[1].requests
    assert cluster[1].of(Abort) == [Abort(engine_ids=[request.children[0].engine_id])]
    assert await task == ""


async def test_draining_waits_for_all_engines_and_still_moves(make_cluster):
    cluster = await make_cluster()
    tasks = await cluster.open_all(2)
    drained = asyncio.create_task(cluster.engine.drain(5))
    await asyncio.sleep(0)
    cluster[0].lose("killed")
    await asyncio.sleep(0.05)
    assert len(cluster.started) == 2  # nothing is restarted any more
    assert cluster.engine.state is EngineState.DRAINING
    for request in cluster[1].requests:
        cluster[1].answer(request, "end", finish_reason="length")
    assert await drained
    assert await asyncio.gather(*tasks[0], *tasks[1]) == ["end", "end"]


async def test_shutdown_moves_nothing(make_cluster):
    cluster = await make_cluster()
    tasks = await cluster.open_all(4)
    await cluster.engine.shutdown()
    failures = await asyncio.gather(*tasks[0], *tasks[1], return_exceptions=True)
    assert {type(failure) for failure in failures} == {EngineDeadError}
    assert [len(cluster[replica].requests) for replica in (0, 1)] == [2, 2]


async def test_a_session_stays_with_its_engine_and_finds_it_again(make_cluster):
    cluster = await make_cluster(data_parallel_routing="session")

    async def home(session):
        before = [len(cluster[replica].requests) for replica in (0, 1)]
        task = cluster.open(session=session)
        await until(lambda: [len(cluster[replica].requests) for replica in (0, 1)] != before)
        task.cancel()
        return next(replica for replica in (0, 1) if len(cluster[replica].requests) > before[replica])

    homes = {name: await home(name) for name in "abcdefgh"}
    assert set(homes.values()) == {0, 1}
    assert {name: await home(name) for name in homes} == homes
    coming = asyncio.create_task(cluster.restarted(0))
    cluster[0].lose("killed")
    assert {await home(name) for name in homes} == {1}
    (await coming).ready()
    assert {name: await home(name) for name in homes} == homes


async def test_prompts_that_begin_alike_meet_in_one_cache_until_it_is_lost(make_cluster):
    cluster = await make_cluster(data_parallel_routing="prefix-affinity")
    prompt = "x" * 100

    async def ask(end):
        task = cluster.open(prompt + end)
        await until(lambda: any(request for each in cluster.started for request in open_of(each)))
        [(each, request)] = [(each, request) for each in cluster.started for request in open_of(each)]
        each.answer(request, "y", finish_reason="length")
        answered.add(request.key)
        await task
        return each.replica

    def open_of(each):
        return [request for request in each.requests if request.key not in answered]

    answered = set()
    first = await ask("a")
    assert {await ask(end) for end in "bcd"} == {first}
    assert await cluster_reset(cluster)
    assert await ask("e") == 1 - first  # nobody knows it any more, and the other one has rested
    cluster[1 - first].lose("killed")
    assert await ask("f") == first


async def cluster_reset(cluster):
    reset = asyncio.create_task(cluster.engine.reset_prefix_cache())
    for replica in (0, 1):
        await until(lambda replica=replica: cluster[replica].of(ResetPrefixCache))
        assert not reset.done()
        cluster[replica].tell(PrefixCacheReset(done=True))
    return await reset


async def test_resetting_the_prefix_cache_reaches_all_and_survives_a_death(make_cluster):
    cluster = await make_cluster()
    reset = asyncio.create_task(cluster.engine.reset_prefix_cache())
    await until(lambda: all(cluster[replica].of(ResetPrefixCache) for replica in (0, 1)))
    cluster[0].tell(PrefixCacheReset(done=False))
    cluster[1].lose("killed")  # and its cache with it
    assert await reset is False


async def test_statistics_are_sums(make_cluster):
    from dataclasses import replace

    from aios_serve.messages import Heartbeat

    cluster = await make_cluster()
    for replica, tokens in ((0, 5), (1, 7)):
        stats = replace(STATS, generation_tokens=tokens, num_running=replica + 1, kv_cache_usage=0.25 * replica)
        cluster[replica].tell(Heartbeat(stats=stats))
    total = cluster.engine.stats()
    assert (total.generation_tokens, total.num_running, total.kv_cache_usage) == (12, 3, 0.125)


# Scripted engine processes.


@pytest.fixture
async def processes():
    engine = AsyncEngine(
        EngineConfig(data_parallel=2, max_num_seqs=4, threads=1),
        new_client=lambda replica: ProcessClient([sys.executable, str(SCRIPT)]),
        find=scripted.find_scripted,
        read=scripted.read_scripted,
        new_budget=lambda: RestartBudget(5, first_delay=0.05),
    )
    await engine.start()
    await engine.wait_ready()
    yield engine
    await engine.shutdown()


async def test_no_silent_request_is_lost_when_an_engine_is_killed_under_load(processes):
    rng = random.Random(os.getpid())
    slow = scripted.SLOW
    outcomes = Counter()

    async def ask(number):
        prompt, begun = f"{number}{slow}", False
        output = RequestOutput.empty(request_id="", prompt_token_ids=[])
        try:
            async for delta in processes.generate(list(prompt.encode()), SamplingParams(max_tokens=5)):
                begun = True
                output.add(delta)
        except EngineRestartingError:
            assert begun, "lost without an output"
            outcomes["cut"] += 1
        else:
            assert output.outputs[0].text == (prompt * 5)[:5]
            outcomes["whole"] += 1

    async def arrive(number):
        await asyncio.sleep(rng.uniform(0, 0.3))
        await ask(number)

    tasks = [asyncio.create_task(arrive(number)) for number in range(40)]
    await asyncio.sleep(0.25)
    os.kill(processes.replicas[0].client.pid, signal.SIGKILL)
    await asyncio.gather(*tasks)
    assert outcomes["whole"] + outcomes["cut"] == 40
    assert 1 <= outcomes["cut"] <= 4  # no more than ran at once
    assert processes.num_moved_requests > 0
    await until(lambda: all(each.is_healthy() for each in processes.replicas), 10)
    assert [each.num_restarts for each in processes.replicas] == [1, 0]
    await until(lambda: processes.stats().num_running == processes.stats().kv_cache_usage == 0)
