"""The server as a Ray Serve application: replicas that a cluster starts, watches, replaces and scales.

    client ── HTTP ─► Ray's proxy ─► Ingress ── forwards, retries ─► EngineReplica (1..max_replicas)
                                     │ keys, body limit              │ the application of `aios_serve.app`
                                     └ health, metrics of all        └ AsyncEngine and its engine process

    serve run aios_serve.ray_app:build_app model=Qwen/Qwen3-0.6B max_replicas=2 num_gpus=1

What a client reads is what the plain server would have sent, byte for byte: each replica runs the same application, and
the ingress passes bodies through. It needs Ray (`pip install aios-serve[ray]`), but importing it does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aios_serve.ray_app.application import build_app as build_app
    from aios_serve.ray_app.application import create_application as create_application
    from aios_serve.ray_app.options import RayServeConfig as RayServeConfig

_MODULES = {
    "RayServeConfig": "aios_serve.ray_app.options",
    "build_app": "aios_serve.ray_app.application",
    "create_application": "aios_serve.ray_app.application",
}

__all__ = [*_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
