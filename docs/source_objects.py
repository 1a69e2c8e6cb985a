"""MkDocs hook: shows a class, function or method of the sources by its name.

In a page, a line

    --8<-- "packages/aios-sched/src/aios_sched/batch.py::pack"

becomes the source of `pack` as it is now, its docstring cut to the summary. A name or file that no longer exists fails
the build, and unlike with line numbers, nothing else can shift.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from textwrap import dedent
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parent.parent
REFERENCE = re.compile(r'^(?P<indent>[ \t]*)--8<-- "(?P<path>[^":]+)::(?P<name>[\w.]+)"$', re.MULTILINE)

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """MkDocs calls this with the text of each page."""

    def source(match: re.Match[str]) -> str:
        try:
            code = source_of(ROOT / match["path"], match["name"])
        except (OSError, LookupError) as error:
            raise PluginError(f"{page.file.src_path}: {match[0].strip()}: {error}") from error
        return "\n".join(match["indent"] + line if line else "" for line in code.splitlines())

    return REFERENCE.sub(source, markdown)


def source_of(path: Path, name: str) -> str:
    """Source of the definition with the dotted `name` in a file, without what surrounds it.

    Raises:
        OSError: there is no such file.
        LookupError: it defines no such name.
    """
    text = path.read_text(encoding="utf-8")
    node: ast.AST = ast.parse(text)
    for part in name.split("."):
        node = _member(node, part)
    assert isinstance(node, Definition)
    lines = text.splitlines()
    blank: range = range(0)
    if ast.get_docstring(node) is not None:
        docstring = node.body[0]
        blank = range(docstring.lineno, docstring.end_lineno or docstring.lineno)
        if blank:
            lines[docstring.lineno - 1] += '"""'
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    kept = [lines[number] for number in range(first - 1, node.end_lineno or 0) if number not in blank]
    return dedent("\n".join(kept))


def _member(node: ast.AST, name: str) -> Definition:
    for child in getattr(node, "body", []):
        if isinstance(child, Definition) and child.name == name:
            return child
    raise LookupError(f"no {name!r} there")
