"""What an output must look like: a JSON schema, a regular expression, one of some texts, or a grammar. Plain data.

Checked here is what needs no compiler: types, sizes, depth, and that one kind is asked for. What a constraint means,
token by token, is up to the layer that installs a logits processor for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from aios_model.errors import InvalidRequestError

if TYPE_CHECKING:
    from typing import Self

ConstraintKind: TypeAlias = Literal["json", "json_object", "regex", "choice", "grammar"]

MAX_CONSTRAINT_BYTES = 2**18
"""Longest schema, expression or grammar, and all choices together, in UTF-8. OpenAI's limits lie far below."""
MAX_SCHEMA_DEPTH = 100
"""Deepest nesting of objects and arrays in a schema; parsers written as recursive functions have their limit there."""
MAX_CHOICES_LISTED = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """What one request's output must be: exactly one of the first five. Immutable, hashable, picklable.

    Attributes:
        json: A JSON schema: a mapping, or its text, which is what is kept.
        regex: A regular expression that the whole output matches.
        choice: Texts of which the output is one; a list is accepted.
        grammar: A context-free grammar, in Lark's notation or GBNF (EBNF with `::=`).
        json_object: True for any JSON object.
        disable_any_whitespace: No space after the commas and colons of JSON, where otherwise one is allowed.

    Raises:
        InvalidRequestError: None or several are given, or one is malformed or too large; `param` names it, as
            "structured_outputs.regex".
    """

    json: str | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise _error(name, "must be true or false")
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise InvalidRequestError(
                f"structured_outputs takes exactly one of {', '.join(_KINDS)}, and here is {found}",
                param="structured_outputs",
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for name in ("regex", "grammar"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))

    @classmethod
    def of(cls, value: Self | Mapping[str, Any]) -> StructuredOutputsParams:
        """Params as they are, or made of a mapping of fields, of which some may be None.

        Raises:
            InvalidRequestError: Something else, or a field that is unknown or malformed.
        """
        if isinstance(value, StructuredOutputsParams):
            return value
        if not isinstance(value, Mapping):
            raise InvalidRequestError(
                f"structured_outputs must be StructuredOutputsParams or a mapping, not {type(value).__name__}",
                param="structured_outputs",
            )
        known = {field.name for field in fields(cls)}
        for name in value:
            if name not in known:
                raise InvalidRequestError(
                    f"structured_outputs has no field {str(name)[:40]!r}", param="structured_outputs"
                )
        return cls(**{name: given for name, given in value.items() if given is not None})

    @property
    def kind(self) -> ConstraintKind:
        """Which of the five it is."""
        return next(name for name in _KINDS if getattr(self, name) not in (None, False))

    @property
    def param(self) -> str:
        """The field to blame for what is wrong with it."""
        return f"structured_outputs.{self.kind}"


_KINDS: tuple[ConstraintKind, ...] = ("json", "json_object", "regex", "choice", "grammar")


def _schema_text(schema: object) -> str:
    """The schema as compact JSON, its members in the order in which they came: that is the order of the output."""
    if isinstance(schema, str):
        _check_size("json", schema)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise _error("json", f"is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(schema, Mapping):
        raise _error("json", f"must be a JSON schema, which is an object, not {type(schema).__name__}")
    if _is_deeper(schema, MAX_SCHEMA_DEPTH):
        raise _error("json", f"nests deeper than the {MAX_SCHEMA_DEPTH} levels that are accepted; flatten it")
    try:
        text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise _error("json", f"cannot be written as JSON: {str(error)[:200]}") from None
    _check_text("json", text)
    return text


def _is_deeper(value: object, limit: int) -> bool:
    """Level by level, without recursion: what is asked here is whether recursion would end well."""
    level = [value]
    for _ in range(limit):
        level = [child for each in level for child in _children(each)]
        if not level:
            return False
    return True


def _children(value: object) -> list[Any]:
    members = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [member for member in members if isinstance(member, (Mapping, list, tuple))]


def _choices(choices: object) -> tuple[str, ...]:
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise _error("choice", f"must be a list of strings, not {type(choices).__name__}")
    if not 1 <= len(choices) <= MAX_CHOICES_LISTED:
        raise _error("choice", f"must hold 1 to {MAX_CHOICES_LISTED} strings, not {len(choices)}")
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise _error("choice", "must hold strings only, none of them empty")
    _check_size("choice", "".join(choices))
    return tuple(dict.fromkeys(choices))


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise _error(name, f"must be a string, not {type(text).__name__}")
    if not text.strip():
        raise _error(name, "is empty; leave it out to constrain nothing")
    _check_size(name, text)


def _check_size(name: str, text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise _error(name, f"has no UTF-8 form: {error.reason}") from None
    if size > MAX_CONSTRAINT_BYTES:
        raise _error(name, f"has {size} bytes; at most {MAX_CONSTRAINT_BYTES} are accepted")


def _error(name: str, what: str) -> InvalidRequestError:
    return InvalidRequestError(f"structured_outputs.{name} {what}", param=f"structured_outputs.{name}")
