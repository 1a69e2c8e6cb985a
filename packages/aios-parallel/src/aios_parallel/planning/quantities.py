"""Numbers with units, as people write and read them."""

from __future__ import annotations

import re

from aios_model.errors import ConfigError

_NUMBER = re.compile(r"^\s*(?P<number>\d+(\.\d*)?([eE][+-]?\d+)?)\s*(?P<unit>[a-zA-Zµμ/]*)\s*$")
_PREFIXES = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9}


def parse_bytes(text: str, option: str) -> float:
    """`80GB` is 80e9, `80GiB` and `80G` are 80 · 2³⁰; ConfigError naming the option otherwise."""
    number, unit = _split(text, option, "80GB or 80GiB")
    match = re.fullmatch(r"([kmgtp]?)(i?)(b?)", unit.lower())
    if match is None or (match[2] and not match[1]):
        raise _wrong(text, option, "80GB or 80GiB")
    decimal = match[3] and not match[2]
    return _positive(number * (1000 if decimal else 1024) ** _PREFIXES[match[1]], text, option)


def parse_bandwidth(text: str, option: str) -> float:
    """Bytes per second: `3.35TB/s`, `450GB/s`, and for networks `100Gbit/s`."""
    example = "3.35TB/s or 100Gbit/s"
    number, unit = _split(text, option, example)
    match = re.fullmatch(r"([kmgtp]?)(b|bit)(/s|ps)?", unit.lower())
    if match is None:
        raise _wrong(text, option, example)
    return _positive(number * 1000 ** _PREFIXES[match[1]] / (8 if match[2] == "bit" else 1), text, option)


def parse_flops(text: str, option: str) -> float:
    """Operations per second: `989T`, `989TFLOPS`, `989e12`."""
    number, unit = _split(text, option, "989TFLOPS")
    match = re.fullmatch(r"([kmgtp]?)(flops?|ops|flop/s|op/s)?(/s)?", unit.lower())
    if match is None:
        raise _wrong(text, option, "989TFLOPS")
    return _positive(number * 1000 ** _PREFIXES[match[1]], text, option)


def parse_seconds(text: str, option: str) -> float:
    """A short time: `5us`, `0.02ms`, `1e-5`."""
    number, unit = _split(text, option, "5us")
    if unit.lower() not in _SECONDS:
        raise _wrong(text, option, "5us")
    return number * _SECONDS[unit.lower()]


def show_bytes(num_bytes: float) -> str:
    """`80 GB`, `3.35 TB`, `1.5 MB`: powers of a thousand, as on datasheets and in `aios-model inspect`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size * 0.9995:  # so that no 1e+03 comes out
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def show_seconds(seconds: float) -> str:
    """`1.25 s`, `3.40 ms`, `12.0 µs`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds * 1e6:.1f} µs"


def show_number(value: float) -> str:
    """Three digits, or a whole number with commas: for columns whose head has the unit."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def _split(text: str, option: str, example: str) -> tuple[float, str]:
    match = _NUMBER.match(text)
    if match is None:
        raise _wrong(text, option, example)
    return float(match["number"]), match["unit"]


def _positive(value: float, text: str, option: str) -> float:
    if value <= 0:
        raise ConfigError(f"{option} is {text!r}; it must be above 0")
    return value


def _wrong(text: str, option: str, example: str) -> ConfigError:
    return ConfigError(f"{option} is {text!r}; write a number with a unit, such as {example}")
