"""Decides once for a request which parsers its answers go through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aios_model.errors import ChatTemplateError, InvalidRequestError
from aios_serve.prompts import NO_TOOLS
from aios_serve.reasoning.registry import detect_reasoning_parser, reasoning_format
from aios_serve.tool_calls.constraint import constrained, forced_calls_schema
from aios_serve.tool_calls.registry import MARKERS, TOOL_CALL_PARSERS, detect_tool_call_parser
from aios_serve.tool_calls.tools import ToolChoice, tool_names

if TYPE_CHECKING:
    from aios_model.sampling.params import SamplingParams
    from aios_model.tokenizer.tokenizer import Tokenizer
    from aios_serve.openai_types import ChatCompletionRequest
    from aios_serve.reasoning.registry import ReasoningFormat
    from aios_serve.server_config import ServerConfig

FORM_OR_CALLS = (
    "response_format or structured_outputs would leave no room for calls of tools; send one of them with "
    'tool_choice "none", or tools without it'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPlan:
    """What the text of an answer may hold besides text.

    Attributes:
        choice: Whether the model may call, must call, or must call one function.
        tool_call_parser: Format of its calls, if it may call or call ids have to fit it.
        tool_names: Functions it may call.
        parallel: Whether it may call more than one.
        reasoning: How thoughts are marked; None if none are looked for.
        reasoning_is_open: Whether answers begin inside of them.
        include_reasoning: Whether thoughts are sent, or left out.
    """

    choice: ToolChoice
    tool_call_parser: str | None = None
    tool_names: tuple[str, ...] = ()
    parallel: bool = True
    reasoning: ReasoningFormat | None = None
    reasoning_is_open: bool = False
    include_reasoning: bool = True

    @property
    def is_forced(self) -> bool:
        """Whether a grammar holds answers to calls."""
        return self.choice.mode in ("required", "named")

    def for_prompt(self, prompt_token_ids: Sequence[int], tokenizer: Tokenizer) -> AnswerPlan:
        """The plan for answers to this prompt, whose end may have opened or closed thoughts."""
        if self.reasoning is None:
            return self
        return replace(self, reasoning_is_open=self.reasoning.is_open_after(prompt_token_ids, tokenizer))

    def adapted(self, params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
        """`params` with special tokens shown if the markers that are looked for are such."""
        if not params.skip_special_tokens:
            return params
        markers = [self.reasoning.markers.start, self.reasoning.markers.end] if self.reasoning else []
        if self.choice.mode == "auto" and self.tool_call_parser is not None:
            markers.append(MARKERS[self.tool_call_parser])
        if any(_is_special(marker, tokenizer) for marker in markers):
            return replace(params, skip_special_tokens=False)
        return params


def plan_answer(
    body: ChatCompletionRequest, params: SamplingParams, tokenizer: Tokenizer, config: ServerConfig
) -> tuple[AnswerPlan, SamplingParams]:
    """How answers to `body` are taken apart, and the sampling parameters that this needs.

    Raises:
        InvalidRequestError: The template knows of no tools, `tool_choice` "auto" is turned off, it isn't known how the
            model writes calls, or the answer is to have another form.
    """
    choice, tools = body.choice_of_tools, body.tools or []
    jinja = tokenizer.chat_template(with_tools=bool(body.tools_for_template))
    if body.tools_for_template and "tools" not in jinja.names:
        raise InvalidRequestError(NO_TOOLS, param="tools")
    template = jinja.source
    parser = config.tool_call_parser or detect_tool_call_parser(template)
    if choice.mode != "none" and params.structured_outputs is not None:
        raise InvalidRequestError(FORM_OR_CALLS, param="tool_choice")
    if choice.mode == "auto":
        _check_auto(parser, config)
    parallel = body.parallel_tool_calls is not False
    params = constrained(params, forced_calls_schema(tools, choice, parallel=parallel))
    # A grammar leaves no room for thoughts.
    reasoning = None if params.structured_outputs is not None else _reasoning(config, template)
    plan = AnswerPlan(
        choice=choice,
        tool_call_parser=parser,
        tool_names=tuple(tool_names(tools)),
        parallel=parallel,
        reasoning=reasoning,
        include_reasoning=body.include_reasoning is not False,
    )
    return plan, plan.adapted(params, tokenizer)


def describe_formats(tokenizer: Tokenizer, config: ServerConfig) -> str | None:
    """How calls and thoughts are looked for in answers, in words for the operator; None if they are not."""
    try:
        template = tokenizer.chat_template(with_tools=True)
    except ChatTemplateError:
        return None  # a model without chat; a broken template is reported to whoever uses it
    parts = []
    tools = config.tool_call_parser or detect_tool_call_parser(template.source)
    if "tools" in template.names and config.enable_auto_tool_choice:
        asked = " (auto)" if config.tool_call_parser is None else ""
        parts.append(f"tools as {tools}{asked}" if tools else "tools need --tool-call-parser")
    elif config.tool_call_parser:
        parts.append("no tools, whatever --tool-call-parser says: " + _why_no_tools(config))
    thoughts = config.reasoning_parser or detect_reasoning_parser(template.source)
    if thoughts and thoughts != "none":
        parts.append(f"thoughts as {thoughts}{' (auto)' if config.reasoning_parser is None else ''}")
    return ", ".join(parts) or None


def _why_no_tools(config: ServerConfig) -> str:
    return "the chat template knows of none" if config.enable_auto_tool_choice else "--no-enable-auto-tool-choice"


def _check_auto(parser: str | None, config: ServerConfig) -> None:
    if not config.enable_auto_tool_choice:
        raise InvalidRequestError(
            'tool_choice "auto" is turned off on this server (--no-enable-auto-tool-choice); send tool_choice "none"',
            param="tool_choice",
        )
    if parser is None:
        known = ", ".join(TOOL_CALL_PARSERS)
        raise InvalidRequestError(
            'tool_choice "auto" cannot be honoured: the chat template does not tell in which format this model writes '
            f'calls. Start the server with --tool-call-parser ({known}), or send tool_choice "none".',
            param="tool_choice",
        )


def _reasoning(config: ServerConfig, template: str) -> ReasoningFormat | None:
    if config.reasoning_parser == "none":
        return None
    name = config.reasoning_parser or detect_reasoning_parser(template)
    return None if name is None else reasoning_format(name)


def _is_special(marker: str, tokenizer: Tokenizer) -> bool:
    token_ids = tokenizer.encode(marker, add_special_tokens=False)
    return not tokenizer.special_token_ids.isdisjoint(token_ids)
