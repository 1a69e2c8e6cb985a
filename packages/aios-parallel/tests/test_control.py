"""The control plane: who may join, what can be said, and what happens when somebody falls silent."""

from __future__ import annotations

import random
import socket
import threading
import time

import msgspec
import pytest

from aios_kvcache.block import BlockCopy
from aios_kvcache.swap import Swap
from aios_model.errors import ConfigError
from aios_model.sampling.errors import SamplingError
from aios_model.sampling.params import SamplingParams
from aios_model.sampling.rows import SampledToken, SamplingRow, TokenLogprobs
from aios_parallel.control.connection import Connection, ConnectionLostError
from aios_parallel.control.driver import RankGroup
from aios_parallel.control.handshake import accept_peer, host_identity, join, new_token
from aios_parallel.control.messages import (
    Answer,
    Beat,
    Call,
    Failure,
    Progress,
    Step,
    StepDone,
    StepFailed,
    command_reader,
    encode_frame,
    event_reader,
)
from aios_parallel.control.rank_loop import serve_rank
from aios_parallel.control.step_codec import StepDecoder, StepEncoder, decode_results, encode_result
from aios_parallel.errors import RankFailedError, WireError
from aios_parallel.executor import GroupExecutor, StepError
from aios_parallel.mesh import Mesh
from aios_parallel.tracing.rank_tracer import RankTracer
from aios_sched.output import ScheduledRequest, SchedulerOutput, StepResult

OPENED: list[socket.socket] = []


def sockets() -> tuple[socket.socket, socket.socket]:
    ends = socket.socketpair()
    OPENED.extend(ends)
    return ends


@pytest.fixture(autouse=True)
def close_sockets():
    yield
    while OPENED:
        OPENED.pop().close()


def pair() -> tuple[Connection, Connection]:
    """The driver's end, and the rank's."""
    ours, theirs = sockets()
    return Connection(ours, event_reader()), Connection(theirs, command_reader())


def receive_all(connection: Connection) -> None:
    while True:
        connection.receive()


def eventually(holds) -> None:
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def step(step_id: int = 0, **fields) -> SchedulerOutput:
    given = {"requests": (), "block_copies": (), "num_scheduled_tokens": 0, "finished_request_ids": ()}
    return SchedulerOutput(step_id=step_id, **{**given, **fields})


# -- messages ----------------------------------------------------------------------------------------------------------


def test_messages_survive_being_cut_anywhere() -> None:
    messages = [Call("load", {"a": [1, 2]}), Step(3, ["x"], [], [], [(1, 2)]), Call("b", {})]
    data = b"".join(encode_frame(message) for message in messages)
    reader, got = command_reader(), []
    while data:
        cut = random.randint(1, 40)
        got += reader.feed(data[:cut])
        data = data[cut:]
    assert got == messages


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x03abc",
        len(body := msgspec.msgpack.encode({"type": "eval"})).to_bytes(4, "big") + body,
        encode_frame(Beat(busy=True, progress=1)),  # an event is no command
    ],
)
def test_what_is_no_command_is_refused(data) -> None:
    with pytest.raises(WireError):
        command_reader().feed(data)


def test_steps_arrive_as_they_were_planned() -> None:
    encoder, decoder = StepEncoder(), StepDecoder()
    rng = random.Random()
    tables: dict[str, list[int]] = {}
    outputs: dict[str, list[int]] = {}
    prompts = {name: [rng.randrange(100) for _ in range(5)] for name in "abcd"}
    params = {name: SamplingParams(temperature=rng.random(), seed=rng.randrange(99)) for name in "abcd"}
    for step_id in range(200):
        rows = []
        finished = [name for name in list(tables) if rng.random() < 0.1]
        for name in finished:  # it ended, or its step was rolled back
            if rng.random() < 0.5:
                del tables[name], outputs[name]
        for name in rng.sample("abcd", rng.randint(1, 4)):
            table = tables.setdefault(name, [])
            change = rng.random()
            if change < 0.2 and table:
                table[rng.randrange(len(table))] = rng.randrange(1000)
            elif change < 0.3:
                del table[rng.randrange(len(table) + 1) :]
            table.append(rng.randrange(1000))
            known = outputs.setdefault(name, [])
            known += [rng.randrange(100) for _ in range(rng.randrange(3))]
            drafts = [rng.randrange(100) for _ in range(rng.choice([0, 0, 2]))]
            sampling = SamplingRow(
                request_id=name,
                params=params[name],
                seed=7,
                position=5 + len(known),
                prompt_token_ids=prompts[name],
                output_token_ids=known,
                stop_token_ids=(1, 2),
            )
            rows.append(
                ScheduledRequest(
                    request_id=name,
                    token_ids=[rng.randrange(100), *drafts],
                    start=len(known),
                    block_table=list(table),
                    sampling=sampling if drafts or rng.random() < 0.8 else None,
                    num_drafts=len(drafts),
                )
            )
        output = step(
            step_id,
            requests=tuple(rows),
            block_copies=(BlockCopy(source=1, destination=2),),
            num_scheduled_tokens=sum(len(row.token_ids) for row in rows),
            finished_request_ids=tuple(finished),
            swaps=(Swap("out", 3, step_id), Swap("load", step_id, 3)) if rng.random() < 0.5 else (),
            first_swap=rng.randrange(2**40),
        )
        (message,) = command_reader().feed(encode_frame(encoder.encode(output)))
        assert decoder.decode(message) == output


