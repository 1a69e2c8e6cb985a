"""What the HTTP process and the engine process say to each other.

Commands go to the engine, events come back. Each is a msgspec struct, framed as a 4-byte big-endian length and a
msgpack body. Nothing is ever pickled: a message can only be one of the shapes below. Decoding a `SamplingParams` runs
its checks again on the other side.

    HTTP process                    engine process
      Start(config)         ───►      builds the engine
                            ◄───      Loading(stage, fraction) …, then Ready(info)
      AddRequest(children)  ───►
                            ◄───      Outputs(outputs, stats) after every step, Heartbeat(stats) while idle
      Abort(ids)            ───►
                            ◄───      RequestFailed(key, reason): this request only
      Shutdown              ───►      (either side closing the socket means the same)
                            ◄───      Fatal(reason): the engine is gone
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import msgspec

from aios_model.sampling.params import SamplingParams
from aios_model.sampling.rows import TokenLogprobs
from aios_sched.request import DEFAULT_TENANT
from aios_sched.stats import EngineStats
from aios_serve.config import EngineConfig
from aios_serve.model_info import EngineInfo

T = TypeVar("T")

if TYPE_CHECKING:
    Params: TypeAlias = SamplingParams
else:
    # Travels as a plain map: AddRequest hands it to the constructor, whose checks are stricter than any decoder's.
    Params = Any

MAX_FRAME_BYTES = 64 * 2**20
_LENGTH_BYTES = 4


class Start(msgspec.Struct, frozen=True, tag="start"):
    """Build an engine. The first message, sent once; `config.model` is a path on this machine by now."""

    config: EngineConfig


class ChildRequest(msgspec.Struct, frozen=True, array_like=True):
    """One of the n choices of a request, under the id the engine knows it by."""

    engine_id: str
    seed: int


class AddRequest(msgspec.Struct, frozen=True, tag="add"):
    """Run a request: all of its children or none.

    `arrival_time` and `deadline` are `time.monotonic()`, which on one machine means the same in every process.
    """

    key: str
    children: list[ChildRequest]
    prompt_token_ids: list[int]
    params: Params
    eos_token_ids: tuple[int, ...]
    arrival_time: float
    priority: int = 0
    cache_salt: str = ""
    tenant: str = DEFAULT_TENANT
    tenant_weight: float = 1.0
    deadline: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.params, dict):
            msgspec.structs.force_setattr(self, "params", SamplingParams(**self.params))


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Stop these children and free their pages; unknown ids are fine, they may just have finished."""

    engine_ids: list[str]


class ResetPrefixCache(msgspec.Struct, frozen=True, tag="reset_prefix_cache"):
    """Forget cached prefixes; answered by PrefixCacheReset."""


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Leave the loop."""


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """Progress: what is being done, and how much of it is done (0..1) where that is known."""

    stage: str
    fraction: float | None = None


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine takes requests."""

    info: EngineInfo
    stats: EngineStats


class ChildOutput(msgspec.Struct, array_like=True):
    """aios_sched's TokenOutput: what one child gained in a step.

    `scheduled_time` is the `time.monotonic()` at which it was first scheduled, sent with its first tokens.
    """

    engine_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    scheduled_time: float | None = None


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    """The outcome of a step. `num_tokens` counts the tokens it computed, of prompts too."""

    outputs: list[ChildOutput]
    stats: EngineStats
    num_tokens: int


class RequestFailed(msgspec.Struct, frozen=True, tag="request_failed"):
    """A request was refused or failed before it produced anything; `key` is that of its AddRequest."""

    key: str
    kind: Literal["invalid", "queue_full", "error"]
    message: str
    param: str | None = None


class PrefixCacheReset(msgspec.Struct, frozen=True, tag="prefix_cache_reset"):
    """Answer to ResetPrefixCache: False if running requests still hold cached pages."""

    done: bool


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """The loop is alive and idle."""

    stats: EngineStats


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The engine cannot go on. The traceback is in the log of its process, not here."""

    message: str


Command: TypeAlias = Start | AddRequest | Abort | ResetPrefixCache | Shutdown
Event: TypeAlias = Loading | Ready | Outputs | RequestFailed | PrefixCacheReset | Heartbeat | Fatal


class FrameError(ValueError):
    """Bytes that are no message of ours, or one that is too large."""


def encode_frame(message: Command | Event) -> bytes:
    """The bytes of one message, its length in front; FrameError if it exceeds MAX_FRAME_BYTES."""
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a {type(message).__name__} of {len(body)} bytes exceeds the limit of {MAX_FRAME_BYTES}")
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


def decode_command(body: bytes) -> Command:
    """The command in the body of a frame; FrameError if it is none."""
    return _decode(_command_decoder, body)


def decode_event(body: bytes) -> Event:
    """The event in the body of a frame; FrameError if it is none."""
    return _decode(_event_decoder, body)


class FrameBuffer:
    """Cuts a byte stream into the bodies of frames, however it was split on the way."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take in `data` and return every body that is complete now; FrameError on an impossible length."""
        self._buffer += data
        bodies: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH_BYTES:
            length = int.from_bytes(self._buffer[start : start + _LENGTH_BYTES], "big")
            if length > MAX_FRAME_BYTES:
                raise FrameError(f"a frame of {length} bytes exceeds the limit of {MAX_FRAME_BYTES}")
            end = start + _LENGTH_BYTES + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[start + _LENGTH_BYTES : end]))
            start = end
        del self._buffer[:start]
        return bodies


_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_event_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def _decode(decoder: msgspec.msgpack.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except msgspec.DecodeError as error:
        raise FrameError(f"not a message: {error}") from error
