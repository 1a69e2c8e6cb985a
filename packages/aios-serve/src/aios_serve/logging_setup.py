"""Where log lines go: standard error, coloured on a terminal, plain lines elsewhere. Prompts are never among them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rich.logging import RichHandler

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
QUIET_PATHS = ("/health", "/ready", "/live", "/ping", "/metrics")


def configure_logging(level: str, console: Console) -> None:
    """Send everything from `level` up to `console`. Call once, at the start of the program."""
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
        logging.basicConfig(level=level.upper(), format="%(message)s", handlers=[handler], force=True)
    else:
        handler = logging.StreamHandler(console.file)
        logging.basicConfig(level=level.upper(), format=PLAIN_FORMAT, handlers=[handler], force=True)
    logging.getLogger("uvicorn.access").addFilter(_without_probes)
    # Its chatter ("Waiting for application startup") says less than our own lines; warnings and errors stay.
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.getLogger().level))


def _without_probes(record: logging.LogRecord) -> bool:
    """Drop the access lines of what load balancers and Prometheus ask every few seconds; 503 is an answer, too."""
    match record.args:
        case (_, _, str(path), _, int(status)):
            return status not in (200, 503) or path.partition("?")[0] not in QUIET_PATHS
        case _:
            return True
