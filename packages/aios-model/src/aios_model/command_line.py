"""What all commands of AIOS have in common: how they end, and an option that means the same everywhere. No torch here.

They end with a status, and with one line where something was wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, NoReturn, cast

import typer

from aios_model.errors import AiosError, ConfigError

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]

# Where typer keeps click depends on its version; the class of every mistake in the arguments is this one.
UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__bases__[0])


def run_command(
    app: typer.Typer,
    name: str,
    args: Sequence[str] | None,
    *,
    in_flags: Callable[[str], str] = str,
    complain: Callable[[str], None] | None = None,
) -> NoReturn:
    """Runs a command and ends the process.

    The status is that of the command; 2 for a mistake in the arguments, 1 for anything else that was expected to go
    wrong, 130 for an interrupt. An error nobody expected keeps its traceback.

    Args:
        app: The command.
        name: As users type it.
        args: Its arguments; None for those of the process.
        in_flags: Turns the names of options in a ConfigError into flags.
        complain: Prints a mistake; None writes `name: message` to stderr.
    """
    say = complain or (lambda message: typer.echo(f"{name}: {' '.join(message.split())}", err=True))
    command = typer.main.get_command(app)
    try:
        status = command.main(args=None if args is None else list(args), prog_name=name, standalone_mode=False)
    except UsageError as error:
        reason = error.format_message().replace("Value error, ", "").rstrip(".")
        if reason:  # without a command the help has been shown, and there is nothing to complain about
            say(f"{reason}; see {name} --help")
        status = 2
    except ConfigError as error:
        say(in_flags(str(error)))
        status = 2
    except AiosError as error:
        say(str(error))
        status = 1
    except (typer.Abort, KeyboardInterrupt):
        status = 130
    sys.exit(status)
