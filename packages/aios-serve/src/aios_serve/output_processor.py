"""From the engine's token outputs to text: n choices per request, UTF-8 that never breaks, stop strings, logprobs.

Torch-free. `OutputProcessor` knows the open requests, `_Choice` turns the tokens of one of them into text.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aios_model.tokenizer.detokenizer import IncrementalDetokenizer
from aios_model.tokenizer.stop_strings import StopStringMatcher
from aios_sched.request import DEFAULT_TENANT
from aios_serve.messages import AddRequest, ChildRequest
from aios_serve.open_request import OpenRequest
from aios_serve.outputs import CompletionDelta, RequestDelta

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aios_model.sampling.params import SamplingParams
    from aios_model.tokenizer.tokenizer import Tokenizer
    from aios_serve.messages import ChildOutput

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class ProcessedStep:
    """What a step's outputs came to.

    Attributes:
        deltas: One per request that gained something.
        gained: For each choice that gained tokens: how many, seconds since its last ones, whether they are its first.
        aborts: Engine ids of choices that ended here (a stop string) while the engine still runs them.
        failures: Requests that failed, with the message; they are closed already.
        finished: Requests that ended, failed ones too; they are closed already.
    """

    deltas: list[tuple[OpenRequest, RequestDelta]] = field(default_factory=list)
    gained: list[tuple[int, float, bool]] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    failures: list[tuple[OpenRequest, str]] = field(default_factory=list)
    finished: list[OpenRequest] = field(default_factory=list)


class OutputProcessor:
    """The open requests of one engine, and the way back from engine ids to them.

    Args:
        tokenizer: Decodes.
        eos_token_ids: Tokens that end a sequence, passed on with every request.
        seed: Seeds requests that bring no seed of their own, in order of arrival; None draws from the system.
    """

    def __init__(self, tokenizer: Tokenizer, *, eos_token_ids: Sequence[int], seed: int | None) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = tuple(eos_token_ids)
        self._random = random.SystemRandom() if seed is None else random.Random(seed)
        self._num_opened = 0
        self._requests: dict[str, OpenRequest] = {}
        self._choices: dict[str, tuple[OpenRequest, _Choice]] = {}

    @property
    def num_open_requests(self) -> int:
        """Requests that are not closed."""
        return len(self._requests)

    @property
    def num_open_choices(self) -> int:
        """Sequences the engine may be running for them."""
        return len(self._choices)

    @property
    def open_requests(self) -> list[OpenRequest]:
        """Requests that are not closed, oldest first."""
        return list(self._requests.values())

    def get(self, key: str) -> OpenRequest | None:
        """The open request that `add_request.key` names."""
        return self._requests.get(key)

    def open(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        session: str = "",
        tenant: str = DEFAULT_TENANT,
        tenant_weight: float = 1.0,
        deadline: float | None = None,
    ) -> OpenRequest:
        """Take in a checked request. Its `add_request` is what the engine must be given."""
        self._num_opened += 1
        request_id = request_id or f"request-{self._num_opened}"
        # The caller may use one id twice, and "a" beside "a.1-0": the engine's ids end in our own count.
        key = f"{request_id}.{self._num_opened}"
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        request = OpenRequest(
            request_id=request_id,
            session=session,
            add_request=AddRequest(
                key=key,
                children=[
                    ChildRequest(engine_id=f"{key}-{index}", seed=_child_seed(seed, index)) for index in range(params.n)
                ],
                prompt_token_ids=list(prompt_token_ids),
                params=params,
                eos_token_ids=self._eos_token_ids,
                arrival_time=time.monotonic(),
                priority=priority,
                cache_salt=cache_salt,
                tenant=tenant,
                tenant_weight=tenant_weight,
                deadline=deadline,
            ),
        )
        self._requests[key] = request
        for index, child in enumerate(request.add_request.children):
            choice = _Choice(index, params, prompt_token_ids, self._tokenizer)
            self._choices[child.engine_id] = (request, choice)
        return request

    def close(self, request: OpenRequest) -> list[str]:
        """Forget a request, whatever its state; returns the engine ids of its choices that may still run."""
        self._requests.pop(request.key, None)
        ids = [child.engine_id for child in request.add_request.children]
        return [engine_id for engine_id in ids if self._choices.pop(engine_id, None) is not None]

    def abort(self, request: OpenRequest) -> tuple[list[str], RequestDelta]:
        """Close a request and end its running choices with "abort"; returns their engine ids and the last delta."""
        running = self.close(request)
        request.finish_reason = "abort"
        ended = [
            CompletionDelta(index=index, finish_reason="abort")
            for index, child in enumerate(request.add_request.children)
            if child.engine_id in running
        ]
        last = RequestDelta(
            request_id=request.request_id, deltas=ended, num_cached_tokens=request.num_cached_tokens, finished=True
        )
        return running, last

    def process(self, outputs: Iterable[ChildOutput]) -> ProcessedStep:
        """Turn one or more steps' outputs into deltas. What goes wrong with one request fails that one only."""
        step = ProcessedStep()
        deltas: dict[str, RequestDelta] = {}
        now = time.monotonic()
        for output in outputs:
            known = self._choices.get(output.engine_id)
            if known is not None:  # else it was aborted while the step ran
                self._process_one(output, *known, now=now, step=step, deltas=deltas)
        return step

    def _process_one(
        self,
        output: ChildOutput,
        request: OpenRequest,
        choice: _Choice,
        *,
        now: float,
        step: ProcessedStep,
        deltas: dict[str, RequestDelta],
    ) -> None:
        if output.error is not None:
            self._fail(request, output.error, step)
            return
        try:
            delta = choice.push(output)
        except Exception:
            logger.exception("decoding the output of request %s failed", request.request_id)
            self._fail(request, "decoding its output failed", step)
            return
        if output.token_ids:
            step.gained.append(request.note_tokens(output, len(delta.token_ids), now=now))
        if delta.finish_reason is not None:
            self._finish_choice(output, request, delta.finish_reason, step)
        self._append(request, delta, step, deltas)

    def _finish_choice(self, output: ChildOutput, request: OpenRequest, reason: str, step: ProcessedStep) -> None:
        del self._choices[output.engine_id]
        if output.finish_reason is None:
            step.aborts.append(output.engine_id)
        request.num_running -= 1
        if request.num_running == 0:
            request.finish_reason = reason
            del self._requests[request.key]
            step.finished.append(request)

    def _append(
        self, request: OpenRequest, delta: CompletionDelta, step: ProcessedStep, deltas: dict[str, RequestDelta]
    ) -> None:
        new = RequestDelta(
            request_id=request.request_id,
            deltas=[delta],
            num_cached_tokens=request.num_cached_tokens,
            finished=request.num_running == 0,
        )
        if request.key in deltas:
            deltas[request.key].extend(new)
        else:
            deltas[request.key] = new
            step.deltas.append((request, new))

    def _fail(self, request: OpenRequest, message: str, step: ProcessedStep) -> None:
        request.finish_reason = "error"
        step.aborts += self.close(request)
        step.failures.append((request, message))
        step.finished.append(request)


