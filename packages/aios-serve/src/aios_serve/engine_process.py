"""The engine in a process of its own: `python -m aios_serve.engine_process --fd N`, N an inherited socket.

Started by AsyncEngine, not by hand. It leaves when the other end of the socket does, and only then: interrupts from
the terminal reach the whole process group, and it is the parent who decides what they mean.
"""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

from aios_model.errors import AiosError
from aios_serve.channel import ChannelClosedError, SocketChannel
from aios_serve.engine_loop import EngineLoop
from aios_serve.messages import Fatal, Loading, Ready, Start

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from aios_serve.assembly import BuiltEngine
    from aios_serve.channel import EngineChannel
    from aios_serve.config import EngineConfig

    Progress: TypeAlias = Callable[[str, float | None], None]
    Build: TypeAlias = Callable[[EngineConfig, Progress], BuiltEngine]

logger = logging.getLogger(__name__)


def main(build: Build | None = None) -> int:
    """Serve the socket named on the command line; returns the exit status."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="python -m aios_serve.engine_process", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="an inherited, connected stream socket")
    descriptor = parser.parse_args().fd
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s engine: %(message)s")
    with socket.socket(fileno=descriptor) as connection:
        return serve(SocketChannel(connection), build or build_with_progress)


def serve(channel: EngineChannel, build: Build) -> int:
    """Build what the first message asks for and run it until the other end leaves; returns an exit status."""
    try:
        return _serve(channel, build)
    except ChannelClosedError:
        return 0


def build_with_progress(config: EngineConfig, progress: Progress) -> BuiltEngine:
    """The real thing: says that it imports torch before it does, which takes seconds. Ranks do so by themselves."""
    if config.num_ranks > 1:
        from aios_serve.build_parallel import build_parallel_engine

        return build_parallel_engine(config, progress)
    progress("importing torch", None)
    started = time.perf_counter()
    from aios_serve.build import build_engine

    return build_engine(config, progress=progress, import_seconds=time.perf_counter() - started)


def _serve(channel: EngineChannel, build: Build) -> int:
    commands = channel.receive(None)
    if len(commands) != 1 or not isinstance(commands[0], Start):
        channel.send(Fatal(message=f"expected Start, got {[type(command).__name__ for command in commands]}"))
        return 1
    logging.getLogger().setLevel(commands[0].config.log_level.upper())
    try:
        built = build(commands[0].config, lambda stage, fraction: channel.send(Loading(stage=stage, fraction=fraction)))
    except Exception as error:
        return _fail(channel, error, "loading failed")
    channel.send(Ready(info=built.info, stats=built.port.stats()))
    try:
        EngineLoop(built.port, channel, heartbeat_interval=min(1.0, commands[0].config.heartbeat_timeout / 4)).run()
    except ChannelClosedError:
        raise
    except Exception as error:
        return _fail(channel, error, "the engine loop failed")
    finally:
        built.close()
    return 0


def _fail(channel: EngineChannel, error: Exception, what: str) -> int:
    if isinstance(error, ChannelClosedError):
        raise error
    if isinstance(error, AiosError):  # says by itself what to do: a traceback would only bury it
        channel.send(Fatal(message=str(error)))
        return 1
    logger.error("%s", what, exc_info=error)
    channel.send(Fatal(message=f"{what}: {type(error).__name__}; its log has the traceback"))
    return 1


if __name__ == "__main__":
    sys.exit(main())
