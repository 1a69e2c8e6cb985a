"""Every error AIOS raises on purpose, in one tree.

    AiosError
     ├─ ConfigError          an option has a value that cannot be honoured        (also a ValueError)
     ├─ ModelError
     │   ├─ ModelNotFoundError     no such path, hub id or bundled file
     │   ├─ UnsupportedModelError  an architecture, rope type or encoding we refuse to guess at
     │   └─ CheckpointError        a missing tensor, a wrong shape, a corrupted file
     ├─ NativeBuildError     native kernels cannot be compiled or loaded here
     ├─ ChatTemplateError    the model's template refused the messages             (also a ValueError)
     └─ InvalidRequestError  a prompt or sampling parameter is out of range        (also a ValueError)

Upper layers hang their own branches on `AiosError`. A message says what was wrong, which value, and what to do.
"""

from __future__ import annotations


class AiosError(Exception):
    """Root of everything AIOS raises on purpose."""


class ConfigError(AiosError, ValueError):
    """An option has a value that cannot be honoured."""


class ModelError(AiosError):
    """A model cannot be found, read or run."""


class ModelNotFoundError(ModelError):
    """No such path, hub id or bundled file."""


class UnsupportedModelError(ModelError):
    """An architecture, rope type, encoding or file kind that is refused rather than guessed at."""


class CheckpointError(ModelError):
    """A tensor is missing or has the wrong shape, or a file is corrupted."""


class NativeBuildError(AiosError):
    """Native kernels cannot be compiled or loaded here; holds the compiler's words."""


class ChatTemplateError(AiosError, ValueError):
    """The chat template is missing, invalid, or refused the messages."""


class InvalidRequestError(AiosError, ValueError):
    """A prompt or a sampling parameter is out of range.

    Attributes:
        param: Name of the offending request field, for the `param` member of an API error; None if none is to blame.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param
