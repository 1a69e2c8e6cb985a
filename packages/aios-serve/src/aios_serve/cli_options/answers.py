"""Options of `aios-serve`: what is looked for in answers besides text."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

_option = partial(typer.Option, rich_help_panel="Tools and thoughts")

ToolCallParser = Annotated[
    str | None,
    _option(
        "--tool-call-parser",
        metavar="hermes|llama3_json|mistral",
        show_default="by the chat template",
        help="Format in which the model writes calls of tools.",
    ),
]
EnableAutoToolChoice = Annotated[
    bool,
    _option(
        "--enable-auto-tool-choice/--no-enable-auto-tool-choice",
        help="Let the model decide whether to call a tool, where requests bring some.",
    ),
]
ReasoningParser = Annotated[
    str | None,
    _option(
        "--reasoning-parser",
        metavar="deepseek_r1|qwen3|mistral|none",
        show_default="by the chat template",
        help="How the model marks what it thinks before it answers; sent apart from the answer. none: leave it in.",
    ),
]
