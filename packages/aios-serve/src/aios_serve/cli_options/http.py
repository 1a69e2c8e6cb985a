"""Options of `aios-serve`: where it listens, and to whom."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

_option = partial(typer.Option, rich_help_panel="HTTP")

Host = Annotated[str, _option("--host", help="Address to listen on. 0.0.0.0 opens the server to the network.")]
Port = Annotated[int, _option("--port", help="TCP port; 0 takes a free one.")]
UDS = Annotated[Path | None, _option("--uds", help="Listen on this Unix domain socket instead of a port.")]
APIKey = Annotated[
    list[str] | None,
    _option(
        "--api-key",
        metavar="KEY",
        envvar="AIOS_API_KEY",
        help="Ask every request for a key. Can be given several times. The variable hides it from `ps`.",
    ),
]
AllowedOrigins = Annotated[
    list[str] | None,
    _option(
        "--allowed-origins",
        metavar="ORIGIN",
        help='Web pages that may call the server (CORS): an origin, several times, or a JSON list; "*" for all.',
    ),
]
SSLCertfile = Annotated[Path | None, _option("--ssl-certfile", help="Certificate chain (PEM): turns on HTTPS.")]
SSLKeyfile = Annotated[Path | None, _option("--ssl-keyfile", help="Private key of the certificate (PEM).")]
ShutdownTimeout = Annotated[
    float,
    _option("--shutdown-timeout", help="Seconds that requests may go on after SIGTERM or Ctrl+C."),
]
