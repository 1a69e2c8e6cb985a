"""ServerConfig: the options of the HTTP server, beside those of the engine in `config.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aios_model.errors import ConfigError
from aios_serve.reasoning.registry import REASONING_PARSERS
from aios_serve.tool_calls.registry import TOOL_CALL_PARSERS

MEBIBYTE = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Options of the HTTP server.

    Attributes:
        host: Address to listen on. Loopback by default: opening a model to the network is a decision.
        port: TCP port; 0 takes a free one.
        uds: Unix domain socket to listen on instead of TCP.
        api_keys: Keys of which requests must bring one; empty asks for none.
        tenants: File of tenants with keys of their own, see `aios_serve.tenants`; API keys are the operator's then.
        allowed_origins: Origins whose web pages may call the server (CORS); empty allows none.
        ssl_certfile: Certificate chain in PEM format; together with `ssl_keyfile` it turns on HTTPS.
        ssl_keyfile: Its private key.
        shutdown_timeout: Seconds that running requests may go on after SIGTERM before they are aborted.
        max_body_bytes: Largest request body.
        tool_call_parser: How the model writes calls, one of `TOOL_CALL_PARSERS`; None goes by its chat template.
        enable_auto_tool_choice: Whether `tool_choice: "auto"`, the default of requests with tools, is honoured.
        reasoning_parser: How the model marks its thoughts, of `REASONING_PARSERS`; "none" for not at all, None goes by
            its chat template.
        keep_alive_interval: Seconds of silence after which a stream sends a comment, so that proxies keep it open.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: Path | None = None
    api_keys: tuple[str, ...] = ()
    tenants: Path | None = None
    allowed_origins: tuple[str, ...] = ()
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    shutdown_timeout: float = 30.0
    max_body_bytes: int = 10 * MEBIBYTE
    tool_call_parser: str | None = None
    enable_auto_tool_choice: bool = True
    reasoning_parser: str | None = None
    keep_alive_interval: float = 15.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} cannot be used: ports go from 1 to 65535, and 0 takes a free one")
        if not 0 <= self.shutdown_timeout < float("inf"):
            raise ConfigError(f"shutdown_timeout={self.shutdown_timeout} cannot be used: give seconds, 0 or more")
        if not all(key.strip() == key and key for key in self.api_keys):
            raise ConfigError("an API key is empty or has blanks around it; give a key such as the output of uuidgen")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("HTTPS needs both ssl_certfile and ssl_keyfile; give the other one too")
        _check_name("tool_call_parser", self.tool_call_parser, TOOL_CALL_PARSERS)
        _check_name("reasoning_parser", self.reasoning_parser, (*REASONING_PARSERS, "none"))
        for path in (self.ssl_certfile, self.ssl_keyfile):
            if path is not None and not path.is_file():
                raise ConfigError(f"there is no file {path}; give the path of a PEM file")

    @property
    def needs_key(self) -> bool:
        """Whether requests must bring a key."""
        return bool(self.api_keys) or self.tenants is not None

    @property
    def uses_https(self) -> bool:
        """Whether connections are encrypted."""
        return self.ssl_certfile is not None


def _check_name(option: str, value: str | None, known: Sequence[str]) -> None:
    if value is not None and value not in known:
        raise ConfigError(f"{option}={value!r} cannot be used: choose one of {', '.join(known)}")
