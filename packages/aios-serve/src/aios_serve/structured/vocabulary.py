"""The tokens of a model as llguidance wants them: bytes by id, as many as the model's output is wide."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

    import llguidance

    from aios_model.tokenizer.tokenizer import Tokenizer


class Vocabulary(msgspec.Struct, frozen=True, array_like=True):
    """What each token adds to a running text. Plain data, to be sent to another process.

    Attributes:
        tokens: Bytes by token id; for special tokens their names. Empty ones, as those that pad the output width
            beyond the tokenizer's tokens, are never allowed.
        special_token_ids: Tokens that are no text: a grammar allows them only where it names them.
        eos_token_ids: Tokens that end a sequence.
    """

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_ids: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, eos_token_ids: Iterable[int], vocab_size: int) -> Vocabulary:
        """The vocabulary of a model.

        Args:
            tokenizer: The model's.
            eos_token_ids: Tokens that end a sequence; those the model cannot draw are left out.
            vocab_size: Width of the model's output.
        """
        special = [token_id for token_id in sorted(tokenizer.special_token_ids) if token_id < vocab_size]
        tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        return cls(
            tokens=tokens,
            special_token_ids=special,
            eos_token_ids=[token_id for token_id in eos_token_ids if token_id < vocab_size],
        )

    def build(self) -> llguidance.LLTokenizer:
        """The tokenizer that matchers are made for. Takes about 0.1 s for 49,152 tokens."""
        import llguidance  # only where masks are computed, or grammars checked

        assert self.eos_token_ids, "a constrained output has to end by a token"
        return llguidance.LLTokenizer(_Wrapper(self), eos_token=self.eos_token_ids)  # type: ignore[arg-type]


class _Wrapper:
    """What llguidance asks of a tokenizer. It never gets a text to split: masks come from bytes alone."""

    is_tokenizer_wrapper = True
    _accepts_bytes = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.tokens
        self.special_token_ids = vocabulary.special_token_ids
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self.bos_token_id = None

    def __call__(self, text: object) -> list[int]:
        raise NotImplementedError("masks need no tokenization")
