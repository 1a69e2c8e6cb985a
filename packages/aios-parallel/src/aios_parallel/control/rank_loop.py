"""A rank's main loop: commands from the driver, one after the other, and a sign of life meanwhile."""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Any, Protocol

from aios_model.errors import AiosError
from aios_model.sampling.errors import SamplingError
from aios_parallel.control.connection import ConnectionLostError
from aios_parallel.control.messages import Answer, Beat, Call, Failure, Progress, Step, StepFailed
from aios_parallel.control.step_codec import StepDecoder, encode_result
from aios_parallel.errors import ParallelError
from aios_sched.errors import describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from aios_parallel.control.connection import Connection
    from aios_parallel.tracing.rank_tracer import RankTracer
    from aios_sched.output import SchedulerOutput, StepResult

logger = logging.getLogger(__name__)

BEAT_SECONDS = 0.5


class Rank(Protocol):
    """What a rank can do."""

    def call(self, name: str, arguments: dict[str, Any], report: Callable[[str, float | None], None]) -> Any:
        """Sets something up; the result is plain data."""
        ...

    def execute(self, output: SchedulerOutput) -> StepResult | None:
        """Runs its part of a step; the tokens, if this rank draws them."""
        ...

    @property
    def progress(self) -> int:
        """Grows while a step makes progress; read by another thread."""
        ...

    @property
    def num_exchanges(self) -> int:
        """Collectives and transfers that it has joined."""
        ...

    @property
    def tracer(self) -> RankTracer:
        """Is told of every step."""
        ...


def serve_rank(connection: Connection, rank: Rank) -> int:
    """Serves the driver until it closes the connection; returns the exit status.

    A rank without a driver ends at once, also in the middle of a step: the heartbeat finds the connection closed.
    """
    state = _State()
    beat = threading.Thread(target=_beat, args=(connection, rank, state), name="aios-beat", daemon=True)
    beat.start()
    decoder = StepDecoder()
    try:
        for command in connection:
            state.is_busy = True
            if isinstance(command, Step):
                begin = rank.tracer.now()
                _run_step(connection, rank, decoder, command)
                rank.tracer.step(begin, command)
            elif not _call(connection, rank, command):
                return 1
            state.is_busy = False
    except ConnectionLostError:
        return 0
    except ParallelError as error:  # the group is lost, and the driver has heard of it or will: nothing else to say
        logger.error("%s", error)
        return 1
    finally:
        state.is_over.set()
    return 0


class _State:
    def __init__(self) -> None:
        self.is_busy = False
        self.is_over = threading.Event()


def _beat(connection: Connection, rank: Rank, state: _State) -> None:
    while not state.is_over.wait(BEAT_SECONDS):
        try:
            connection.send(Beat(busy=state.is_busy, progress=rank.progress))
        except ConnectionLostError:
            if not state.is_over.wait(BEAT_SECONDS):
                os._exit(1)  # the main thread may be waiting, in native code, for a rank that is gone


def _call(connection: Connection, rank: Rank, call: Call) -> bool:
    try:
        result = rank.call(call.name, call.arguments, lambda stage, share: connection.send(Progress(stage, share)))
    except ConnectionLostError:
        raise
    except Exception as error:
        is_expected = isinstance(error, AiosError)
        if not is_expected:
            logger.exception("%s failed", call.name)
        connection.send(Failure(describe(error), is_expected))
        return False
    connection.send(Answer(result))
    return True


def _run_step(connection: Connection, rank: Rank, decoder: StepDecoder, step: Step) -> None:
    before = rank.num_exchanges
    try:
        result = rank.execute(decoder.decode(step))
    except ConnectionLostError:
        raise
    except ParallelError as error:
        connection.send(Failure(str(error), is_expected=True))
        raise
    except Exception as error:
        logger.warning("step %d failed: %s", step.step_id, describe(error))
        request_ids = list(error.request_ids) if isinstance(error, SamplingError) else None
        connection.send(StepFailed(step.step_id, describe(error), request_ids, rank.num_exchanges - before))
        return
    if result is not None:
        connection.send(encode_result(step.step_id, result))
