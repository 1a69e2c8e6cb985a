"""Writes the tables of options in docs/en/reference/cli.md from the commands themselves: `python docs/cli_tables.py`.

A test compares the page with what this would write.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from typer.models import OptionInfo

PAGE = Path(__file__).parent / "en" / "reference" / "cli.md"
MARK = re.compile(r"(?P<begin><!-- options: (?P<function>[\w.]+) -->\n).*?(?P<end><!-- end of options -->)", re.DOTALL)
VALUES = {int: "N", float: "X", Path: "PATH", str: "TEXT"}


def main() -> None:
    """Rewrite the tables of the page."""
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def updated(text: str) -> str:
    """`text` with the tables between its marks as they should be."""
    return MARK.sub(lambda match: f"{match['begin']}\n{tables(_load(match['function']))}\n{match['end']}", text)


def tables(command: Callable[..., Any]) -> str:
    """Tables of the options of a typer command, one per panel of its help."""
    hints = get_type_hints(command, include_extras=True)
    panels: dict[str, list[str]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        kind, *settings = get_args(hints[name])
        option = next((each for each in settings if isinstance(each, OptionInfo)), None)
        if option is not None:
            panels.setdefault(option.rich_help_panel or "", []).append(_row(name, kind, option, parameter.default))
    head = "| option | default | |\n|---|---|---|\n"
    return "\n".join(
        (f"**{panel}**\n\n" if panel else "") + head + "\n".join(rows) + "\n" for panel, rows in panels.items()
    )


def _load(function: str) -> Callable[..., Any]:
    module, _, name = function.rpartition(".")
    return getattr(import_module(module), name)


def _row(name: str, kind: Any, option: OptionInfo, default: object) -> str:
    spelled = ", ".join(f"`{each}`" for declared in _names(name, kind, option) for each in declared.split("/"))
    help_text = (option.help or "").split("[default:")[0].strip()
    if option.envvar:
        help_text += f" Also read from `{option.envvar}`."
    cells = (" ".join([spelled, *_values(kind, option)]), _default(kind, option, default), help_text)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _names(name: str, kind: Any, option: OptionInfo) -> list[str]:
    """Inside Annotated, typer takes the first name for the option's default."""
    declared = [each for each in (option.default, *(option.param_decls or ())) if isinstance(each, str)]
    flag = name.replace("_", "-")
    return declared or ([f"--{flag}/--no-{flag}"] if kind is bool else [f"--{flag}"])


def _values(kind: Any, option: OptionInfo) -> list[str]:
    """What may stand behind the option: its choices, or a word for its type."""
    if kind is bool:
        return []
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [f"`{choice.value}`" for choice in kind]
    if get_origin(kind) is Literal:
        return [f"`{choice}`" for choice in get_args(kind)]
    if option.metavar:
        return [f"*{option.metavar}*"]
    plain = [
        each for each in (kind, *get_args(kind), *(a for k in get_args(kind) for a in get_args(k))) if each in VALUES
    ]
    return [f"*{VALUES[plain[0]]}*"]


def _default(kind: Any, option: OptionInfo, default: object) -> str:
    if isinstance(option.show_default, str):
        return option.show_default
    if default is inspect.Parameter.empty:
        return "required"
    if kind is bool:
        has_opposite = any("/" in declared for declared in _names("", kind, option))
        return ("on" if default else "off") if has_opposite else ""
    if default is None:
        return ""
    return f"`{default.value if isinstance(default, Enum) else default}`"


if __name__ == "__main__":
    main()