def test_a_decode_is_small_on_the_wire() -> None:
    encoder = StepEncoder()
    params, outputs = SamplingParams(), list(range(3000))

    def frame() -> bytes:
        outputs.append(5)
        row = SamplingRow(
            request_id="a",
            params=params,
            seed=1,
            position=4000 + len(outputs),
            prompt_token_ids=list(range(4000)),
            output_token_ids=outputs,
        )
        request = ScheduledRequest(
            request_id="a", token_ids=[5], start=7000, block_table=list(range(500)), sampling=row
        )
        return encode_frame(encoder.encode(step(requests=(request,))))

    assert len(frame()) > 10_000
    assert len(frame()) < 90


def test_tokens_arrive_with_their_logprobs() -> None:
    logprobs = TokenLogprobs(token_id=3, logprob=-0.5, rank=1, top=((3, -0.5), (4, -1.5)))
    result = StepResult(sampled={"a": SampledToken(token_id=3, logprobs=logprobs), "b": SampledToken(token_id=9)})
    (message,) = event_reader().feed(encode_frame(encode_result(4, result)))
    assert message.step_id == 4
    assert decode_results([message]) == result


def test_tokens_behind_drafts_arrive_in_their_order() -> None:
    logprobs = TokenLogprobs(token_id=5, logprob=-0.5, rank=1)
    result = StepResult(
        sampled={"a": SampledToken(token_id=3), "b": SampledToken(token_id=9), "c": SampledToken(token_id=1)},
        further={
            "a": [SampledToken(token_id=5, logprobs=logprobs), SampledToken(token_id=3)],
            "c": [SampledToken(token_id=1)],
        },
    )
    (message,) = event_reader().feed(encode_frame(encode_result(4, result)))
    assert decode_results([message]) == result


def test_what_each_rank_lost_is_put_together() -> None:
    parts = [StepResult(sampled={}, lost_swaps=(2**40, 3)), StepResult(sampled={}, lost_swaps=(3, 8))]
    messages = [event_reader().feed(encode_frame(encode_result(4, part)))[0] for part in parts]
    assert decode_results(messages) == StepResult(sampled={}, lost_swaps=(3, 8, 2**40))


# -- joining -----------------------------------------------------------------------------------------------------------


def handshake(driver_token: str, rank_token: str):
    ours, theirs = sockets()
    outcome = []

    def accept() -> None:
        try:
            outcome.append(accept_peer(ours, driver_token))
        except WireError as error:
            outcome.append(error)
            ours.close()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        join(theirs, rank_token, rank=3)
    finally:
        thread.join()
    return outcome[0]


def test_who_knows_the_token_may_join() -> None:
    token = new_token()
    peer = handshake(token, token)
    assert (peer.rank, peer.host) == (3, host_identity())


def test_who_does_not_know_the_token_is_turned_away() -> None:
    with pytest.raises(WireError, match="same token"):
        handshake(new_token(), new_token())


def test_a_listener_that_is_no_driver_is_recognised() -> None:
    ours, theirs = sockets()
    ours.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 3)
    with pytest.raises(WireError, match="no driver"):
        join(theirs, "token", rank=0)


def test_garbage_does_not_join() -> None:
    ours, theirs = sockets()
    theirs.sendall(b"GET / HTTP/1.1\r\nHost: example\r\nUser-Agent: curious-and-rather-long\r\n\r\n")
    with pytest.raises(WireError, match="without the run's token"):
        accept_peer(ours, "token")


# -- a group -----------------------------------------------------------------------------------------------------------


