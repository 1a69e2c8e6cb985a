"""Frames: what goes in comes out, and nothing else can."""

from __future__ import annotations

import random

import pytest

from aios_model.sampling.params import SamplingParams
from aios_model.sampling.rows import TokenLogprobs
from aios_sched.stats import EngineStats
from aios_serve import messages
from aios_serve.config import EngineConfig
from aios_serve.messages import (
    Abort,
    AddRequest,
    ChildOutput,
    ChildRequest,
    Fatal,
    FrameBuffer,
    FrameError,
    Heartbeat,
    Loading,
    Outputs,
    PrefixCacheReset,
    RequestFailed,
    ResetPrefixCache,
    Shutdown,
    Start,
    decode_command,
    decode_event,
    encode_frame,
)

STATS = EngineStats(
    num_running=1,
    num_waiting=2,
    kv_cache_usage=0.5,
    prefix_cache_queries=3,
    prefix_cache_hits=4,
    num_preemptions=5,
    prompt_tokens=6,
    generation_tokens=7,
    num_steps=8,
    num_failed_steps=9,
    schedule_seconds=0.1,
    step_seconds=0.2,
    num_draft_tokens=10,
)
PARAMS = SamplingParams(
    n=2,
    temperature=0.5,
    stop=("a", "é"),
    stop_token_ids=(3, 4),
    logit_bias={5: 1.5, 0: -100.0},
    allowed_token_ids=(1, 5),
    bad_words=("no",),
    bad_words_token_ids=((1, 2), (3,)),
    seed=-(2**63),
    max_tokens=None,
    logprobs=0,
)
ADD = AddRequest(
    key="k",
    children=[ChildRequest(engine_id="k-0", seed=2**63 - 1), ChildRequest(engine_id="k-1", seed=-5)],
    prompt_token_ids=[1, 2, 3],
    params=PARAMS,
    eos_token_ids=(0,),
    arrival_time=1.25,
    priority=-1,
    cache_salt="s",
)
SPECULATIVE = EngineConfig(speculative={"method": "ngram", "num_speculative_tokens": 3})
COMMANDS = [
    Start(config=EngineConfig(model="m")),
    Start(config=SPECULATIVE),
    ADD,
    Abort(engine_ids=["a"]),
    ResetPrefixCache(),
    Shutdown(),
]
EVENTS = [
    Loading(stage="loading weights", fraction=0.5),
    Outputs(
        outputs=[
            ChildOutput(
                engine_id="k-0",
                token_ids=[7],
                logprobs=[TokenLogprobs(token_id=7, logprob=float("-inf"), rank=2, top=((7, -0.5), (8, -1.0)))],
                finish_reason="stop",
                stop_reason=7,
                num_cached_tokens=16,
                scheduled_time=2.5,
            )
        ],
        stats=STATS,
        num_tokens=3,
    ),
    RequestFailed(key="k", kind="invalid", message="m", param="prompt"),
    PrefixCacheReset(done=False),
    Heartbeat(stats=STATS),
    Fatal(message="m"),
]


@pytest.mark.parametrize(
    ("message", "decode"),
    [(command, decode_command) for command in COMMANDS] + [(event, decode_event) for event in EVENTS],
    ids=lambda value: type(value).__name__,
)
def test_a_message_survives_its_frame(message, decode):
    (body,) = FrameBuffer().feed(encode_frame(message))
    assert decode(body) == message


def test_frames_are_found_however_the_stream_is_cut():
    stream = b"".join(encode_frame(event) for event in EVENTS) * 20
    cutter = random.Random(0)
    buffer, bodies, start = FrameBuffer(), [], 0
    while start < len(stream):
        end = start + cutter.choice([1, 2, 3, 5, 50, 500])
        bodies += buffer.feed(stream[start:end])
        start = end
    assert [decode_event(body) for body in bodies] == EVENTS * 20


def test_a_frame_that_claims_to_be_huge_is_refused_before_it_is_read():
    with pytest.raises(FrameError, match="exceeds the limit"):
        FrameBuffer().feed((messages.MAX_FRAME_BYTES + 1).to_bytes(4, "big"))


def test_a_message_too_large_for_a_frame_is_not_sent(monkeypatch):
    monkeypatch.setattr(messages, "MAX_FRAME_BYTES", 100)
    with pytest.raises(FrameError, match="Fatal of"):
        encode_frame(Fatal(message="x" * 200))


@pytest.mark.parametrize("body", [b"", b"\xff", b"\x80", b"\x81\xa4type\xa5other", b"cos\nsystem\n(S'true'\ntR."])
def test_bytes_that_are_no_message_are_refused(body):
    with pytest.raises(FrameError):
        decode_command(body)
    with pytest.raises(FrameError):
        decode_event(body)


def test_events_are_not_taken_for_commands():
    (body,) = FrameBuffer().feed(encode_frame(Heartbeat(stats=STATS)))
    with pytest.raises(FrameError):
        decode_command(body)


def test_sampling_parameters_are_checked_again_on_arrival():
    frame = encode_frame(ADD).replace(b"temperature\xcb?\xe0", b"temperature\xcb@Y")  # 0.5 becomes 100
    (body,) = FrameBuffer().feed(frame)
    with pytest.raises(FrameError, match="temperature"):
        decode_command(body)
