"""What the driver and its ranks say to each other.

Commands go to the ranks, events come back. Each is a msgspec struct, framed as a 4-byte big-endian length and a
msgpack body; nothing is ever pickled, so a message can only be one of the shapes below.

    driver                          rank
      Call(name, arguments)  ───►     sets something up
                             ◄───     Progress(stage, fraction) …, then Answer(result)
      Step(rows)             ───►     runs its part of a step
                             ◄───     StepDone(sampled), from the rank that draws the tokens;
                                      from all ranks if pages were read from disk, for each reads its own
                             ◄───     StepFailed(reason), from any
                             ◄───     Beat(progress), twice a second: a sign of life
                             ◄───     Failure(reason): the rank cannot go on
      (either side closing the socket ends the rank)
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from aios_kvcache.swap import SwapKind
from aios_model.sampling.rows import TokenLogprobs
from aios_parallel.errors import WireError

MAX_FRAME_BYTES = 256 * 2**20
_LENGTH_BYTES = 4


class Call(msgspec.Struct, frozen=True, tag="call"):
    """Run one of the rank's functions; answered by Answer or Failure."""

    name: str
    arguments: dict[str, Any]


class NewRequest(msgspec.Struct, frozen=True, array_like=True):
    """What the sampler must know of a request, sent once."""

    request_id: str
    prompt_token_ids: list[int]
    params: Any
    seed: int
    stop_token_ids: list[int]


class StepRow(msgspec.Struct, frozen=True, array_like=True):
    """A request's share of a step. Lists that a rank knows already are sent as what follows the part it can keep."""

    request_id: str
    token_ids: list[int]
    start: int
    kept_blocks: int
    new_blocks: list[int]
    position: int | None = None  # of the token to be drawn; None if none is
    kept_outputs: int = 0
    new_outputs: list[int] = []
    num_drafts: int = 0


class Step(msgspec.Struct, frozen=True, omit_defaults=True, tag="step"):
    """One step, as `aios_sched.output.SchedulerOutput`; `finished` come first, then `new`, then the rows."""

    step_id: int
    finished: list[str]
    new: list[NewRequest]
    rows: list[StepRow]
    block_copies: list[tuple[int, int]]
    first_swap: int = 0
    swaps: list[tuple[SwapKind, int, int]] = []  # kind, source, target


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """What a call is doing, and how much of it is done (0..1) where that is known."""

    stage: str
    fraction: float | None = None


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """The result of a call."""

    result: Any


class Sampled(msgspec.Struct, frozen=True, array_like=True):
    """A token that was drawn; a request with drafts that were right has several, one after the other."""

    request_id: str
    token_id: int
    logprobs: TokenLogprobs | None = None


class StepDone(msgspec.Struct, frozen=True, omit_defaults=True, tag="done"):
    """The tokens of a step, and the moves of pages that failed on this rank.

    From the rank that draws the tokens; and from every rank, without tokens, if the step reads pages from disk.
    """

    step_id: int
    sampled: list[Sampled]
    lost_swaps: list[int] = []


class StepFailed(msgspec.Struct, frozen=True, tag="step_failed"):
    """A rank could not run a step.

    `request_ids` are given if sampling failed, which leaves the ranks in step. `num_exchanges` counts the collectives
    of this step that the rank had joined: ranks that failed alike are still in step with each other.
    """

    step_id: int
    message: str
    request_ids: list[str] | None
    num_exchanges: int


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """A sign of life: whether the rank has work, and a number that grows while it makes progress."""

    busy: bool
    progress: int


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    """The rank cannot go on; `is_expected` if the message says by itself what to do."""

    message: str
    is_expected: bool


Command: TypeAlias = Call | Step
Event: TypeAlias = Progress | Answer | StepDone | StepFailed | Beat | Failure


def encode_frame(message: Command | Event) -> bytes:
    """The bytes of one message, its length in front; WireError if it is too large."""
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"a {type(message).__name__} of {len(body)} bytes exceeds the limit of {MAX_FRAME_BYTES}")
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


class FrameReader:
    """Cuts a byte stream into messages, however it was split on the way.

    Args:
        decoder: Of the messages that may come.
        limit: Largest body that is accepted, in bytes.
    """

    def __init__(self, decoder: msgspec.msgpack.Decoder[Any], *, limit: int = MAX_FRAME_BYTES) -> None:
        self._decoder = decoder
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """Takes `data` and returns every message that is complete now; WireError if one is none of ours."""
        self._buffer += data
        messages: list[Any] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH_BYTES:
            body = start + _LENGTH_BYTES
            length = int.from_bytes(self._buffer[start:body], "big")
            if length > self._limit:
                raise WireError(f"a frame of {length} bytes exceeds the limit of {self._limit}")
            if len(self._buffer) < body + length:
                break
            messages.append(self._decode(memoryview(self._buffer)[body : body + length]))
            start = body + length
        del self._buffer[:start]
        return messages

    def _decode(self, body: memoryview) -> Any:
        try:
            return self._decoder.decode(body)
        except msgspec.DecodeError as error:
            raise WireError(f"not a control message: {error}") from error
        finally:
            body.release()


def command_reader() -> FrameReader:
    """Reads what a driver sends."""
    return FrameReader(msgspec.msgpack.Decoder(Command))


def event_reader() -> FrameReader:
    """Reads what a rank sends."""
    return FrameReader(msgspec.msgpack.Decoder(Event))
