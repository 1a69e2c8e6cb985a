"""AsyncEngine: many requests at once on one engine or several, each in a process of its own. Never imports torch."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

from aios_model.sampling.bad_words import resolve_bad_words
from aios_sched.request import DEFAULT_TENANT
from aios_sched.routing.router import ROUTING_POLICIES, Router
from aios_serve.admission import AdmissionLimits, check_room
from aios_serve.dispatcher import WAIT_SECONDS, Dispatcher
from aios_serve.engine_client import ProcessClient, ThreadClient
from aios_serve.engine_process import build_with_progress, serve
from aios_serve.listener import EngineListener
from aios_serve.output_processor import OutputProcessor
from aios_serve.replica_config import replica_environment
from aios_serve.replica_set import ReplicaSet
from aios_serve.request_desk import RequestDesk
from aios_serve.served_model import ServedModel, find_model
from aios_serve.structured.checker import GrammarChecker, check_can_end
from aios_serve.supervisor import EngineState, EngineSupervisor

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from aios_model.generation_config import GenerationDefaults
    from aios_model.sampling.params import SamplingParams
    from aios_model.tokenizer.tokenizer import Tokenizer
    from aios_model.weights.hub import ModelFiles
    from aios_sched.stats import EngineStats
    from aios_serve.config import EngineConfig
    from aios_serve.engine_client import EngineClient
    from aios_serve.errors import EngineUnavailableError
    from aios_serve.messages import Event
    from aios_serve.model_info import EngineInfo
    from aios_serve.outputs import RequestDelta
    from aios_serve.restart_budget import RestartBudget

__all__ = ["AsyncEngine", "EngineListener", "EngineState"]


class AsyncEngine:
    """Many requests at once on one engine, or on `config.data_parallel` of them that serve the same model.

    Life: `start()` → state "loading" → "ready" → `drain()` → "draining" → `shutdown()` → "dead". An engine that crashes
    or hangs is started again: "restarting" → "ready". One that fails at its first start, or too often, is "dead", and
    `state_detail` says why. All methods belong to the event loop that called `start()`.

    Args:
        config: The options.
        new_client: Makes a connection to an engine, given its number, that is not started yet; None starts a process
            or a thread, as `config.engine_process` says.
        find: Resolves the configured model to files.
        read: Reads tokenizer, shape and defaults from these files.
        new_budget: How often and how soon an engine is restarted; None reads `config.max_engine_restarts`.
        wait_seconds: How long a request that lost its engine before it had an output waits for another one.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        new_client: Callable[[int], EngineClient] | None = None,
        find: Callable[[EngineConfig], ModelFiles] = find_model,
        read: Callable[[EngineConfig, ModelFiles], ServedModel] = ServedModel.read,
        new_budget: Callable[[], RestartBudget] | None = None,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        self._config = config
        self._replicas = ReplicaSet(
            config,
            new_client=new_client or _clients(config),
            find=find,
            read=read,
            listener=self,
            new_budget=new_budget,
        )
        policy = "round-robin" if config.data_parallel == 1 else config.data_parallel_routing  # the cheapest will do
        router = Router(ROUTING_POLICIES[policy])
        self._dispatcher = Dispatcher(router, self.replicas, wait_seconds=wait_seconds)
        self._desk: RequestDesk | None = None
        self._grammars = GrammarChecker(
            lambda: self._replicas.model.vocabulary(), timeout=config.structured_outputs_timeout
        )
        self._listeners: list[EngineListener] = []

    @property
    def config(self) -> EngineConfig:
        """The options as given."""
        return self._config

    @property
    def replicas(self) -> Sequence[EngineSupervisor]:
        """The engines one by one."""
        return self._replicas.supervisors

    @property
    def num_moved_requests(self) -> int:
        """Requests that lost their engine before they had an output and were given to another."""
        return self._dispatcher.num_moves

    @property
    def state(self) -> EngineState:
        """Where the engines stand, taken together."""
        return self._replicas.state

    @property
    def state_detail(self) -> str:
        """One line for people: "loading weights 41%", or why the engine is dead. Empty when there is nothing to say."""
        return self._replicas.detail

    @property
    def model_name(self) -> str:
        """The first name under which the model is served. Known at once if configured, else raises until resolved.

        Raises:
            EngineLoadingError: the model's files are not resolved yet.
        """
        return self.model_names[0]

    @property
    def model_names(self) -> tuple[str, ...]:
        """Every name under which the model is served; raises as `model_name` does."""
        return self._config.served_model_name or self._replicas.model.names

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, in this process; raises EngineLoadingError until it is loaded."""
        return self._replicas.model.tokenizer

    @property
    def generation_defaults(self) -> GenerationDefaults:
        """Sampling defaults that come with the model; raises EngineLoadingError until they are read."""
        return self._replicas.model.generation_defaults

    @property
    def vocab_size(self) -> int:
        """Width of the output layer: every token id of a request must be below it. Raises EngineLoadingError early."""
        return self._replicas.model.config.vocab_size

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output, in tokens; raises EngineLoadingError until the engine is ready."""
        return self.info.max_model_len

    @property
    def info(self) -> EngineInfo:
        """The engine as built, of several the one with the shortest context; EngineLoadingError until it is ready."""
        return self._replicas.info

    @property
    def num_open_requests(self) -> int:
        """Requests that are being generated or wait for it, on all engines; `/load` reports it."""
        return 0 if self._desk is None else self._desk.num_open_requests

    def is_healthy(self) -> bool:
        """Whether the engine is ready (or draining), its process lives, and its loop gave a sign of life recently.

        How long a silence may last is decided in `pulse.py`.
        """
        return self._replicas.is_healthy()

    def stats(self) -> EngineStats | None:
        """The latest counters, over all engines; None until one is ready."""
        return self._replicas.stats

    def subscribe(self, listener: EngineListener) -> None:
        """Tell `listener` about steps, tokens and finished requests from now on."""
        self._listeners.append(listener)

    async def start(self) -> None:
        """Begin loading and return at once: resolve files and tokenizer here, spawn the engine, build it there.

        With `config.engine_process` False the engine runs in a thread of this process instead, for debugging.
        What goes wrong is reported by `wait_ready()`.
        """
        self._replicas.start()

    async def wait_ready(self) -> None:
        """Wait until the engine is ready.

        Raises:
            AiosError: what prevented it: ModelNotFoundError, ConfigError, ... if found in this process, and
                EngineDeadError with the reason if the engine process reported it or died.
        """
        await self._replicas.wait_ready()

    def check_request(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Do the checks of `generate()` without generating, so that a route can refuse before it answers.

        Raises:
            InvalidRequestError: empty or too long a prompt, an id outside the output width, too many logprobs, more
                tokens asked for than the context has left (with the numbers). `param` names the field to blame.
            EngineUnavailableError: not ready, draining or dead.
            QueueFullError: as many requests wait as may.
        """
        self._admit(prompt_token_ids, params)

    async def check_structured_outputs(self, params: SamplingParams) -> None:
        """Wait until it is known that the output can be given the form that `params` ask for.

        `generate()` does so too; a route that asks first can refuse before it answers.

        Raises:
            InvalidRequestError: it cannot; `param` names the field to blame.
            QueueFullError: too many wait for the same.
        """
        if params.structured_outputs is not None:
            check_can_end(params, self._replicas.model.eos_token_ids)
            await self._grammars.check_soon(params.structured_outputs)

    async def generate(
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
    ) -> AsyncGenerator[RequestDelta, None]:
        """Generate, yielding what was gained since the last look: steps coalesce if the consumer is slow.

        `params.n` choices are generated side by side, seeded from `params.seed` and their index. `max_tokens=None`
        means what the context has left. The same `request_id` may be open more than once. Leaving the iterator early
        (`aclose()`, cancellation, garbage) aborts the request and frees its pages. An abort from elsewhere ends it
        with finish reason "abort", and the `deadline` (of `time.monotonic()`) with "timeout". With several engines,
        requests of one `session` may be kept together, and one whose engine dies before it had an output goes to
        another. `tenant_weight` is the tenant's share under the policy "fair" from now on, unless
        `config.tenant_weights` lists the tenants.

        Raises, at the first `anext`:
            InvalidRequestError, EngineUnavailableError, QueueFullError: as `check_request` and
                `check_structured_outputs`.
            InvalidRequestError: also, if the scheduling policy knows no such priority or `tenant`.
            QueueFullError: also, before any delta, if the engine's own queue refused it.

        Raises, at any `anext`:
            RequestFailedError: this request failed inside the engine.
            EngineRestartingError, EngineDeadError: the engine died, for now or for good.
        """
        params = self._admit(prompt_token_ids, params)
        await self.check_structured_outputs(params)
        stream = self._requests.stream(
            prompt_token_ids,
            params,
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
            session=session,
            tenant=tenant,
            tenant_weight=tenant_weight,
            deadline=deadline,
        )
        async with aclosing(stream):
            async for delta in stream:
                yield delta

    async def abort(self, request_id: str) -> int:
        """End every open request with exactly this id; returns how many there were."""
        return 0 if self._desk is None else self._desk.abort(request_id)

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes, of every engine; False if requests still hold pages of them."""
        if self.state not in (EngineState.READY, EngineState.DRAINING):
            raise self._replicas.unavailable()
        ready = {number: each for number, each in enumerate(self.replicas) if each.state is EngineState.READY}
        return await self._requests.reset_prefix_cache(ready)

    async def drain(self, timeout: float) -> bool:
        """Take no new requests and wait for the open ones; after `timeout` seconds abort them.

        Returns whether all of them finished by themselves.
        """
        self._replicas.begin_drain()
        return self._desk is None or await self._desk.finish(timeout)

    async def shutdown(self) -> None:
        """End at once, in any state: open requests raise EngineDeadError, engines are told to leave, then made to."""
        self._grammars.close()
        self._dispatcher.stop_moving()
        await self._replicas.shutdown()

    @property
    def _requests(self) -> RequestDesk:
        """The desk opens once the model is read."""
        if self._desk is None:
            model, seed = self._replicas.model, self._config.seed
            processor = OutputProcessor(model.tokenizer, eos_token_ids=model.eos_token_ids, seed=seed)
            self._desk = RequestDesk(processor, self._dispatcher, self._listeners)
        return self._desk

    def _admit(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> SamplingParams:
        if self.state is not EngineState.READY:
            raise self._replicas.unavailable()
        params = resolve_bad_words(params, self.tokenizer)
        AdmissionLimits.of(self.info, max_logprobs=self._config.max_logprobs).check(prompt_token_ids, params)
        if self._config.max_num_queued_reqs is not None:
            room = self.info.max_num_seqs + self._config.max_num_queued_reqs
            num_open, num_engines = self._requests.num_open_choices, self._dispatcher.num_ready
            check_room(params.n, num_open=num_open, room=room, num_engines=num_engines)
        return params

    def on_event(self, replica: int, event: Event) -> None:
        """An engine said something."""
        if self._desk is not None:
            self._desk.receive(replica, event)

    def on_ready(self, replica: int) -> None:
        """An engine takes requests from now on."""
        self._dispatcher.add(replica)

    def on_death(self, replica: int, error: EngineUnavailableError) -> None:
        """An engine does not take requests any more."""
        self._dispatcher.remove(replica)
        if self._desk is not None:
            self._desk.lose(replica, error)


def _clients(config: EngineConfig) -> Callable[[int], EngineClient]:
    """Makes the client of each engine; ConfigError if there are too few GPUs for them."""
    if not config.engine_process:
        return lambda replica: ThreadClient(lambda end: serve(end, build_with_progress))
    environments = [replica_environment(config, replica) for replica in range(config.data_parallel)]
    return lambda replica: ProcessClient(environment=environments[replica])
