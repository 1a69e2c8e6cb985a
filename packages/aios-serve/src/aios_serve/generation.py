"""Driving the engine for one HTTP request: several prompts at once, whole answers, and clients that go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from aios_sched.request import DEFAULT_TENANT
from aios_serve.error_responses import ClientDisconnectedError
from aios_serve.openai_responses import PromptTokensDetails, Usage
from aios_serve.request_identity import prompt_seed

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive

    from aios_model.sampling.params import SamplingParams
    from aios_model.sampling.rows import TokenLogprobs
    from aios_serve.async_engine import AsyncEngine
    from aios_serve.outputs import CompletionDelta, RequestDelta

Result = TypeVar("Result")


class Meter(Protocol):
    """Is told what a job takes, and may refuse it: a tenant's `Visit`."""

    def reserve(self, *, num_prompt_tokens: int, max_tokens: int, num_choices: int) -> None:
        """Set aside what the job may take at most; ApiError if that is more than there is."""
        ...

    def note_start(self) -> None:
        """The engine is given the prompts."""
        ...

    def note_tokens(self, num_tokens: int, *, prompt_index: int, num_cached_tokens: int) -> None:
        """A choice gained tokens; of its prompt, that many were cached."""
        ...

    def note_failure(self) -> None:
        """The job failed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationJob:
    """What one HTTP request asks of the engine: each prompt with its parameters, `n` choices of each.

    Choices are numbered through: choice j of prompt i has index `i * n + j` in the answer.

    `default_seed` seeds parameters that bring none, each prompt differently; None leaves that to the engine.
    """

    request_id: str
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    session: str = ""
    tenant: str = DEFAULT_TENANT
    tenant_weight: float = 1.0
    meter: Meter | None = None
    deadline: float | None = None
    default_seed: int | None = None

    @property
    def num_choices(self) -> int:
        """Choices in the answer, over all prompts."""
        return len(self.prompts) * self.params.n

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(prompt) for prompt in self.prompts)

    def check(self, engine: AsyncEngine) -> None:
        """Refuse what the engine would refuse, before anything runs or is sent."""
        for prompt in self.prompts:
            engine.check_request(prompt, self.params)

    def reserve(self) -> None:
        """Have the meter set aside what this may take. The last check: what it takes must be given back afterwards."""
        if self.meter is not None:
            max_tokens = self.params.max_tokens or 0
            self.meter.reserve(
                num_prompt_tokens=self.num_prompt_tokens, max_tokens=max_tokens, num_choices=self.num_choices
            )

    async def run(self, engine: AsyncEngine) -> AsyncGenerator[ChoiceDelta]:
        """Generate, yielding what choices gain as they gain it. Closing the generator aborts what still runs."""
        if self.meter is not None:
            self.meter.note_start()
        try:
            async with aclosing(self._run(engine)) as deltas:
                async for delta in deltas:
                    self._measure(delta)
                    yield delta
        except Exception:
            if self.meter is not None:
                self.meter.note_failure()
            raise

    def _measure(self, delta: ChoiceDelta) -> None:
        if self.meter is not None:
            self.meter.note_tokens(
                len(delta.gained.token_ids), prompt_index=delta.prompt_index, num_cached_tokens=delta.num_cached_tokens
            )

    async def _run(self, engine: AsyncEngine) -> AsyncGenerator[ChoiceDelta]:
        streams = [self._stream(engine, index) for index in range(len(self.prompts))]
        async with aclosing(_merge(streams)) as merged:
            async for prompt_index, delta in merged:
                for gained in delta.deltas:
                    yield ChoiceDelta(
                        index=prompt_index * self.params.n + gained.index,
                        prompt_index=prompt_index,
                        gained=gained,
                        num_cached_tokens=delta.num_cached_tokens,
                    )

    def _stream(self, engine: AsyncEngine, index: int) -> AsyncIterator[RequestDelta]:
        request_id = self.request_id if len(self.prompts) == 1 else f"{self.request_id}-{index}"
        return engine.generate(
            self.prompts[index],
            self._seeded_params(index),
            request_id=request_id,
            priority=self.priority,
            cache_salt=self.cache_salt,
            session=self.session,
            tenant=self.tenant,
            tenant_weight=self.tenant_weight,
            deadline=self.deadline,
        )

    def _seeded_params(self, index: int) -> SamplingParams:
        if self.default_seed is None or self.params.seed is not None:
            return self.params
        return replace(self.params, seed=prompt_seed(self.default_seed, index))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceDelta:
    """What one choice gained: `index` counts over the whole answer, `gained.index` within its prompt."""

    index: int
    prompt_index: int
    gained: CompletionDelta
    num_cached_tokens: int


@dataclass(slots=True)
class Choice:
    """One choice of a whole answer, put together from its deltas."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class UsageCounter:
    """Counts the tokens of a job as its deltas come in."""

    def __init__(self, num_prompt_tokens: int) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._num_completion_tokens = 0
        self._num_cached_tokens: dict[int, int] = {}

    def add(self, delta: ChoiceDelta) -> None:
        """Count one delta."""
        self._num_completion_tokens += len(delta.gained.token_ids)
        self._num_cached_tokens[delta.prompt_index] = delta.num_cached_tokens

    def usage(self) -> Usage:
        """The usage so far."""
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_completion_tokens,
            total_tokens=self._num_prompt_tokens + self._num_completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._num_cached_tokens.values())),
        )


