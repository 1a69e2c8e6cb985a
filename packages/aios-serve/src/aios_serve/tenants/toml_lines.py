"""On which line of a TOML text something stands: the parser tells it for mistakes of grammar only."""

from __future__ import annotations

import re
import tomllib
from typing import TypeAlias

TomlPath: TypeAlias = tuple[str | int, ...]
"""Names of tables and fields from the top, with the position, from 0, of each table that is one of an array."""

_HEADER = re.compile(r"^\s*(\[\[?)([^\[\]#]+|(?:\"[^\"]*\"|'[^']*'|[^\[\]#\"'])+)\]\]?\s*(?:#.*)?$")
_FIELD = re.compile(r"^\s*([A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')\s*=")


def line_of(text: str, path: TomlPath) -> int | None:
    """The line, from 1, of the field or table at `path`, else of the table around it; None if neither was found.

    Good for tables with headers and fields on lines of their own. Fields of inline tables are found by the line on
    which the outermost one begins.
    """
    lines = _lines(text)
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return None


def _lines(text: str) -> dict[TomlPath, int]:
    """Every header and field with its line."""
    found: dict[TomlPath, int] = {}
    counts: dict[TomlPath, int] = {}
    table: TomlPath = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = _table(header[2], is_one_of_several=header[1] == "[[", counts=counts)
            for length in range(1, len(table) + 1):  # a header makes the tables around it, too
                found.setdefault(table[:length], number)
        elif field := _FIELD.match(line):
            found.setdefault((*table, field[1].strip("\"'")), number)
    return found


def _table(header: str, *, is_one_of_several: bool, counts: dict[TomlPath, int]) -> TomlPath:
    """The path of a header. A table below an array belongs to the last element so far."""
    path: TomlPath = ()
    names = _names(header)
    for depth, name in enumerate(names):
        path = (*path, name)
        if is_one_of_several and depth == len(names) - 1:
            counts[path] = counts.get(path, -1) + 1
        if path in counts:
            path = (*path, counts[path])
    return path


def _names(header: str) -> list[str]:
    """The names in a header, quoted or not: read by the parser itself."""
    try:
        table = tomllib.loads(f"[{header}]")
    except tomllib.TOMLDecodeError:
        return [header]
    names: list[str] = []
    while table:
        [(name, table)] = table.items()
        names.append(name)
    return names
