"""The life of the server process: bind, answer 503 while loading, serve, drain, leave."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING

import uvicorn

from aios_model.errors import AiosError
from aios_serve.answers.plan import describe_formats
from aios_serve.app import create_app
from aios_serve.async_engine import AsyncEngine
from aios_serve.errors import EngineDeadError
from aios_serve.listen import bind
from aios_serve.startup_report import show_listening, show_progress, show_ready
from aios_serve.tenants.registry import TenantRegistry
from aios_serve.tenants.watcher import TenantsWatcher

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from types import FrameType

    from rich.console import Console

    from aios_serve.config import EngineConfig
    from aios_serve.listen import Address
    from aios_serve.server_config import ServerConfig

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 5
"""After draining, how long the last bytes may take to reach slow clients."""


def run_server(engine_config: EngineConfig, config: ServerConfig, *, console: Console) -> int:
    """Serve until told to stop; returns the exit status of the process.

    Raises:
        ConfigError: the file of tenants cannot be used.
        BindError: the address cannot be listened on. Nothing has been loaded in either case.
    """
    registry = TenantRegistry.of(config, engine_config)
    listener, address = bind(config)
    try:
        with listener:
            return asyncio.run(_Server(AsyncEngine(engine_config), config, registry, console).serve(listener, address))
    finally:
        if config.uds:
            config.uds.unlink(missing_ok=True)


class _Server:
    """One run of the server on one event loop."""

    def __init__(self, engine: AsyncEngine, config: ServerConfig, registry: TenantRegistry, console: Console) -> None:
        self._engine = engine
        self._config = config
        self._registry = registry
        self._console = console
        self._http = _SignalledServer(_uvicorn_config(engine, config, registry), self._on_signal)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._told_to_stop = False
        self._status = 0

    async def serve(self, listener: socket.socket, address: Address) -> int:
        """Serve on `listener`; returns the exit status."""
        self._loop = asyncio.get_running_loop()
        show_listening(address, self._console)
        await self._engine.start()
        tasks = [asyncio.create_task(self._load(address)), *self._watch_tenants()]
        try:
            await self._http.serve(sockets=[listener])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._engine.shutdown()
        return self._status

    def _watch_tenants(self) -> list[asyncio.Task[None]]:
        """Read the file of tenants again when it changes, and on SIGHUP, which ends a server without such a file."""
        if self._registry.path is None:
            return []
        watcher = TenantsWatcher(self._registry, self._registry.path)
        with suppress(AttributeError, NotImplementedError, RuntimeError):  # Windows; not the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, watcher.reload_now)
        return [asyncio.create_task(watcher.run())]

    async def _load(self, address: Address) -> None:
        """Show progress until the engine is ready; end the server if it cannot be."""
        progress = asyncio.create_task(show_progress(self._engine, self._console))
        try:
            await self._engine.wait_ready()
            await progress
        except Exception as error:
            if not self._told_to_stop:
                _log_failure(error)
                self._status = 1
                self._http.should_exit = True
            return
        finally:
            progress.cancel()
        formats = describe_formats(self._engine.tokenizer, self._config)
        show_ready(self._engine, address, self._console, needs_key=self._config.needs_key, formats=formats)
        for name in self._registry.models_not_served(self._engine.model_names):
            logger.warning("tenants may use the model %r, which is not served here", name)

    def _on_signal(self, signal_number: int) -> None:
        """Called in a signal handler, between any two bytecodes: do no more than wake the loop, or leave."""
        if self._told_to_stop:
            os.write(2, b"aios-serve: told a second time, leaving at once\n")
            if self._config.uds:
                self._config.uds.unlink(missing_ok=True)
            os._exit(128 + signal_number)  # the engine process leaves when it finds its socket closed
        self._told_to_stop = True
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        """Take nothing new, let running requests finish or abort them after the timeout, then stop listening."""
        num_open, timeout = self._engine.num_open_requests, self._config.shutdown_timeout
        if num_open:
            logger.info("shutting down: %d requests may finish within %g s; again to leave at once", num_open, timeout)
        else:
            logger.info("shutting down")
        if not await self._engine.drain(timeout):
            logger.warning("requests that had not finished within %g s were aborted", timeout)
        self._http.should_exit = True


def _log_failure(error: Exception) -> None:
    """Say why there will be no server: in one line if the error speaks for itself, else with its traceback."""
    if isinstance(error, EngineDeadError):
        return  # the engine's supervisor has said so
    if isinstance(error, AiosError):
        logger.error("%s", error)
    else:
        logger.error("loading failed", exc_info=error)


class _SignalledServer(uvicorn.Server):
    """uvicorn, but what SIGINT and SIGTERM mean is decided by us: it would stop listening at once."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[int], None]) -> None:
        super().__init__(config)
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Replaces uvicorn's handler."""
        self._on_signal(sig)


def _uvicorn_config(engine: AsyncEngine, config: ServerConfig, registry: TenantRegistry) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(engine, config, registry),
        lifespan="off",
        log_config=None,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=FLUSH_SECONDS,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
    )
