"""From a constraint to a matcher: llguidance's notation, its limits, and what it says when it refuses.

Unbounded whitespace is not part of any JSON grammar: one space may follow a comma or a colon. Models that are unsure
what comes next like to write spaces until their tokens run out.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from aios_serve.structured.errors import GrammarError

if TYPE_CHECKING:
    from aios_model.sampling.structured import StructuredOutputsParams

_LIMITS = llguidance.LLParserLimits(
    # A tenth of llguidance's own: at 50 thousand units a millisecond, building a lexer takes milliseconds. The largest
    # expressions that people write (dates, URLs, enums of a thousand values) take a tenth of this.
    initial_lexer_fuel=500_000,
    # A mask may take some 3 ms of the step that all requests share, rather than 14.
    step_lexer_fuel=50_000,
    # About 1.5 kB each: 30 MB for the worst grammar instead of 400.
    max_lexer_states=20_000,
    verbose_errors=False,  # their state dumps say nothing to clients
)


def new_matcher(constraint: StructuredOutputsParams, tokenizer: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    """Compiles a constraint: mostly a millisecond, for the largest ones a second. Releases the interpreter lock.

    Raises:
        GrammarError: It is malformed, too complex, asks for something that cannot be enforced, or no text satisfies
            it.
    """
    matcher = llguidance.LLMatcher(tokenizer, lark_text(constraint), log_level=0, limits=_LIMITS)
    if matcher.is_error():
        raise grammar_error(constraint, matcher.get_error())
    return matcher


def lark_text(constraint: StructuredOutputsParams) -> str:
    """The constraint in llguidance's dialect of Lark.

    Raises:
        GrammarError: A grammar in GBNF that cannot be translated.
    """
    match constraint.kind:
        case "json":
            assert constraint.json is not None
            text = _json_rule(json.loads(constraint.json), constraint)
        case "json_object":
            text = _json_rule({"type": "object"}, constraint)
        case "regex":
            text = f"start: /{llguidance.regex_to_lark(constraint.regex or '')}/"
        case "choice":
            # As an expression, not as strings, whose lexer stumbles over control characters.
            text = f"start: /{'|'.join(map(_literal, constraint.choice or ()))}/"
        case "grammar":
            text = _as_lark(constraint)
    # Without this, text that is forced is forced as one sequence of tokens: masks would need a tokenizer, and depend
    # on more than the tokens before.
    return text + '\n%llguidance {"no_forcing": true}\n'


def probe(matcher: llguidance.LLMatcher, constraint: StructuredOutputsParams) -> None:
    """Takes a few steps through a grammar, to find now what would fail after some tokens.

    Raises:
        GrammarError: No text satisfies the constraint, or following it takes too much.
    """
    for token_index in (0, -1):
        walker = matcher.deep_copy()
        for _ in range(_PROBED_TOKENS):
            mask = int.from_bytes(walker.compute_bitmask(), "little")
            if walker.is_error():
                raise grammar_error(constraint, walker.get_error())
            if walker.is_stopped() or not mask:
                break
            token_id = (mask & -mask).bit_length() - 1 if token_index == 0 else mask.bit_length() - 1
            walker.consume_token(token_id)
        if not walker.is_error():
            continue
        raise grammar_error(constraint, walker.get_error())


def grammar_error(constraint: StructuredOutputsParams, reason: str) -> GrammarError:
    """The error for a constraint that llguidance refused with `reason`."""
    if "NoExtension" in reason:
        reason = "no text satisfies it"
    # What follows is the grammar as llguidance was given it; only a client's own is worth showing.
    if constraint.kind != "grammar":
        reason = _QUOTED_LINE.split(_PLACE.sub("", reason), maxsplit=1)[0]
    reason = reason.replace("<non-verbose/>", "").removeprefix("failed to compile JSON schema: ")
    return GrammarError(
        f"{constraint.param} cannot be honoured: {' '.join(reason.split())[:400]}", param=constraint.param
    )


_PROBED_TOKENS = 16
_PLACE = re.compile(r"^at \d+\(\d+\): ")
_QUOTED_LINE = re.compile(r"\n\s*\d+ \| ")


def _json_rule(schema: dict[str, Any], constraint: StructuredOutputsParams) -> str:
    space = "" if constraint.disable_any_whitespace else " ?"
    options = {
        "whitespace_flexible": False,
        "item_separator": f",{space}",
        "key_separator": f":{space}",
        "coerce_one_of": True,
        "lenient": False,
    }
    return f"start: %json {json.dumps({**schema, 'x-guidance': options})}"


def _as_lark(constraint: StructuredOutputsParams) -> str:
    try:
        return any_to_lark(constraint.grammar or "")
    except Exception as error:  # the translator raises plain Exception, and runs out of stack
        raise grammar_error(constraint, str(error)) from None


def _literal(text: str) -> str:
    """An expression that matches exactly `text`."""
    return "".join(character if character.isalnum() else f"\\x{{{ord(character):x}}}" for character in text)
