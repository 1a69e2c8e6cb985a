"""Text to token ids and back, without torch.

- `Tokenizer`: encode, decode and chat templates, from a Hugging Face folder or from a GGUF's metadata.
- `IncrementalDetokenizer`: the text of a sequence that is still growing, never half a character.
- `StopStringMatcher`: finds stop strings across token borders and holds back what may become one.
- `ChatTemplate`: a model's jinja template, rendered in a sandbox with bounded time and size.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aios_model.tokenizer.chat_template import ChatTemplate
    from aios_model.tokenizer.detokenizer import IncrementalDetokenizer
    from aios_model.tokenizer.stop_strings import StopScan, StopStringMatcher
    from aios_model.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "IncrementalDetokenizer", "StopScan", "StopStringMatcher", "Tokenizer"]

_HOMES = {
    "ChatTemplate": "chat_template",
    "IncrementalDetokenizer": "detokenizer",
    "StopScan": "stop_strings",
    "StopStringMatcher": "stop_strings",
    "Tokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
