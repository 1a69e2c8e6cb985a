"""Whether native kernels can be used, decided once and said once. No torch here."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

from aios_model.errors import ConfigError, NativeBuildError
from aios_model.native.base_library import model_library
from aios_model.native.library import NativeLibrary

VARIABLE = "AIOS_NATIVE"

_logger = logging.getLogger(__name__)
_said: set[str] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeStatus:
    """Whether native kernels can be used.

    Attributes:
        available: They can.
        reason: Why not; or what there is.
        isa: The instruction set they are compiled for; None if they cannot be used.
    """

    available: bool
    reason: str
    isa: str | None


def native_status(open_library: Callable[[], NativeLibrary] = model_library) -> NativeStatus:
    """Whether the kernels of a library can be used; compiles them if that has not been done.

    Where they cannot, everything runs on torch, slower. Each reason is logged as a warning once per process; that
    `AIOS_NATIVE=0` asked for it is none.

    Args:
        open_library: Opens the library in question. The default is this layer's, which all others need too.

    Raises:
        ConfigError: `AIOS_NATIVE` or `AIOS_ISA` has a value that cannot be honoured.
    """
    if not _wanted():
        return NativeStatus(available=False, reason=f"{VARIABLE}=0 turns native kernels off", isa=None)
    try:
        isa = open_library().isa.name
    except NativeBuildError as error:
        _say_once(str(error))
        return NativeStatus(available=False, reason=str(error), isa=None)
    return NativeStatus(available=True, reason=f"native kernels for {isa}", isa=isa)


def _wanted() -> bool:
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ConfigError(f"{VARIABLE} is {value!r}; set it to 0 to turn native kernels off, or to 1, or not at all")
    return value != "0"


def _say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        _logger.warning("native kernels cannot be used, so torch computes, which is slower: %s", reason)
