"""The socket the server listens on, bound before anything is loaded, with errors that say what to do."""

from __future__ import annotations

import errno
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aios_model.errors import AiosError

if TYPE_CHECKING:
    from aios_serve.server_config import ServerConfig


class BindError(AiosError):
    """The address cannot be listened on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where the server can be reached.

    Attributes:
        url: Without a trailing slash, as "http://127.0.0.1:8000".
        curl_options: What curl needs beside the URL.
    """

    url: str
    curl_options: tuple[str, ...] = ()


def bind(config: ServerConfig) -> tuple[socket.socket, Address]:
    """Bind the configured address.

    Raises:
        BindError: with the reason and the remedy.
    """
    return _bind_unix(config) if config.uds else _bind_tcp(config)


def _bind_tcp(config: ServerConfig) -> tuple[socket.socket, Address]:
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise BindError(f"the host {config.host!r} is unknown ({error.strerror}); try --host 127.0.0.1") from None
    listener = socket.socket(family, kind, protocol)
    if os.name == "posix":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(target)
        # Listening at once makes a second server fail here, not after it has loaded its model.
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise BindError(_why(error, config)) from None
    return listener, Address(url=_url(config, listener.getsockname()[1]))


def _why(error: OSError, config: ServerConfig) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"port {config.port} on {config.host} is in use by another program; stop it, or choose another port "
                f"with --port {config.port + 1 if config.port < 65535 else 0} (0 takes a free one)"
            )
        case errno.EACCES:
            return f"port {config.port} needs privileges; choose one above 1023 with --port"
        case errno.EADDRNOTAVAIL:
            return f"{config.host} is not an address of this machine; try --host 127.0.0.1, or 0.0.0.0 for all"
        case _:
            return f"cannot listen on {config.host} port {config.port}: {error.strerror}"


def _url(config: ServerConfig, port: int) -> str:
    scheme = "https" if config.uses_https else "http"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    return f"{scheme}://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{port}"


def _bind_unix(config: ServerConfig) -> tuple[socket.socket, Address]:
    path = config.uds
    assert path is not None
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise BindError(f"cannot listen on the socket {path}: {reason}; choose another path with --uds") from None
    scheme = "https" if config.uses_https else "http"
    return listener, Address(url=f"{scheme}://localhost", curl_options=("--unix-socket", str(path)))


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on any more; anything else at `path` is not ours to touch."""
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise BindError(f"{path} exists and is no socket; choose another path with --uds")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()
            return
    raise BindError(f"another program listens on {path}; stop it, or choose another path with --uds")
