"""Checks of single request fields.

Each returns the value as it is to be kept, or raises `InvalidRequestError` with field, value and what is allowed.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from aios_model.errors import InvalidRequestError

MAX_COUNT = 2**31 - 1
"""Largest number of tokens, and largest token id, that any field may name."""
MAX_TEXT_LENGTH = 1024
"""Characters of one string in a list, tokens of one sequence."""


def out_of_range(name: str, value: object, allowed: str) -> InvalidRequestError:
    """The error to raise for a value that is not what is allowed."""
    return InvalidRequestError(f"{name} must be {allowed}, not {_short(value)}", param=name)


def integer(name: str, value: object, *, low: int, high: int = MAX_COUNT) -> int:
    """An int, which a bool is not, within both bounds."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(f"{name} must be an integer, not {_short(value)}", param=name)
    if not low <= value <= high:
        raise out_of_range(name, value, f"between {low} and {high}")
    return value


def real(name: str, value: object, *, low: float, high: float, above_low: bool = False) -> float:
    """A finite int or float within both bounds, or above the lower one, as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequestError(f"{name} must be a number, not {_short(value)}", param=name)
    # Written so that NaN fails too.
    if not low <= value <= high or (above_low and value == low):
        allowed = f"above {low:g} and at most {high:g}" if above_low else f"between {low:g} and {high:g}"
        raise out_of_range(name, value, allowed)
    return float(value)


def boolean(name: str, value: object) -> None:
    """True or False, and not 1 or 0."""
    if not isinstance(value, bool):
        raise InvalidRequestError(f"{name} must be true or false, not {_short(value)}", param=name)


def texts(name: str, value: object, *, most: int) -> tuple[str, ...]:
    """One string or a list of them, in order, without repetitions."""
    if value is None:
        return ()
    strings = _list(name, (value,) if isinstance(value, str) else value, most=most)
    for text in strings:
        if not isinstance(text, str):
            raise InvalidRequestError(f"{name} must hold strings only, not {_short(text)}", param=name)
        if not 1 <= len(text) <= MAX_TEXT_LENGTH:
            raise InvalidRequestError(
                f"{name} holds a string of {len(text)} characters; 1 to {MAX_TEXT_LENGTH} are allowed", param=name
            )
    return tuple(dict.fromkeys(strings))


def token_ids(name: str, value: object, *, most: int) -> tuple[int, ...]:
    """Token ids, in order, without repetitions."""
    if value is None:
        return ()
    return tuple(dict.fromkeys(integer(name, token, low=0) for token in _list(name, value, most=most)))


def sequences(name: str, value: object, *, most: int) -> tuple[tuple[int, ...], ...]:
    """Token sequences, none empty, in order, without repetitions."""
    if value is None:
        return ()
    kept = []
    for sequence in _list(name, value, most=most):
        tokens = tuple(integer(name, token, low=0) for token in _list(name, sequence, most=MAX_TEXT_LENGTH))
        if not tokens:
            raise InvalidRequestError(f"{name} holds an empty sequence; leave it out", param=name)
        kept.append(tokens)
    return tuple(dict.fromkeys(kept))


def bias(name: str, value: object, *, most: int) -> dict[int, float] | None:
    """Token id to bias; JSON has no integer keys, so decimal strings are taken as ids."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"{name} must map token ids to numbers, not {_short(value)}", param=name)
    if len(value) > most:
        raise InvalidRequestError(f"{name} has {len(value)} entries; at most {most} are allowed", param=name)
    biases = {_bias_key(name, key): real(name, amount, low=-100.0, high=100.0) for key, amount in value.items()}
    return biases or None


def _bias_key(name: str, key: object) -> int:
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10:
        key = int(key)
    return integer(name, key, low=0)


def _list(name: str, value: object, *, most: int) -> Sequence[Any]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise InvalidRequestError(f"{name} must be a list, not {_short(value)}", param=name)
    if len(value) > most:
        raise InvalidRequestError(f"{name} has {len(value)} entries; at most {most} are allowed", param=name)
    return value


def _short(value: object) -> str:
    """The value as a message shows it: a request's ten megabytes do not come back in its error."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "a number of thousands of digits"