class Ranks:
    """A group whose ranks the test plays."""

    def __init__(self, size: int, **options) -> None:
        ends = [pair() for _ in range(size)]
        self.ended = 0
        self.ranks = [rank for _, rank in ends]
        self.group = RankGroup([ours for ours, _ in ends], end_processes=self._end, **{"silence": 0.6, **options})

    def _end(self) -> None:
        self.ended += 1

    def say(self, event, rank: int = 0) -> None:
        self.ranks[rank].send(event)

    def beat_forever(self, *ranks: int, **fields) -> None:
        def run() -> None:
            while True:
                for rank in ranks:
                    try:
                        self.say(Beat(**{"busy": False, "progress": 0, **fields}), rank)
                    except ConnectionLostError:
                        return
                time.sleep(0.1)

        threading.Thread(target=run, daemon=True).start()


@pytest.fixture
def ranks():
    made = []

    def make(size: int, **options) -> Ranks:
        made.append(Ranks(size, **options))
        return made[-1]

    yield make
    for each in made:
        each.group.close()


def test_a_call_brings_every_ranks_answer(ranks) -> None:
    group, heard = ranks(3), []
    for rank in (2, 0, 1):
        group.say(Progress("reading", 0.5), rank)
        group.say(Answer({"rank": rank}), rank)
    answers = group.group.call("load", [{"i": i} for i in range(3)], lambda *what: heard.append(what))
    assert answers == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert heard == [("reading", 0.5)]
    assert [rank.receive() for rank in group.ranks] == [Call("load", {"i": i}) for i in range(3)]


def test_a_rank_that_refuses_while_loading_is_quoted(ranks) -> None:
    group = ranks(2)
    group.say(Failure("9 heads cannot be shared; use 9", is_expected=True), 1)
    with pytest.raises(ConfigError, match="rank 1: 9 heads cannot be shared; use 9"):
        group.group.call("load", [{}, {}], lambda *_: None)
    eventually(lambda: group.ended == 1)
    with pytest.raises(ConnectionLostError):  # the others were let go
        receive_all(group.ranks[0])


def test_a_rank_that_leaves_ends_the_group(ranks) -> None:
    group = ranks(2)
    group.group.start_steps()
    group.beat_forever(0, 1)
    group.group.check()
    group.ranks[1].close()
    with pytest.raises(RankFailedError, match="rank 1 is gone"):
        group.group.next_event(timeout=5)
    with pytest.raises(RankFailedError, match="rank 1 is gone"):
        group.group.check()
    eventually(lambda: group.ended == 1)


def test_a_silent_rank_ends_the_group(ranks) -> None:
    group = ranks(2)
    group.group.start_steps()
    group.beat_forever(0)
    started = time.monotonic()
    with pytest.raises(RankFailedError, match=r"rank 1 gave no sign of life for 0\.6 s"):
        group.group.next_event(timeout=5)
    assert 0.5 < time.monotonic() - started < 2


def test_ranks_that_beat_without_progress_end_the_group(ranks) -> None:
    group = ranks(2)
    group.group.start_steps()
    group.beat_forever(0, 1, busy=True, progress=7)
    with pytest.raises(RankFailedError, match="no rank made progress"):
        group.group.next_event(timeout=5)


def test_a_long_set_up_does_not_count_against_the_first_step(ranks) -> None:
    group = ranks(1)
    for _ in range(10):  # a second of loading, without progress in the sense of steps
        group.say(Beat(busy=True, progress=0))
        time.sleep(0.1)
    group.group.start_steps()
    group.say(Beat(busy=True, progress=0))  # the first step came before any idle beat
    time.sleep(0.4)  # longer than the watch looks away, shorter than the silence allowed
    group.group.check()


def test_ranks_that_wait_for_one_that_computes_are_well(ranks) -> None:
    group = ranks(2)
    group.group.start_steps()
    group.beat_forever(0, busy=True, progress=7)
    for progress in range(12):
        group.say(Beat(busy=True, progress=progress), 1)
        time.sleep(0.1)
    group.group.check()


def test_a_rank_that_sends_nonsense_ends_the_group(ranks) -> None:
    group = ranks(1)
    group.ranks[0].send_frame(b"\x00\x00\x00\x02hi")
    with pytest.raises(RankFailedError, match=r"not a control message"):
        group.group.call("load", [{}], lambda *_: None)


# -- steps -------------------------------------------------------------------------------------------------------------


def executor(ranks, tensor=1, pipeline=1):
    group = ranks(tensor * pipeline, silence=30)
    group.group.start_steps()
    return group, GroupExecutor(group.group, mesh=Mesh(tensor=tensor, pipeline=pipeline), vocab_size=10)


def test_steps_return_in_their_order(ranks) -> None:
    group, run = executor(ranks, pipeline=2)
    assert run.max_steps_in_flight == 2
    first, second = run.submit(step(0)), run.submit(step(1))
    for step_id in (0, 1):
        group.say(StepDone(step_id, []), 1)
    assert second.result() == StepResult(sampled={})
    assert first.result() == StepResult(sampled={})
    assert [message.step_id for message in (group.ranks[0].receive(), group.ranks[0].receive())] == [0, 1]


