"""One model and the engines that serve it: found and read once, loaded by each. Nothing about requests; no torch."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Protocol

from aios_sched.stats import EngineStats
from aios_serve.daemon_thread import in_daemon_thread
from aios_serve.errors import EngineDeadError, EngineLoadingError
from aios_serve.replica_config import replica_config
from aios_serve.served_model import local_config
from aios_serve.supervisor import EngineState, EngineSupervisor, unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from aios_model.weights.hub import ModelFiles
    from aios_serve.config import EngineConfig
    from aios_serve.engine_client import EngineClient
    from aios_serve.errors import EngineUnavailableError
    from aios_serve.messages import Event
    from aios_serve.model_info import EngineInfo
    from aios_serve.restart_budget import RestartBudget
    from aios_serve.served_model import ServedModel


class ReplicaListener(Protocol):
    """Who gives requests to replicas, and is told of them by number."""

    def on_event(self, replica: int, event: Event) -> None:
        """An engine said something."""
        ...

    def on_ready(self, replica: int) -> None:
        """An engine takes requests from now on."""
        ...

    def on_death(self, replica: int, error: EngineUnavailableError) -> None:
        """An engine does not take requests any more."""
        ...


class ReplicaSet:
    """The engines behind one endpoint, and how they stand taken together.

    Args:
        config: The options.
        new_client: Makes the connection to an engine, given its number, that is not started yet.
        find: Resolves the configured model to files, downloading them if need be.
        read: Reads tokenizer, shape and defaults from these files.
        listener: Told of events, of replicas that take requests, and of those that do not any more.
        new_budget: How often each is restarted; None reads `config.max_engine_restarts`.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        new_client: Callable[[int], EngineClient],
        find: Callable[[EngineConfig], ModelFiles],
        read: Callable[[EngineConfig, ModelFiles], ServedModel],
        listener: ReplicaListener,
        new_budget: Callable[[], RestartBudget] | None = None,
    ) -> None:
        self._config = config
        self._find = find
        self._read = read
        self._model: ServedModel | None = None
        self._loading: asyncio.Task[None] | None = None
        self._draining = False
        self._failure = ""
        self._stage = ""
        self._configs = [replica_config(config, index) for index in range(config.data_parallel)]
        self.supervisors = [
            EngineSupervisor(
                each,
                new_client=partial(new_client, index),
                on_event=partial(listener.on_event, index),
                on_ready=partial(listener.on_ready, index),
                on_death=partial(listener.on_death, index),
                name="the engine" if len(self._configs) == 1 else f"engine {index}",
                budget=None if new_budget is None else new_budget(),
            )
            for index, each in enumerate(self._configs)
        ]

    @property
    def model(self) -> ServedModel:
        """The model as this process knows it; EngineUnavailableError until it is read."""
        if self._model is None:
            raise self.unavailable()
        return self._model

    @property
    def info(self) -> EngineInfo:
        """The engine as built, of several the one with the shortest context; EngineUnavailableError until it is."""
        known = [each.info for each in self.supervisors if each.info is not None]
        if not known:
            raise self.unavailable()
        return min(known, key=lambda info: info.max_model_len)

    @property
    def state(self) -> EngineState:
        """Ready as soon as one of them takes requests, and as long as one does."""
        states = {each.state for each in self.supervisors}
        if self._failure or states == {EngineState.DEAD}:
            return EngineState.DEAD
        if self._draining:
            return EngineState.DRAINING
        if self._model is None:
            return EngineState.LOADING
        order = (EngineState.READY, EngineState.LOADING, EngineState.RESTARTING)
        return next(state for state in order if state in states)

    @property
    def detail(self) -> str:
        """One line for people about `state`."""
        state = self.state
        if state is EngineState.DRAINING:
            return "finishing open requests"
        if state is EngineState.READY:
            return ""
        said = (each.detail for each in self.supervisors if each.state is state and each.detail)
        return self._failure or next(said, self._stage)

    @property
    def stats(self) -> EngineStats | None:
        """Counters of all of them; None until one is ready."""
        known = [each.stats for each in self.supervisors if each.stats is not None]
        return EngineStats.total(known) if known else None

    def is_healthy(self) -> bool:
        """Whether one of them could serve: ready, alive, and moving."""
        serving = self.state in (EngineState.READY, EngineState.DRAINING)
        return serving and any(each.is_healthy() for each in self.supervisors)

    def unavailable(self) -> EngineUnavailableError:
        """Why requests are not taken, as an error to raise."""
        return unavailable(self.state, self.detail)

    def start(self) -> None:
        """Begin loading."""
        self._loading = asyncio.get_running_loop().create_task(self._load())
        self._loading.add_done_callback(lambda loading: loading.cancelled() or loading.exception())

    async def wait_ready(self) -> None:
        """Wait until all of them serve for the first time; raises what prevented it."""
        if self._loading is None:
            raise EngineLoadingError("the engine was not started; call start() first")
        try:
            await asyncio.shield(self._loading)
        except asyncio.CancelledError:
            if self._loading.cancelled():
                raise EngineDeadError("the engine was shut down") from None
            raise

    def begin_drain(self) -> None:
        """Take no more requests. What dies from now on stays dead."""
        self._draining = True
        for each in self.supervisors:
            each.retire()

    async def shutdown(self) -> None:
        """End them, whatever they do."""
        self._failure = self._failure or "the engine was shut down"
        if self._loading is not None:
            self._loading.cancel()
        await asyncio.gather(*(each.shutdown() for each in self.supervisors))
        if self._loading is not None:
            await asyncio.wait([self._loading])

    async def _load(self) -> None:
        try:
            self._stage = "finding the model"
            files = await in_daemon_thread(lambda: self._find(self._config))
            self._stage = "starting the engine"
            for each, config in zip(self.supervisors, self._configs, strict=True):
                each.start(local_config(config, files))
            # While the engines import torch:
            self._model = await in_daemon_thread(lambda: self._read(self._config, files))
            await asyncio.gather(*(each.wait_ready() for each in self.supervisors))
        except Exception as error:
            self._failure = str(error) or type(error).__name__
            await asyncio.gather(*(each.shutdown() for each in self.supervisors))
            raise
