"""The loop: how a prompt becomes text, one token at a time. Page one of the course.

Everything above this package exists to run this loop for many people at once, faster and in less memory.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aios_model.cache import ContiguousCache
from aios_model.errors import InvalidRequestError
from aios_model.model import LoadedModel
from aios_model.sampling.bad_words import resolve_bad_words
from aios_model.sampling.params import SamplingParams
from aios_model.sampling.sampler import Sampler, SamplingRow, TokenLogprobs
from aios_model.tokenizer.detokenizer import IncrementalDetokenizer
from aios_model.tokenizer.stop_strings import StopStringMatcher

# Tokens of the prompt that run through the model together; bounds the memory that long prompts need.
PREFILL_CHUNK = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedToken:
    """One token of the answer.

    Attributes:
        token_id: What was drawn.
        logprobs: Its log-probability and the likeliest alternatives, if asked for.
        finish_reason: `stop` or `length` on the last token, else None.
    """

    token_id: int
    logprobs: TokenLogprobs | None
    finish_reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedText:
    """A piece of the answer's text.

    Attributes:
        text: What can be shown now; empty while a character or a stop string is still incomplete.
        token: The token that brought it.
        finish_reason: `stop` or `length` on the last piece, else None.
    """

    text: str
    token: GeneratedToken
    finish_reason: str | None


@torch.inference_mode()
def generate_tokens(
    model: LoadedModel,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    *,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[GeneratedToken]:
    """Draws tokens until a stop token, `max_tokens` or the end of the context.

    Args:
        model: What to run.
        prompt_token_ids: At least one token.
        params: How to draw; stop strings need text and are the business of `generate_text`.
        prefill_chunk: Tokens of the prompt that run together.

    Raises:
        InvalidRequestError: The prompt is empty or does not fit the context, or a parameter is out of range.
    """
    decoder, prompt = model.decoder, list(prompt_token_ids)
    max_tokens = _check(model, prompt, params)
    stop_token_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else model.eos_token_ids)
    seed = secrets.randbits(63) if params.seed is None else params.seed
    sampler = Sampler(vocab_size=model.config.vocab_size, device=decoder.device)
    cache = ContiguousCache(
        model.config, max_length=len(prompt) + max_tokens, dtype=decoder.dtype, device=decoder.device
    )
    output: list[int] = []
    pending = prompt
    while True:
        hidden_D = _run(model, pending, cache, prefill_chunk)
        row = SamplingRow(
            request_id="generate",
            params=params,
            seed=seed,
            position=len(prompt) + len(output),
            prompt_token_ids=prompt,
            output_token_ids=output,
            stop_token_ids=stop_token_ids,
        )
        [sampled] = sampler.sample(decoder.logits(hidden_D[None]), [row])
        output.append(sampled.token_id)
        reason = _finish_reason(sampled.token_id, len(output), max_tokens, stop_token_ids)
        yield GeneratedToken(token_id=sampled.token_id, logprobs=sampled.logprobs, finish_reason=reason)
        if reason is not None:
            return
        pending = [sampled.token_id]


def generate_text(
    model: LoadedModel, prompt: str | Sequence[int], params: SamplingParams, *, prefill_chunk: int = PREFILL_CHUNK
) -> Iterator[GeneratedText]:
    """As `generate_tokens`, in text: decodes token by token and honours stop strings across token borders."""
    prompt_token_ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    params = resolve_bad_words(params, model.tokenizer)
    detokenizer = IncrementalDetokenizer(
        model.tokenizer, prompt_token_ids, skip_special_tokens=params.skip_special_tokens
    )
    matcher = StopStringMatcher(params.stop, include_in_output=params.include_stop_str_in_output)
    for token in generate_tokens(model, prompt_token_ids, params, prefill_chunk=prefill_chunk):
        text = detokenizer.push([token.token_id])
        if token.finish_reason is not None:
            text += detokenizer.finish()
        scan = matcher.push(text)
        if scan.matched is not None:
            yield GeneratedText(text=scan.text, token=token, finish_reason="stop")
            return
        held_back = matcher.finish() if token.finish_reason is not None else ""
        yield GeneratedText(text=scan.text + held_back, token=token, finish_reason=token.finish_reason)


def _run(model: LoadedModel, token_ids: list[int], cache: ContiguousCache, chunk: int) -> Tensor:
    """Runs tokens behind what the cache holds, in chunks; the hidden state [D] of the last one."""
    decoder = model.decoder
    hidden_TD = None
    for start in range(0, len(token_ids), chunk):
        tokens_T = torch.tensor(token_ids[start : start + chunk], device=decoder.device)
        positions_T = torch.arange(cache.length, cache.length + len(tokens_T), device=decoder.device)
        hidden_TD = decoder(tokens_T, positions_T, cache)
        cache.advance(len(tokens_T))
    assert hidden_TD is not None
    return hidden_TD[-1]


def _finish_reason(token_id: int, num_output: int, max_tokens: int, stop_token_ids: frozenset[int]) -> str | None:
    if token_id in stop_token_ids:
        return "stop"
    return "length" if num_output >= max_tokens else None


def _check(model: LoadedModel, prompt: list[int], params: SamplingParams) -> int:
    """Validates the request; the number of tokens that may be drawn."""
    limit = model.decoder.context_length
    if not prompt:
        raise InvalidRequestError("the prompt is empty; give it at least one token", param="prompt")
    if len(prompt) >= limit:
        raise InvalidRequestError(
            f"the prompt has {len(prompt)} tokens, the context holds {limit}; shorten the prompt", param="prompt"
        )
    if params.n != 1:
        raise InvalidRequestError(f"this loop draws one answer, n = {params.n} needs the engine", param="n")
    params.validate_for(vocab_size=model.config.vocab_size)
    bad = next((token for token in prompt if not 0 <= token < model.config.vocab_size), None)
    if bad is not None:
        raise InvalidRequestError(
            f"prompt token {bad} is outside the vocabulary of {model.config.vocab_size}", param="prompt"
        )
    if params.max_tokens is None:
        return limit - len(prompt)
    if len(prompt) + params.max_tokens > limit:
        raise InvalidRequestError(
            f"{len(prompt)} prompt tokens + max_tokens = {params.max_tokens} exceed the context of {limit}",
            param="max_tokens",
        )
    return params.max_tokens
