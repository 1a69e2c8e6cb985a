"""`aios-serve tenants`: adds, lists, revokes and rotates, in the file that a server reads with `--tenants`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from aios_model.command_line import run_command
from aios_serve.config import parse_count
from aios_serve.tenants.editing import editing
from aios_serve.tenants.file_format import read_tenants
from aios_serve.tenants.listing import as_json, as_table

if TYPE_CHECKING:
    from collections.abc import Sequence

HELP = """
Who may use the server, and on which terms.

Changes the file of tenants that [cyan]aios-serve --tenants FILE[/cyan] reads; a running server notices within a second.

[bold]Examples[/bold]

  [cyan]aios-serve tenants add alice --requests-per-minute 60 --tokens-per-minute 100000[/cyan]
  prints a key for alice, once: the file knows its digest only

  [cyan]aios-serve tenants list[/cyan]
  tenants, limits and ids of keys

  [cyan]aios-serve tenants revoke key-3f9a1c20b4[/cyan]
  one key; with a name instead, the tenant with all its keys

  [cyan]aios-serve --tenants tenants.toml --scheduling-policy fair[/cyan]
  serve them
"""

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich", help=HELP)

_NO_LIMIT = "none"
_File = Annotated[
    Path, typer.Option("--file", "-f", metavar="FILE", envvar="AIOS_TENANTS", help="The file of tenants.")
]
_Note = Annotated[
    str, typer.Option("--note", metavar="TEXT", show_default="none", help="Whose key it is, or what for.")
]
_DEFAULT_FILE = Path("tenants.toml")


class PrefixCache(StrEnum):
    """Values of --prefix-cache."""

    private = "private"
    shared = "shared"


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `aios-serve tenants`; ends the process."""
    run_command(
        app, "aios-serve tenants", args, in_flags=lambda message: message.replace("max_context=", "--max-context=")
    )


@app.command()
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Letters, digits, dots, dashes and underscores.")],
    *,
    file: _File = _DEFAULT_FILE,
    note: _Note = "",
    weight: Annotated[
        float | None,
        typer.Option("--weight", show_default="1", help="Share under --scheduling-policy fair: 2 gets twice as much."),
    ] = None,
    priority: Annotated[
        int | None,
        typer.Option(
            "--priority",
            show_default="0",
            help="Under --scheduling-policy priority, of requests that bring none; lower is more important.",
        ),
    ] = None,
    best_priority: Annotated[
        int | None,
        typer.Option("--best-priority", show_default="--priority", help="The lowest number a request may ask for."),
    ] = None,
    requests_per_minute: Annotated[
        int | None,
        typer.Option("--requests-per-minute", show_default=_NO_LIMIT, help="Requests a minute, lists not counted."),
    ] = None,
    tokens_per_minute: Annotated[
        int | None,
        typer.Option(
            "--tokens-per-minute", show_default=_NO_LIMIT, help="Tokens a minute, of prompts and answers together."
        ),
    ] = None,
    max_concurrent: Annotated[
        int | None,
        typer.Option("--max-concurrent", show_default=_NO_LIMIT, help="Sequences at once: prompts times choices."),
    ] = None,
    max_context: Annotated[
        str | None,
        typer.Option(
            "--max-context",
            metavar="TOKENS",
            show_default="the model's",
            help="Longest prompt plus answer: 8192, 8k.",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="NAME",
            show_default="all",
            help="A served name that it may use. Can be given several times.",
        ),
    ] = None,
    prefix_cache: Annotated[
        PrefixCache,
        typer.Option("--prefix-cache", help="shared: it may be told that others of its group sent the same prompt."),
    ] = PrefixCache.private,
    cache_group: Annotated[
        str | None,
        typer.Option(
            "--cache-group", metavar="NAME", show_default="all such", help="With --prefix-cache shared: with whom."
        ),
    ] = None,
    disabled: Annotated[bool, typer.Option("--disabled", help="Refuse its requests for now.")] = False,
) -> int:
    """Add a tenant and print its key, once."""
    terms: dict[str, object] = {
        "enabled": False if disabled else None,
        "weight": weight,
        "priority": priority,
        "best_priority": best_priority,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_concurrent": max_concurrent,
        "max_context": None if max_context is None else parse_count(max_context, option="max_context"),
        "models": model or None,
        "prefix_cache": prefix_cache.value if prefix_cache is PrefixCache.shared else None,
        "cache_group": cache_group,
    }
    with editing(file) as editor:
        key = editor.add(name, {field: value for field, value in terms.items() if value is not None}, note=note)
    return _show(key, f"tenant {name} added to {file}")


@app.command()
def add_key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A tenant.")],
    *,
    file: _File = _DEFAULT_FILE,
    note: _Note = "",
) -> int:
    """Give a tenant another key and print it, once."""
    with editing(file) as editor:
        key = editor.add_key(name, note=note)
    return _show(key, f"another key of tenant {name} added to {file}")


@app.command("list")
def list_tenants(
    *,
    file: _File = _DEFAULT_FILE,
    as_data: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> int:
    """Show tenants, their limits and the ids of their keys."""
    tenants = read_tenants(file)
    if as_data:
        typer.echo(json.dumps(as_json(tenants), indent=2))
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a table for a file or a pipe is not cut to a window that is not there
    console.print(as_table(tenants))
    return 0


@app.command()
def revoke(
    name_or_key_id: Annotated[str, typer.Argument(metavar="NAME|KEY-ID", help="A tenant, or one key.")],
    *,
    file: _File = _DEFAULT_FILE,
) -> int:
    """Take out one key, or a tenant with all its keys. Requests on their way end normally."""
    with editing(file) as editor:
        gone = editor.revoke(name_or_key_id)
    typer.echo(f"revoked: {gone}", err=True)
    return 0


@app.command()
def rotate(
    name_or_key_id: Annotated[str, typer.Argument(metavar="NAME|KEY-ID", help="A key, or a tenant that has only one.")],
    *,
    file: _File = _DEFAULT_FILE,
    keep_old: Annotated[
        bool, typer.Option("--keep-old", help="Leave the old key, to be revoked once nobody uses it.")
    ] = False,
) -> int:
    """Replace a key by a new one and print that, once."""
    with editing(file) as editor:
        name, key = editor.rotate(name_or_key_id, keep_old=keep_old)
    return _show(key, f"a new key of tenant {name} is in {file}" + ("; the old one still works" if keep_old else ""))


def _show(key: str, what: str) -> int:
    """The key alone on stdout, so that it can be piped into where it is kept."""
    typer.echo(f"{what}. Its key, which is shown this once and stored nowhere:", err=True)
    typer.echo(key)
    return 0
