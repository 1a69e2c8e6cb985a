"""Renders a model's chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes

from aios_model.errors import ChatTemplateError, InvalidRequestError
from aios_model.tokenizer.chat_messages import ContentShape, read_messages, read_plain
from aios_model.tokenizer.template_sandbox import TemplateLimitError, TemplateLimits, TemplateSandbox


class ChatTemplate:
    """A jinja template that turns messages into a prompt, with what `transformers` offers templates.

    It is compiled once and may be rendered from several threads. The template is not trusted: see `template_sandbox`.

    Attributes:
        source: The template.
        names: Every name it reads or sets: with "tools" among them it knows of tools.
    """

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        limits: TemplateLimits | None = None,
    ) -> None:
        """
        Args:
            source: The template.
            special_tokens: `bos_token`, `eos_token`, ... and their text, which the template sees as variables.
            limits: Time and size of one rendering.

        Raises:
            ChatTemplateError: The template is not valid jinja.
        """
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self._limits = limits or TemplateLimits()
        self._sandbox = TemplateSandbox(self._limits)
        self._sandbox.filters["tojson"] = self._sandbox.guarded("tojson", _to_json)
        self._sandbox.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        try:
            self._template = self._sandbox.from_string(source)
            parsed = self._sandbox.parse(source)
            self._shape: ContentShape = _content_shape(parsed)
            self.names = frozenset(node.name for node in parsed.find_all(nodes.Name))
        except Exception as error:  # nesting beyond Python's limits raises whatever Python happens to raise
            raise ChatTemplateError(f"the model's chat template is not valid: {_describe(error)}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a conversation; arguments and errors as `Tokenizer.apply_chat_template`."""
        extra = self._read_variables(variables or {})
        plain_messages = read_messages(messages, shape=self._shape)
        plain_tools = None if tools is None else read_plain(list(tools), "tools", param="tools")
        values = self._special_tokens | extra
        values |= {"messages": plain_messages, "tools": plain_tools, "documents": None}
        values |= {"add_generation_prompt": add_generation_prompt}
        try:
            with self._sandbox.limited():
                return self._write(values)
        except _RefusedByTemplateError as error:
            raise ChatTemplateError(str(error)) from error
        except Exception as error:  # a template can make any operation fail in any way
            raise ChatTemplateError(f"the model's chat template failed: {_describe(error)}") from error

    def _write(self, values: dict[str, Any]) -> str:
        pieces, num_chars = [], 0
        for piece in self._template.generate(values):
            num_chars += len(piece)
            if num_chars > self._limits.num_chars:
                raise TemplateLimitError(f"the prompt is longer than {self._limits.num_chars} characters")
            pieces.append(piece)
        return "".join(pieces)

    def _read_variables(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        for name in variables:
            if name in _RESERVED or name in self._special_tokens or name in self._sandbox.globals:
                _refuse_variable(f"{name!r} is set by the server and cannot be overridden")
            if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
                _refuse_variable(f"{name!r} is not a name that a template can use")
        return read_plain(variables, "chat_template_kwargs", param="chat_template_kwargs")


_RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"}
    | {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"}
    | {"additional_special_tokens", "extra_special_tokens", "conversation", "self", "context", "environment", "loop"}
)


class _RefusedByTemplateError(jinja2.TemplateError):
    """The template itself called `raise_exception`."""


def _raise_exception(message: Any) -> NoReturn:
    raise _RefusedByTemplateError(str(message))


def _strftime_now(format_: str) -> str:
    return datetime.now().strftime(format_[:1000])


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML and sorts keys; models were trained without.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _content_shape(template: nodes.Template) -> ContentShape:
    """Parts if the template loops over content, either if it also asks somewhere whether a value is text."""
    names: set[str] = set()
    for assignment in template.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and _ends_in(assignment.node, names):
            names.add(assignment.target.name)
    if not any(_ends_in(loop.iter, names) for loop in template.find_all(nodes.For)):
        return "text"
    return "either" if any(test.name == "string" for test in template.find_all(nodes.Test)) else "parts"


def _ends_in(node: nodes.Node, names: set[str]) -> bool:
    """Whether an expression is `x.content`, `x['content']`, or one of the variables that were set from such."""
    match node:
        case nodes.Name(name=name):
            return name in names
        case nodes.Getattr(attr=attribute):
            return attribute == "content"
        case nodes.Getitem(arg=nodes.Const(value=key)):
            return key == "content"
    return False


def _describe(error: Exception) -> str:
    line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return f"{str(error)[:500] or type(error).__name__}{line}"


def _refuse_variable(message: str) -> NoReturn:
    raise InvalidRequestError(f"chat_template_kwargs: {message}", param="chat_template_kwargs")
