"""How a model shows its thoughts: by vLLM's names, or as its chat template tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aios_serve.reasoning.splitter import ThinkMarkers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_model.tokenizer.tokenizer import Tokenizer

REASONING_PARSERS = ("deepseek_r1", "qwen3", "mistral")
"""Values of `--reasoning-parser`, "none" aside."""

NUM_TAIL_TOKENS = 32
"""Tokens at the end of a prompt in which a template opens or closes thoughts."""

_XML, _BRACKETS = ThinkMarkers(), ThinkMarkers("[THINK]", "[/THINK]")


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How thoughts are marked.

    Attributes:
        markers: What stands around them.
        begins_open: Whether an answer begins inside of them unless the prompt has closed them.
    """

    markers: ThinkMarkers
    begins_open: bool = False

    def is_open_after(self, prompt_token_ids: Sequence[int], tokenizer: Tokenizer) -> bool:
        """Whether an answer to this prompt begins with thoughts although no marker begins it."""
        tail = tokenizer.decode(prompt_token_ids[-NUM_TAIL_TOKENS:], skip_special_tokens=False).rstrip()
        if tail.endswith(self.markers.end):
            return False
        return self.begins_open or tail.endswith(self.markers.start)


def reasoning_format(name: str) -> ReasoningFormat:
    """The format by its name."""
    match name:
        case "deepseek_r1":
            return ReasoningFormat(_XML, begins_open=True)
        case "qwen3":
            return ReasoningFormat(_XML)
        case "mistral":
            return ReasoningFormat(_BRACKETS)
        case _:
            raise ValueError(f"{name!r} is no reasoning parser")


def detect_reasoning_parser(template: str) -> str | None:
    """The format that a chat template shows; None if it knows of no thoughts.

    Found this way, text is a thought only where a marker says so, in the answer or at the end of the prompt.
    """
    if _XML.end in template:
        return "qwen3"
    return "mistral" if _BRACKETS.end in template else None