def test_a_step_that_reads_pages_from_disk_waits_for_what_every_rank_found(ranks) -> None:
    group, run = executor(ranks, tensor=2, pipeline=2)
    first = run.submit(step(0, swaps=(Swap("load", 1, 1), Swap("load", 2, 2)), first_swap=5))
    second = run.submit(step(1, first_swap=7))
    group.say(StepDone(0, [], []), 2)
    group.say(StepDone(1, []), 2)
    for rank, lost in ((0, [6]), (1, []), (3, [5])):
        assert first.outcome is None
        group.say(StepDone(0, [], lost), rank)
    assert second.result() == StepResult(sampled={})
    assert first.result() == StepResult(sampled={}, lost_swaps=(5, 6))


def test_what_ranks_found_on_disk_is_ignored_once_their_step_failed(ranks) -> None:
    group, run = executor(ranks, tensor=2)
    failed = run.submit(step(0, swaps=(Swap("load", 1, 1),)))
    group.say(StepFailed(0, "no token left", ["a"], 4), 0)
    with pytest.raises(SamplingError):
        failed.result()
    group.say(StepDone(0, [], [0]), 1)
    again = run.submit(step(1, swaps=(Swap("load", 1, 1),)))
    for rank in (0, 1):
        group.say(StepDone(1, [], [0]), rank)
    assert again.result() == StepResult(sampled={}, lost_swaps=(0,))


def test_a_sampling_error_ends_its_step_only(ranks) -> None:
    group, run = executor(ranks, tensor=2)
    handle = run.submit(step(0))
    group.say(StepFailed(0, "no token left", ["a"], 4))
    with pytest.raises(SamplingError, match="no token left") as raised:
        handle.result()
    assert raised.value.request_ids == ("a",)
    following = run.submit(step(1))
    group.say(StepDone(1, []))
    assert following.result().sampled == {}


def test_ranks_that_fail_alike_stay_together(ranks) -> None:
    group, run = executor(ranks, tensor=2)
    handle = run.submit(step(0))
    for rank in (1, 0):
        group.say(StepFailed(0, "out of memory", None, 4), rank)
    with pytest.raises(StepError, match="out of memory"):
        handle.result()
    run.check()


@pytest.mark.parametrize("others", [[], [StepFailed(0, "x", None, 5)], [StepDone(0, [])]])
def test_a_rank_that_fails_alone_ends_the_group(ranks, others) -> None:
    group, run = executor(ranks, tensor=2)
    handle = run.submit(step(0))
    group.say(StepFailed(0, "out of memory", None, 4), 0)
    time.sleep(0.1)
    for event in others:
        group.say(event, 1)
    with pytest.raises(RankFailedError, match="out of memory"):
        handle.result()
    with pytest.raises(RankFailedError):
        run.submit(step(1))


# -- a rank ------------------------------------------------------------------------------------------------------------


class FakeRank:
    progress = 3
    num_exchanges = 0

    def __init__(self) -> None:
        self.tracer = RankTracer()

    def call(self, name, arguments, report):
        report(name, 0.25)
        if name == "fail":
            raise ConfigError("use another")
        return arguments

    def execute(self, output):
        if output.step_id == 1:
            self.num_exchanges += 2
            raise ValueError("no such page")
        if output.step_id == 2:
            raise SamplingError("all are excluded", request_ids=["r"])
        return StepResult(sampled={}) if output.step_id == 0 else None


def test_a_rank_answers_and_goes_on_after_a_failed_step() -> None:
    driver, end = pair()
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(serve_rank(end, FakeRank())))
    thread.start()
    encoder = StepEncoder()
    driver.send(Call("load", {"x": 1}))
    for step_id in range(4):
        driver.send(encoder.encode(step(step_id)))
    driver.send(Call("fail", {}))
    said = []
    while not said or not isinstance(said[-1], Failure):
        said += [event for event in driver.take() if not isinstance(event, Beat)]
    thread.join()
    assert said == [
        Progress("load", 0.25),
        Answer({"x": 1}),
        StepDone(0, []),
        StepFailed(1, "ValueError: no such page", None, 2),
        StepFailed(2, "all are excluded", ["r"], 0),
        Progress("fail", 0.25),
        Failure("use another", is_expected=True),
    ]
    assert statuses == [1]


def test_a_rank_gives_signs_of_life() -> None:
    driver, end = pair()
    thread = threading.Thread(target=serve_rank, args=(end, FakeRank()))
    thread.start()
    assert driver.receive() == Beat(busy=False, progress=3)
    driver.close()
    thread.join()
