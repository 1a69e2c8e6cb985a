"""RayServeConfig: the options of the Ray Serve application, from the words of a command line or of a YAML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_type_hints

from aios_model.errors import ConfigError
from aios_serve.config import EngineConfig, parse_count
from aios_serve.server_config import ServerConfig

_LISTENING = ("host", "port", "uds", "ssl_certfile", "ssl_keyfile")
_PARSERS = ("tool_call_parser", "enable_auto_tool_choice", "reasoning_parser")
_SERVER_OPTIONS = ("api_key", "allowed_origins", "shutdown_timeout", *_PARSERS)
_COUNTS = ("max_model_len", "kv_cache_memory_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class RayServeConfig:
    """Options of the application.

    Attributes:
        engine: Options of each replica's engine.
        server: Keys, origins and limits of the endpoint; where it listens is decided by Ray Serve.
        min_replicas: Replicas that are always there.
        max_replicas: Most replicas there may be.
        target_ongoing_requests: Open requests per replica that the autoscaler aims at; None is half of
            `engine.max_num_seqs`, so that a replica is added before the others are full.
        upscale_delay: Seconds of too much load before replicas are added.
        downscale_delay: Seconds of too little load before replicas are removed.
        num_cpus: Cores that Ray sets aside for each replica; also its `threads`, unless those are given.
        num_gpus: GPUs that Ray sets aside for each replica.
        num_ingress_replicas: Processes that forward requests; one forwards some thousand chunks a second.
        replica_patience: Seconds a request waits while no replica is running before it is answered with 503.
    """

    engine: EngineConfig = field(default_factory=EngineConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float | None = None
    upscale_delay: float = 30.0
    downscale_delay: float = 600.0
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    num_ingress_replicas: int = 1
    replica_patience: float = 120.0

    def __post_init__(self) -> None:
        for name in ("min_replicas", "max_replicas", "num_ingress_replicas"):
            _check(name, getattr(self, name), low=1, whole=True)
        for name in ("upscale_delay", "downscale_delay", "num_cpus", "num_gpus", "replica_patience"):
            _check(name, getattr(self, name), low=0)
        if self.max_replicas < self.min_replicas:
            raise ConfigError(f"max_replicas={self.max_replicas} is below min_replicas={self.min_replicas}; raise it")
        if self.target_ongoing_requests is None:
            self._set("target_ongoing_requests", max(1.0, self.engine.max_num_seqs / 2))
        elif not 0 < self.target_ongoing_requests <= self.engine.max_num_seqs:
            raise ConfigError(
                f"target_ongoing_requests={self.target_ongoing_requests!r} cannot be used: it must be above 0 and at "
                f"most max_num_seqs={self.engine.max_num_seqs}, which a replica runs at once"
            )
        if self.engine.threads is None and self.num_cpus >= 1:
            self._set("engine", replace(self.engine, threads=int(self.num_cpus)))

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> RayServeConfig:
        """Build from the arguments of `serve run … NAME=VALUE` (strings) or of a YAML file.

        Names are the fields of EngineConfig and of this class, and `api_key`, `allowed_origins`,
        `shutdown_timeout` and the parsers of tools and thoughts of the server.

        Raises:
            ConfigError: an unknown name, with the closest known one, or a value that cannot be honoured.
        """
        own = {item.name for item in fields(cls)} - {"engine", "server"}
        engine = {item.name for item in fields(EngineConfig)}
        _refuse_unknown(args, sorted({*own, *engine, *_SERVER_OPTIONS}))
        given = {name: _read(name, value) for name, value in args.items()}
        return cls(
            engine=EngineConfig(**{name: value for name, value in given.items() if name in engine}),
            server=_server_config({name: value for name, value in given.items() if name in _SERVER_OPTIONS}),
            **{name: value for name, value in given.items() if name in own},
        )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _refuse_unknown(args: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in args:
        if name in _LISTENING:
            raise ConfigError(
                f"{name} is not an option here: Ray Serve listens; use --http-host and --http-port of `serve start`, "
                "or http_options in its YAML file"
            )
        if name == "tenants":
            raise ConfigError(
                "tenants is not an option here: limits are counted by one server, and here several answer; run "
                "aios-serve --tenants, or give each group of users a key with api_key"
            )
        if name == "max_engine_restarts":
            raise ConfigError("max_engine_restarts is not an option here: Ray replaces a replica whose engine is lost")
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known options: {', '.join(known)}"
            raise ConfigError(f"unknown option {name!r}; {hint}")


def _read(name: str, value: Any) -> Any:
    """`value` as the option's type if it is text, which is all that a command line has."""
    if name == "model" and isinstance(value, str) and Path(value).exists():
        return str(Path(value).resolve())  # replicas have working directories of their own
    if not isinstance(value, str):
        return value
    if name in _COUNTS:
        return None if value == "auto" else parse_count(value, option=name)
    for kind in _kinds(name):
        if kind is bool:
            return _read_bool(name, value)
        if kind in (int, float):
            return _read_number(name, value, kind)
    return value


def _kinds(name: str) -> tuple[object, ...]:
    for owner in (RayServeConfig, EngineConfig, ServerConfig):
        hint = get_type_hints(owner).get(name)
        if hint is not None:
            return get_args(hint) or (hint,)
    return ()


def _read_bool(name: str, text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise ConfigError(f"{name}={text!r} cannot be used: write true or false")
    return values[text.lower()]


def _read_number(name: str, text: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{name}={text!r} cannot be used: it must be {wanted}") from None


def _server_config(options: Mapping[str, Any]) -> ServerConfig:
    known: dict[str, Any] = {name: options[name] for name in _PARSERS if name in options}
    if "shutdown_timeout" in options:
        _check("shutdown_timeout", options["shutdown_timeout"], low=0)
        known["shutdown_timeout"] = options["shutdown_timeout"]
    for option, name in (("api_key", "api_keys"), ("allowed_origins", "allowed_origins")):
        values = options.get(option) or ()
        values = (values,) if isinstance(values, str) else tuple(values)
        if not all(isinstance(value, str) for value in values):
            raise ConfigError(f"{option} cannot be used: give a string or a list of strings")
        known[name] = values
    return ServerConfig(**known)


def _check(name: str, value: object, *, low: int, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not low <= value < 10**9:  # type: ignore[operator]
        wanted = "a whole number" if whole else "a number"
        raise ConfigError(f"{name}={value!r} cannot be used: it must be {wanted} of at least {low}")
