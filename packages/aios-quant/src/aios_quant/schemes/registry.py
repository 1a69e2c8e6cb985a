"""Schemes by name, for options and configuration files. Imports torch only when a scheme is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aios_model.errors import ConfigError

if TYPE_CHECKING:
    from aios_quant.schemes.base import QuantScheme

_INT4_NAMES = tuple(
    f"int4{group}{kind}{activation}"
    for group in ("", "-g32", "-g64", "-g128")
    for kind in ("", "-asym")
    for activation in ("", "-a16")
)

SCHEME_NAMES = ("int8", "int8-a16", *_INT4_NAMES, "fp8", "as-stored", "as-stored-a16", "gguf", "gguf-a16", "none")
"""Every name that `find_scheme` knows. `gguf` is another name of `as-stored`."""


def find_scheme(name: str) -> QuantScheme:
    """The scheme called `name`.

    `int8`, `int4` (groups of 64 columns where they fit, else 32), `int4-g32`, `-g64`, `-g128`, each also with `-asym`
    for minimums, and `fp8`; `as-stored` keeps the codes a checkpoint holds; `none` keeps plain floats. With `-a16` at
    the end the inputs of integer weights stay floats instead of being rounded to 8 bits.

    Raises:
        ConfigError: There is no such scheme; the message lists them.
    """
    from aios_quant.schemes.fp8 import Fp8Scheme
    from aios_quant.schemes.int4 import Int4Scheme
    from aios_quant.schemes.int8 import Int8Scheme
    from aios_quant.schemes.stored import FloatScheme, StoredScheme

    if name not in SCHEME_NAMES:
        raise ConfigError(
            f"quantisation scheme {name!r} is unknown; use int8, int4, int4-g32, int4-g64 or int4-g128 (each int4 also "
            "with -asym), fp8, as-stored (gguf) or none; all but fp8 and none also with -a16 at the end"
        )
    base, *options = name.split("-a16")[0].split("-")
    activation = "a16" if name.endswith("-a16") else "a8"
    if base == "int8":
        return Int8Scheme(activation=activation)
    if base == "int4":
        groups = [int(option[1:]) for option in options if option.startswith("g")]
        return Int4Scheme(
            group_size=groups[0] if groups else None, symmetric="asym" not in options, activation=activation
        )
    if base == "fp8":
        return Fp8Scheme()
    return FloatScheme() if base == "none" else StoredScheme(activation=activation)
