"""aios_sched's Engine, addressed in the messages of this package: the same for the offline and the async engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aios_kvcache.page_recorder import PageRecorder
from aios_sched.request import Request
from aios_serve.messages import ChildOutput, Outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aios_model.sampling.rows import TokenLogprobs
    from aios_sched.engine import Engine
    from aios_sched.output import TokenOutput
    from aios_sched.stats import EngineStats, RequestTiming, StepStats
    from aios_serve.messages import AddRequest, ChildRequest


class EnginePort:
    """Adds whole requests (all their choices or none) and returns each step as one message.

    Args:
        engine: Plans and runs steps.
        step_tokens: Listens to it.
        reset_prefix_cache: Forgets cached prefixes; False if pages of them are in use.
        request_timeout: Seconds from its arrival after which any request ends; None never.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        step_tokens: StepTokenCounter,
        reset_prefix_cache: Callable[[], bool],
        request_timeout: float | None = None,
    ) -> None:
        self._engine = engine
        self._step_tokens = step_tokens
        self._reset_prefix_cache = reset_prefix_cache
        self._request_timeout = request_timeout
        self._silent: dict[str, Request] = {}  # requests without an output so far

    @property
    def has_unfinished(self) -> bool:
        """Whether a step would do anything."""
        return self._engine.has_unfinished

    def record_pages(self, *, max_events: int) -> PageRecorder:
        """Remembers what happens to KV pages from now on, the last `max_events` events."""
        return PageRecorder(self._engine.block_manager, max_events=max_events)

    def add(self, message: AddRequest) -> None:
        """Queue every choice of a request.

        Raises:
            InvalidRequestError, QueueFullError, ...: what the scheduler says; none of the choices is queued then.
        """
        added: list[str] = []
        try:
            for child in message.children:
                request = _request(message, child, deadline=self._deadline(message))
                self._engine.add(request)
                self._silent[child.engine_id] = request
                added.append(child.engine_id)
        except Exception:
            self.abort(added)
            raise

    def _deadline(self, message: AddRequest) -> float | None:
        """The request's own, or what the server allows, whichever comes first."""
        if self._request_timeout is None:
            return message.deadline
        latest = message.arrival_time + self._request_timeout
        return latest if message.deadline is None else min(latest, message.deadline)

    def abort(self, engine_ids: Sequence[str]) -> None:
        """Stop these choices; unknown ids are fine."""
        for engine_id in engine_ids:
            self._silent.pop(engine_id, None)
        self._engine.abort(engine_ids)

    def step(self) -> Outputs:
        """Run one step."""
        outputs = [self._child_output(output) for output in self._engine.step()]
        return Outputs(outputs=outputs, stats=self._engine.stats(), num_tokens=self._step_tokens.take())

    def check(self) -> None:
        """Raises ExecutorLostError if no step can run any more."""
        self._engine.check()

    def stats(self) -> EngineStats:
        """The engine's counters."""
        return self._engine.stats()

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False if running requests hold pages of them."""
        return self._reset_prefix_cache()

    def _child_output(self, output: TokenOutput) -> ChildOutput:
        first = self._silent.pop(output.request_id, None)
        return ChildOutput(
            engine_id=output.request_id,
            token_ids=output.token_ids,
            logprobs=_logprobs(output.logprobs),
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
            num_cached_tokens=output.num_cached_tokens,
            error=output.error,
            scheduled_time=None if first is None else first.first_scheduled_time,
        )


class StepTokenCounter:
    """Listens to the engine for how many tokens its steps computed, which its own counters do not tell."""

    def __init__(self) -> None:
        self._num_tokens = 0

    def on_step(self, stats: StepStats) -> None:
        """See StatsListener."""
        self._num_tokens += stats.num_tokens

    def on_finished(self, timing: RequestTiming) -> None:
        """See StatsListener."""

    def take(self) -> int:
        """Tokens since the last call."""
        num_tokens, self._num_tokens = self._num_tokens, 0
        return num_tokens


def _request(message: AddRequest, child: ChildRequest, *, deadline: float | None) -> Request:
    return Request(
        request_id=child.engine_id,
        prompt_token_ids=message.prompt_token_ids,
        params=message.params,
        seed=child.seed,
        eos_token_ids=message.eos_token_ids,
        arrival_time=message.arrival_time,
        priority=message.priority,
        cache_salt=message.cache_salt,
        tenant=message.tenant,
        deadline=deadline,
    )


def _logprobs(entries: Sequence[TokenLogprobs | None]) -> list[TokenLogprobs] | None:
    kept = [entry for entry in entries if entry is not None]
    return kept or None
