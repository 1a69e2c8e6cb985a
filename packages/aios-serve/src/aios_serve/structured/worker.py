"""Compiles constraints for a `checker.py`, in a process that may be killed: `python -m aios_serve.structured.worker`.

A compiler fed by strangers may take all the time and memory there is, or crash. Here that ends one check. First comes
the vocabulary, then one constraint after the other; each is answered by a verdict. Not started by hand.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from aios_model.errors import InvalidRequestError
from aios_model.sampling.structured import StructuredOutputsParams
from aios_serve.structured.grammar import new_matcher, probe
from aios_serve.structured.vocabulary import Vocabulary
from aios_serve.structured.wire import Verdict, receive_frame, send_frame

if TYPE_CHECKING:
    import llguidance

STACK_BYTES = 4 * 2**20
MAX_MEMORY_BYTES = 4 * 2**30
"""Address space of a worker: the vocabulary takes a twentieth of it, the worst grammars known a tenth."""


def main() -> int:
    """Serve the socket named on the command line until its other end is closed; returns the exit status."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # it leaves when the server does
    parser = argparse.ArgumentParser(prog="python -m aios_serve.structured.worker", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="an inherited, connected stream socket")
    descriptor = parser.parse_args().fd
    limit_resources()
    # The compiler is recursive. What it manages with this stack, the engine manages with its threads', twice as large.
    threading.stack_size(STACK_BYTES)
    with socket.socket(fileno=descriptor) as connection:
        thread = threading.Thread(target=_serve, args=(connection,))
        thread.start()
        thread.join()
    return 0


def limit_resources() -> None:
    """Bounds the memory of this process and steps behind the engine, where the system knows how."""
    with suppress(OSError):
        os.nice(5)
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


def _serve(connection: socket.socket) -> None:
    with suppress(ConnectionError):
        serve(connection)


def serve(connection: socket.socket) -> None:
    """Answers constraints until the other end leaves, which raises ConnectionError."""
    tokenizer = msgspec.msgpack.decode(receive_frame(connection), type=Vocabulary).build()
    send_frame(connection, Verdict())
    while True:
        constraint = msgspec.msgpack.decode(receive_frame(connection), type=StructuredOutputsParams)
        send_frame(connection, judge(constraint, tokenizer))


def judge(constraint: StructuredOutputsParams, tokenizer: llguidance.LLTokenizer) -> Verdict:
    """Compiles a constraint and takes a few steps through it."""
    try:
        probe(new_matcher(constraint, tokenizer), constraint)
    except InvalidRequestError as error:
        return Verdict(str(error))
    return Verdict()


if __name__ == "__main__":
    sys.exit(main())
