"""What is refused at the door, so that nothing inside has to expect it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aios_model.errors import InvalidRequestError
from aios_model.sampling.params import MAX_LOGPROBS

if TYPE_CHECKING:
    from aios_sched.request import Request


def check_token_ids(request: Request, *, vocab_size: int) -> None:
    """Every id of the prompt and of the sampling parameters must have a row in the embedding and a logit.

    Raises:
        InvalidRequestError: an id is below 0, at or above `vocab_size`, or no integer.
    """
    for position, token_id in enumerate(request.prompt_token_ids):
        # 80 ns a token: a prompt of 8,000 costs two thirds of a millisecond, once.
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"prompt token {position} is {token_id!r}; the model knows the ids 0 to {vocab_size - 1}",
                param="prompt",
            )
    # How many logprobs one may ask for is the server's business, not the engine's.
    request.params.validate_for(vocab_size=vocab_size, max_logprobs=MAX_LOGPROBS)


def resolve_max_tokens(request: Request, *, max_model_len: int) -> int:
    """How many tokens the request may generate within the context.

    Raises:
        InvalidRequestError: the prompt is empty or leaves no room, or `max_tokens` exceeds what it leaves.
    """
    num_prompt_tokens = len(request.prompt_token_ids)
    if not num_prompt_tokens:
        raise InvalidRequestError("the prompt is empty; give at least one token", param="prompt")
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise InvalidRequestError(
            f"the prompt has {num_prompt_tokens} tokens, but the context holds {max_model_len}, prompt and output "
            f"together; shorten it to {max_model_len - 1} or fewer",
            param="prompt",
        )
    max_tokens = request.params.max_tokens
    if max_tokens is None:
        return room
    if max_tokens > room:
        raise InvalidRequestError(
            f"a prompt of {num_prompt_tokens} tokens plus max_tokens={max_tokens} makes "
            f"{num_prompt_tokens + max_tokens}, but the context holds {max_model_len}; lower max_tokens to {room} or "
            "fewer, or shorten the prompt",
            param="max_tokens",
        )
    return max_tokens


def check_pool(request: Request, *, max_tokens: int, num_blocks: int, block_size: int) -> None:
    """The whole request must fit into the pool when it is alone: this is what guarantees that it can finish.

    The last token is sampled but never stored, hence the one slot less.

    Raises:
        InvalidRequestError: it needs more pages than there are.
    """
    num_prompt_tokens = len(request.prompt_token_ids)
    num_slots = num_prompt_tokens + max_tokens - 1
    needed = -(-num_slots // block_size)
    if needed > num_blocks:
        raise InvalidRequestError(
            f"a prompt of {num_prompt_tokens} tokens and up to {max_tokens} output tokens need {needed} pages of "
            f"{block_size} tokens, but the whole pool has {num_blocks} ({num_blocks * block_size} tokens); lower "
            "max_tokens, shorten the prompt, or give the pool more memory",
            param="max_tokens",
        )


def check_deadline(request: Request, *, now: float) -> None:
    """A request must have some time left.

    Raises:
        InvalidRequestError: its deadline has passed.
    """
    if request.deadline is not None and request.deadline <= now:
        raise InvalidRequestError(
            f"the deadline passed {now - request.deadline:.3g} s ago; give the request more time", param="deadline"
        )
