"""The forms in which `InferenceEngine` takes prompts, brought to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from aios_model.errors import InvalidRequestError
from aios_serve.outputs import RequestOutput

if TYPE_CHECKING:
    from aios_model.sampling.params import SamplingParams

Prompt: TypeAlias = str | Sequence[int]
Message: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedPrompt:
    """A request that may be queued."""

    prompt: str | None
    token_ids: list[int]
    params: SamplingParams

    def empty_output(self, index: int) -> RequestOutput:
        """Where the answer goes; the request id is the place of the prompt in its list."""
        return RequestOutput.empty(
            request_id=str(index), prompt=self.prompt, prompt_token_ids=self.token_ids, num_choices=self.params.n
        )


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """A list of prompts from whatever `generate` was given; InvalidRequestError for what is neither text nor ids."""
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # pyright: ignore[reportReturnType]
    for prompt in prompts:
        if not isinstance(prompt, str | Sequence):
            raise InvalidRequestError(
                f"a prompt must be text or a list of token ids, got {type(prompt).__name__}", param="prompt"
            )
    return prompts  # pyright: ignore[reportReturnType]


def as_conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> Sequence[Sequence[Message]]:
    """A list of conversations from one or several; InvalidRequestError if there is nothing in it."""
    if not messages:
        raise InvalidRequestError("there are no messages", param="messages")
    return [messages] if isinstance(messages[0], Mapping) else messages  # pyright: ignore[reportReturnType]
