"""The engine process and its loop, spoken to by hand."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aios_model.sampling.params import SamplingParams
from aios_serve.channel import ChannelClosedError, QueueChannel, SocketChannel
from aios_serve.config import EngineConfig
from aios_serve.engine_loop import EngineLoop
from aios_serve.engine_process import serve
from aios_serve.messages import (
    Abort,
    AddRequest,
    ChildRequest,
    Fatal,
    FrameBuffer,
    Heartbeat,
    Loading,
    Outputs,
    Ready,
    RequestFailed,
    Shutdown,
    Start,
    decode_event,
    encode_frame,
)

SCRIPT = Path(__file__).with_name("scripted.py")
spec = importlib.util.spec_from_file_location("scripted", SCRIPT)
scripted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripted)

START = Start(config=EngineConfig(max_num_seqs=2, max_num_queued_reqs=1))


def add(key, text="ab", *, n=1, **params):
    return AddRequest(
        key=key,
        children=[ChildRequest(engine_id=f"{key}-{index}", seed=index) for index in range(n)],
        prompt_token_ids=list(text.encode()),
        params=SamplingParams(n=n, **params),
        eos_token_ids=(scripted.EOS,),
        arrival_time=time.monotonic(),
    )


class Peer:
    """The other end of an engine process."""

    def __init__(self):
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(10)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT), "--fd", str(theirs.fileno())], pass_fds=(theirs.fileno(),)
            )
        self._buffer = FrameBuffer()

    def send(self, *commands):
        self.socket.sendall(b"".join(map(encode_frame, commands)))

    def events(self):
        while data := self.socket.recv(4096):
            yield from map(decode_event, self._buffer.feed(data))

    def close(self):
        self.socket.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def peer():
    peer = Peer()
    yield peer
    peer.close()


def next_of(events, kind):
    return next(event for event in events if isinstance(event, kind))


def test_a_process_loads_answers_and_leaves_when_told(peer):
    events = peer.events()
    peer.send(START)
    assert isinstance(next(events), Loading)
    assert next(events).info.model_name == "scripted"
    peer.send(add("x", max_tokens=3))
    token_ids = []
    while len(token_ids) < 3:
        event = next_of(events, Outputs)
        token_ids += [token_id for output in event.outputs for token_id in output.token_ids]
    assert bytes(token_ids) == b"aba"
    assert event.outputs[0].finish_reason == "length"
    peer.send(Shutdown())
    assert peer.process.wait(5) == 0


@pytest.mark.parametrize("state", ["before start", "idle", "busy"])
def test_a_process_leaves_at_once_when_its_parent_is_gone(peer, state):
    if state != "before start":
        peer.send(START)
        next_of(peer.events(), Ready)
    if state == "busy":
        peer.send(add("x", f"{scripted.SLOW}", max_tokens=120))
        next_of(peer.events(), Outputs)
    peer.socket.close()
    assert peer.process.wait(2) == 0


def test_nonsense_on_the_socket_ends_the_process_with_a_reason(peer):
    events = peer.events()
    peer.send(START)
    next_of(events, Ready)
    peer.socket.sendall(b"\x00\x00\x00\x01\xff")
    assert "FrameError" in next_of(events, Fatal).message
    assert peer.process.wait(5) == 1


def test_anything_but_start_first_is_refused(peer):
    peer.send(Shutdown())
    assert "expected Start" in next_of(peer.events(), Fatal).message
    assert peer.process.wait(5) == 1


class Script:
    """A channel that plays commands, one batch for each look, and then the end of the other side."""

    def __init__(self, *batches):
        self._batches = list(batches)
        self.timeouts = []
        self.sent = []

    def receive(self, timeout):
        self.timeouts.append(timeout)
        if not self._batches:
            raise ChannelClosedError
        return self._batches.pop(0)

    def send(self, event):
        self.sent.append(event)

    def of(self, kind):
        return [event for event in self.sent if isinstance(event, kind)]


def run_loop(*batches):
    channel = Script([START], *batches)
    assert serve(channel, scripted.build_scripted) == 0
    return channel


def test_the_loop_waits_only_while_there_is_nothing_to_do():
    channel = run_loop([], [add("x", max_tokens=2)], [], [], [])
    assert channel.timeouts == [None, 1.0, 1.0, 0, 1.0, 1.0, 1.0]
    assert len(channel.of(Outputs)) == 2
    assert len(channel.of(Heartbeat)) == 3


def test_an_abort_shows_in_the_next_numbers():
    channel = run_loop([add("x", max_tokens=100)], [Abort(engine_ids=["x-0", "unknown"])])
    assert channel.of(Outputs)[-1].stats.num_running == 1
    last = channel.of(Heartbeat)[-1].stats
    assert (last.num_running, last.kv_cache_usage) == (0, 0.0)


def test_a_parent_that_leaves_during_loading_ends_the_build():
    built = []

    class Gone(Script):
        def send(self, event):
            raise ChannelClosedError

    def build(config, progress):
        progress("loading weights", 0.1)
        built.append(config)

    assert serve(Gone([START]), build) == 0
    assert built == []


def test_a_refused_request_says_why_and_queues_none_of_its_choices():
    channel = run_loop(
        [add("good", max_tokens=5)],
        [add("long", "x" * 200)],
        [add("many", n=4)],
        *[[]] * 8,
    )
    long, many = channel.of(RequestFailed)
    assert (long.key, long.kind, long.param) == ("long", "invalid", "prompt")
    assert (many.key, many.kind) == ("many", "queue_full")
    assert {output.engine_id for event in channel.of(Outputs) for output in event.outputs} == {"good-0"}
    assert sum(len(output.token_ids) for event in channel.of(Outputs) for output in event.outputs) == 5


def test_an_unexpected_error_in_adding_fails_that_request_only(monkeypatch, caplog):
    built = scripted.build_scripted(START.config, lambda stage, fraction: None)
    real_add = built.port.add

    def failing_add(message):
        if message.key == "bad":
            raise KeyError("unexpected")
        real_add(message)

    monkeypatch.setattr(built.port, "add", failing_add)
    channel = Script([add("bad"), add("good", max_tokens=1)])
    with pytest.raises(ChannelClosedError):
        EngineLoop(built.port, channel).run()
    assert [(event.key, event.kind) for event in channel.of(RequestFailed)] == [("bad", "error")]
    assert "unexpected" not in channel.of(RequestFailed)[0].message
    assert channel.of(Outputs)[0].outputs[0].engine_id == "good-0"
    assert "unexpected" in caplog.text


def test_an_error_of_the_loop_itself_is_fatal_and_keeps_its_traceback_in_the_log(monkeypatch, caplog):
    closed = []

    def build(config, progress):
        built = scripted.build_scripted(config, progress)
        monkeypatch.setattr(built.port, "step", lambda: {}["secret"])
        built.close = lambda: closed.append(True)
        return built

    channel = Script([START], [add("x")])
    assert serve(channel, build) == 1
    (fatal,) = channel.of(Fatal)
    assert "KeyError" in fatal.message
    assert "secret" not in fatal.message
    assert "secret" in caplog.text
    assert closed == [True]


def test_the_first_output_carries_when_the_request_was_scheduled():
    request = add("x", max_tokens=2)
    channel = run_loop([request], [])
    first, second = (event.outputs[0] for event in channel.of(Outputs))
    assert request.arrival_time <= first.scheduled_time <= time.monotonic()
    assert second.scheduled_time is None


def test_a_socket_channel_tells_of_the_end_of_the_other_side():
    ours, theirs = socket.socketpair()
    channel = SocketChannel(theirs)
    assert channel.receive(0) == []
    ours.sendall(encode_frame(Shutdown()) * 2 + b"\x00")
    assert channel.receive(None) == [Shutdown(), Shutdown()]
    ours.close()
    with pytest.raises(ChannelClosedError):
        channel.receive(None)
    with pytest.raises(ChannelClosedError):
        channel.send(Fatal(message="x"))
    theirs.close()


def test_a_queue_channel_tells_of_the_end_of_the_other_side():
    delivered = []
    channel = QueueChannel(delivered.append)
    assert channel.receive(0) == channel.receive(0.01) == []
    channel.put(Shutdown())
    channel.put(Shutdown())
    assert channel.receive(None) == [Shutdown(), Shutdown()]
    channel.send(Fatal(message="x"))
    assert delivered == [Fatal(message="x")]
    channel.close()
    with pytest.raises(ChannelClosedError):
        channel.receive(None)
    with pytest.raises(ChannelClosedError):
        channel.send(Fatal(message="x"))
