"""What a tokenizer is made of, whichever file it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerParts:
    """The pieces `Tokenizer` is assembled from.

    Attributes:
        backend: Splits text into ids; its post-processor adds BOS or EOS where the model wants them.
        bos_token_id: Beginning-of-sequence id, None where the model has none.
        eos_token_ids: Every id that ends a sequence, the tokenizer's own first.
        special_tokens: `bos_token`, `eos_token`, ... to their text: variables of the chat template.
        chat_templates: Template sources by name; the plain one is called `default`.
    """

    backend: tokenizers.Tokenizer
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_templates: Mapping[str, str] = field(default_factory=dict)
