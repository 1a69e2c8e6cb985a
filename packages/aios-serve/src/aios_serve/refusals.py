"""Fields that are known, cannot be honoured, and so are refused by name instead of ignored.

A client that asks for JSON and gets prose has been lied to. Each entry says which
values mean "not asked for" and what to do instead. What a later layer learns to do loses its entry here and gains a
field in `openai_types.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aios_model.errors import InvalidRequestError


class UnsupportedFieldError(InvalidRequestError):
    """A field of the API that this server knows and cannot honour."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a field is refused, and which values besides null are harmless because they ask for nothing."""

    reason: str
    harmless: tuple[object, ...] = ()


_GUIDED = "it has gone from vLLM, too; write structured_outputs: {{{0!r}: ...}}"
_FUNCTIONS = "it is the old form of tools; send tools and tool_choice"
_MULTIMODAL = "this server reads and writes text only"
_PROMPT_LOGPROBS = "log-probabilities of prompt tokens are not supported yet"
_BEAM = "beam search is not supported; sample with n > 1 instead"

_GENERATION: Mapping[str, Refusal] = {
    "prompt_logprobs": Refusal(_PROMPT_LOGPROBS),
    "logprob_token_ids": Refusal("log-probabilities of chosen ids are not supported; use top_logprobs"),
    "use_beam_search": Refusal(_BEAM, (False,)),
    "length_penalty": Refusal(_BEAM, (1, 1.0)),
    "guided_json": Refusal(_GUIDED.format("json")),
    "guided_regex": Refusal(_GUIDED.format("regex")),
    "guided_choice": Refusal(_GUIDED.format("choice")),
    "guided_grammar": Refusal(_GUIDED.format("grammar")),
    "guided_whitespace_pattern": Refusal("one space may follow a comma or a colon, and none is allowed elsewhere"),
    "logits_processors": Refusal("code in requests is never run", ([],)),
    "prompt_embeds": Refusal("prompts are text or token ids"),
    "kv_transfer_params": Refusal("moving KV pages between servers is not supported", ({},)),
    "truncation_side": Refusal("truncate_prompt_tokens keeps the last tokens", ("left",)),
    "return_token_ids": Refusal("token ids are not returned; use /tokenize", (False,)),
    "return_tokens_as_token_ids": Refusal("tokens in logprobs are returned as text and bytes", (False,)),
}

_TEMPLATE: Mapping[str, Refusal] = {
    "chat_template": Refusal("a template in a request would run there; start the server with --chat-template"),
    "documents": Refusal("documents are not passed to templates; put them into a message", ([],)),
    "mm_processor_kwargs": Refusal(_MULTIMODAL, ({},)),
}

COMPLETION: Mapping[str, Refusal] = {
    **_GENERATION,
    "suffix": Refusal("filling in before a suffix is not supported", ("",)),
    "best_of": Refusal("best_of is not supported; ask for n choices with logprobs and pick one", (1,)),
}
"""For `/v1/completions`."""

CHAT: Mapping[str, Refusal] = {
    **_GENERATION,
    **_TEMPLATE,
    "best_of": COMPLETION["best_of"],
    "functions": Refusal(_FUNCTIONS, ([],)),
    "function_call": Refusal(_FUNCTIONS, ("none", "auto")),
    "modalities": Refusal(_MULTIMODAL, (["text"], [])),
    "audio": Refusal(_MULTIMODAL),
    "echo": Refusal("the last message is not repeated in the answer", (False,)),
    "web_search_options": Refusal("this server looks nothing up"),
}
"""For `/v1/chat/completions`."""

TOKENIZE: Mapping[str, Refusal] = _TEMPLATE
"""For `/tokenize`."""


def refuse_unsupported(body: Mapping[str, object], refusals: Mapping[str, Refusal]) -> None:
    """Refuse a body that asks for something in `refusals`.

    Raises:
        UnsupportedFieldError: names the field, the reason and the remedy.
    """
    for name in body.keys() & refusals.keys():
        refusal = refusals[name]
        value = body[name]
        if value is not None and not any(_same(value, harmless) for harmless in refusal.harmless):
            raise UnsupportedFieldError(f"{name} cannot be honoured: {refusal.reason}", param=name)


def _same(value: object, harmless: object) -> bool:
    """Equality that tells `true` from 1."""
    return value == harmless and isinstance(value, bool) == isinstance(harmless, bool)
