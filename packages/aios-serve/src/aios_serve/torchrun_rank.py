"""What the processes that torchrun starts do, but for the first: each keeps one rank running.

The rank itself is a child, which ends with its group. The next group, which the endpoint on the first host makes as
soon as the old one is lost, finds a new one waiting. So torchrun need not restart anything, nor the endpoint go down.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

logger = logging.getLogger(__name__)

_SHORT_LIFE_SECONDS = 5.0
_MOST_SHORT_LIVES = 10


def keep_rank(rank: int, *, log_level: str) -> int:
    """Runs the rank again and again, until told to stop; returns the exit status.

    A rank that ends within seconds, many times in a row, has a reason that will not go away: then this ends too, and
    torchrun decides.
    """
    command = [sys.executable, "-m", "aios_serve.rank_process", "--rank", str(rank), "--torchrun"]
    child: subprocess.Popen[bytes] | None = None

    def stop(_signal: int, _frame: FrameType | None) -> None:
        if child is not None:
            child.kill()
        sys.exit(0)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
    short_lives = 0
    while short_lives < _MOST_SHORT_LIVES:
        started = time.monotonic()
        child = subprocess.Popen([*command, "--log-level", log_level], stdin=subprocess.DEVNULL)
        status = child.wait()
        logger.info("rank %d left its group (status %d) and waits for the next one", rank, status)
        short_lives = short_lives + 1 if time.monotonic() - started < _SHORT_LIFE_SECONDS else 0
        time.sleep(min(short_lives, 5) * 0.2)
    return 1
