"""Log-probabilities in the two shapes of the API: four parallel lists for completions, objects for chat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aios_serve.openai_responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_model.sampling.rows import TokenLogprobs
    from aios_model.tokenizer.tokenizer import Tokenizer

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say. vLLM's number."""


def chat_logprobs(entries: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> ChatLogprobs:
    """The shape of `/v1/chat/completions`."""
    return ChatLogprobs(content=[_token_logprob(entry, tokenizer) for entry in entries])


def completion_logprobs(
    entries: Sequence[TokenLogprobs], tokenizer: Tokenizer, *, text_offset: int = 0
) -> CompletionLogprobs:
    """The shape of `/v1/completions`. `text_offset` is where the first entry's token begins in the choice's text."""
    tokens = [tokenizer.token_text(entry.token_id) for entry in entries]
    offsets = []
    for token in tokens:
        offsets.append(text_offset)
        text_offset += len(token)
    return CompletionLogprobs(
        text_offset=offsets,
        tokens=tokens,
        token_logprobs=[_finite(entry.logprob) for entry in entries],
        top_logprobs=[_top_by_text(entry, tokenizer) for entry in entries],
    )


def _token_logprob(entry: TokenLogprobs, tokenizer: Tokenizer) -> TokenLogprob:
    chosen = _top_logprob(entry.token_id, entry.logprob, tokenizer)
    top = [_top_logprob(token_id, logprob, tokenizer) for token_id, logprob in entry.top]
    return TokenLogprob(token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes, top_logprobs=top)


def _top_logprob(token_id: int, logprob: float, tokenizer: Tokenizer) -> TopLogprob:
    text = tokenizer.token_text(token_id)
    return TopLogprob(token=text, logprob=_finite(logprob), bytes=list(tokenizer.token_bytes(token_id)))


def _top_by_text(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, float]:
    """The likeliest tokens, and the chosen one if it is not among them."""
    top = {tokenizer.token_text(token_id): _finite(logprob) for token_id, logprob in entry.top}
    top.setdefault(tokenizer.token_text(entry.token_id), _finite(entry.logprob))
    return top


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