async def collect(deltas: AsyncGenerator[ChoiceDelta], num_choices: int, counter: UsageCounter) -> list[Choice]:
    """Read `deltas` to the end and return the whole choices, in order."""
    choices = [Choice(index) for index in range(num_choices)]
    pieces: list[list[str]] = [[] for _ in choices]
    async with aclosing(deltas):
        async for delta in deltas:
            counter.add(delta)
            choice, gained = choices[delta.index], delta.gained
            pieces[delta.index].append(gained.text)
            choice.token_ids += gained.token_ids
            choice.logprobs.extend(gained.logprobs or ())
            choice.finish_reason = gained.finish_reason or choice.finish_reason
            choice.stop_reason = gained.stop_reason if gained.stop_reason is not None else choice.stop_reason
    for choice in choices:
        choice.text = "".join(pieces[choice.index])
    return choices


async def unless_disconnected(request: Request, work: Awaitable[Result]) -> Result:
    """Await `work`, but cancel it as soon as the client goes away, so that its pages are freed.

    Raises:
        ClientDisconnectedError: the client went away first.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnectedError
    finally:
        await cancel_and_wait(task, gone)


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has gone away. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel_and_wait(*tasks: asyncio.Future) -> None:
    """Cancel what still runs of `tasks` and wait until all have ended, whatever they raise."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _merge(streams: Sequence[AsyncIterator[RequestDelta]]) -> AsyncGenerator[tuple[int, RequestDelta]]:
    """Interleave `streams` as they produce, each item with the index of its stream. The first error ends all."""
    if len(streams) == 1:
        async with aclosing(cast("AsyncGenerator[RequestDelta]", streams[0])) as stream:
            async for delta in stream:
                yield 0, delta
        return
    # One item per stream may wait here: what is not fetched coalesces inside the engine.
    queue: asyncio.Queue[tuple[int, RequestDelta] | Exception | None] = asyncio.Queue(maxsize=len(streams))

    async def pump(index: int) -> None:
        try:
            async with aclosing(cast("AsyncGenerator[RequestDelta]", streams[index])) as stream:
                async for delta in stream:
                    await queue.put((index, delta))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    pumps = [asyncio.create_task(pump(index)) for index in range(len(streams))]
    num_open = len(pumps)
    try:
        while num_open:
            item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        await cancel_and_wait(*pumps)
