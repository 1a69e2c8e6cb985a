"""How do many users share it?

Offline: `InferenceEngine` generates for a list of prompts in this process. Serving: `AsyncEngine` runs many requests at
once on an engine in a process of its own, and the OpenAI-compatible server stands on it. Importing this package imports
none of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aios_model.sampling.params import SamplingParams as SamplingParams
    from aios_model.sampling.structured import StructuredOutputsParams as StructuredOutputsParams
    from aios_serve.async_engine import AsyncEngine as AsyncEngine
    from aios_serve.config import EngineConfig as EngineConfig
    from aios_serve.engine import InferenceEngine as InferenceEngine
    from aios_serve.errors import EngineDeadError as EngineDeadError
    from aios_serve.errors import EngineUnavailableError as EngineUnavailableError
    from aios_serve.errors import RequestFailedError as RequestFailedError
    from aios_serve.model_info import EngineInfo as EngineInfo
    from aios_serve.outputs import CompletionDelta as CompletionDelta
    from aios_serve.outputs import CompletionOutput as CompletionOutput
    from aios_serve.outputs import RequestDelta as RequestDelta
    from aios_serve.outputs import RequestOutput as RequestOutput

_MODULES = {
    # generate
    "InferenceEngine": "aios_serve.engine",
    "SamplingParams": "aios_model.sampling.params",
    "StructuredOutputsParams": "aios_model.sampling.structured",
    "RequestOutput": "aios_serve.outputs",
    "CompletionOutput": "aios_serve.outputs",
    "RequestDelta": "aios_serve.outputs",
    "CompletionDelta": "aios_serve.outputs",
    # serve
    "AsyncEngine": "aios_serve.async_engine",
    "EngineConfig": "aios_serve.config",
    "EngineInfo": "aios_serve.model_info",
    # errors
    "EngineDeadError": "aios_serve.errors",
    "EngineUnavailableError": "aios_serve.errors",
    "RequestFailedError": "aios_serve.errors",
}

__all__ = [*_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