class _Choice:
    """One of the n choices: token ids in, text that is safe to show out."""

    def __init__(
        self, index: int, params: SamplingParams, prompt_token_ids: Sequence[int], tokenizer: Tokenizer
    ) -> None:
        self._index = index
        self._params = params
        self._num_tokens = 0
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_token_ids, skip_special_tokens=params.skip_special_tokens
        )
        self._matcher = (
            StopStringMatcher(params.stop, include_in_output=params.include_stop_str_in_output) if params.stop else None
        )

    def push(self, output: ChildOutput) -> CompletionDelta:
        """The delta of one step. A stop string ends it at the token that completed the string."""
        delta = CompletionDelta(index=self._index, logprobs=[] if self._params.logprobs is not None else None)
        # A "stop" of the engine is always a token's doing: that token is counted, and shown only on request.
        hide_last = output.finish_reason == "stop" and not self._params.include_stop_str_in_output
        for position, token_id in enumerate(output.token_ids):
            self._num_tokens += 1
            delta.token_ids.append(token_id)
            if delta.logprobs is not None and output.logprobs is not None:
                delta.logprobs.append(output.logprobs[position])
            hidden = hide_last and position == len(output.token_ids) - 1
            if not hidden and self._scan(self._detokenizer.push((token_id,)), delta):
                return delta
        if output.finish_reason is not None and not self._scan(self._detokenizer.finish(), delta):
            delta.text += self._matcher.finish() if self._matcher else ""
            delta.finish_reason = output.finish_reason
            delta.stop_reason = output.stop_reason
        return delta

    def _scan(self, text: str, delta: CompletionDelta) -> bool:
        """Append `text` as far as no stop string can begin in it; True if one was completed."""
        # Stop strings count only after min_tokens, as in vLLM: until then text passes by the matcher.
        if self._matcher is None or self._num_tokens <= self._params.min_tokens:
            delta.text += text
            return False
        scan = self._matcher.push(text)
        delta.text += scan.text
        if scan.matched is None:
            return False
        delta.finish_reason = "stop"
        delta.stop_reason = scan.matched
        return True


def _child_seed(seed: int, index: int) -> int:
    """The request's own seed for the first choice, and for the others one that no neighbouring seed leads to."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
