"""A scripted engine in the place of AsyncEngine, and two ways to talk to the application in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from aios_model.errors import ChatTemplateError
from aios_model.generation_config import GenerationDefaults
from aios_model.sampling.params import SamplingParams
from aios_sched.stats import EngineStats
from aios_serve.admission import AdmissionLimits
from aios_serve.app import create_app
from aios_serve.async_engine import EngineListener, EngineState
from aios_serve.config import EngineConfig
from aios_serve.errors import EngineDeadError, EngineDrainingError, EngineLoadingError
from aios_serve.model_info import EngineInfo
from aios_serve.outputs import CompletionDelta, RequestDelta
from aios_serve.server_config import ServerConfig

VOCAB_SIZE = 300
MAX_MODEL_LEN = 256


class ByteTokenizer:
    """One token per byte of UTF-8; 256 begins a text, 257 ends one. Its template writes `<role>text` per message."""

    bos_token_id = 256
    eos_token_ids = (257,)
    vocab_size = 258
    has_chat_template = True
    special_token_ids = frozenset({256, 257})

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [self.bos_token_id] * add_special_tokens + list(text.encode())

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        if any(message["content"] == "refuse me" for message in messages):
            raise ChatTemplateError("the template does not like this")
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return (
            text
            + "".join(f"[{name}={value}]" for name, value in kwargs.items())
            + "<assistant>" * add_generation_prompt
        )

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        return self.encode(self.apply_chat_template(messages, **kwargs), add_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


@dataclass(frozen=True)
class Logprob:
    """Shaped as aios_model's TokenLogprobs."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass
class Call:
    """What `generate` was called with."""

    prompt: list[int]
    params: SamplingParams
    request_id: str
    priority: int
    cache_salt: str
    session: str
    tenant: str
    deadline: float | None


@dataclass
class ScriptedEngine:
    """AsyncEngine's interface over a script: every choice of every request gains `pieces`, one delta each.

    `hold` is an index: before yielding that piece the request waits for `go`, or for the end of `drain`. `error` is
    raised in place of piece number `error_at`. Loading takes `load_seconds` and ends with `load_error`, if given.
    """

    config: EngineConfig = field(default_factory=EngineConfig)
    state: EngineState = EngineState.READY
    state_detail: str = ""
    healthy: bool = True
    pieces: list[str] = field(default_factory=lambda: ["Hel", "lo", "!"])
    finish_reason: str = "stop"
    stop_reason: int | str | None = None
    error: Exception | None = None
    error_at: int = 0
    hold: int | None = None
    num_cached_tokens: int = 2
    generation_defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    calls: list[Call] = field(default_factory=list)
    num_open_requests: int = 0
    aborted: list[str] = field(default_factory=list)
    listeners: list[EngineListener] = field(default_factory=list)
    model_names: tuple[str, ...] = ("org/tiny", "tiny")
    tokenizer: ByteTokenizer = field(default_factory=ByteTokenizer)
    vocab_size: int = VOCAB_SIZE
    max_model_len: int = MAX_MODEL_LEN
    load_seconds: float = 0.0
    load_error: Exception | None = None
    num_restarts: int = 0
    num_moved_requests: int = 0

    def __post_init__(self) -> None:
        self.go = asyncio.Event()
        self.held = asyncio.Event()
        self.gave_up = False

    async def start(self) -> None:
        self.state, self.state_detail = EngineState.LOADING, "loading weights 41%"

    async def wait_ready(self) -> None:
        await asyncio.sleep(self.load_seconds)
        if self.load_error:
            self.state = EngineState.DEAD
            raise self.load_error
        self.state = EngineState.READY

    async def drain(self, timeout: float) -> bool:
        self.state = EngineState.DRAINING
        for _ in range(int(timeout / 0.01)):
            if not self.num_open_requests:
                return True
            await asyncio.sleep(0.01)
        self.gave_up = True
        self.go.set()
        return False

    async def shutdown(self) -> None:
        self.state = EngineState.DEAD

    @property
    def model_name(self) -> str:
        return self.model_names[0]

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            model_name=self.model_name,
            architecture="llama",
            dtype="float32",
            quantization="none",
            kernels="torch computes plain weights, as the reference",
            kv_dtype="float32",
            device="cpu",
            vocab_size=VOCAB_SIZE,
            num_weight_bytes=538_000_000,
            kv_cache_policy="paged",
            num_blocks=100,
            block_size=16,
            num_kv_bytes=7_000_000,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=64,
            max_num_batched_tokens=256,
            enable_prefix_caching=True,
            threads=2,
            import_seconds=2.0,
            load_seconds=1.0,
        )

    @property
    def replicas(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(num_restarts=self.num_restarts, stats=self.stats(), info=self.info, state=self.state)
            for _ in range(self.config.data_parallel)
        ]

    def is_healthy(self) -> bool:
        return self.healthy and self.state in (EngineState.READY, EngineState.DRAINING)

    def stats(self) -> EngineStats | None:
        if self.state is EngineState.LOADING:
            return None
        return EngineStats(
            num_running=3,
            num_waiting=4,
            kv_cache_usage=0.5,
            prefix_cache_queries=100,
            prefix_cache_hits=60,
            num_preemptions=1,
            prompt_tokens=1000,
            generation_tokens=2000,
            num_steps=10,
            num_failed_steps=0,
            schedule_seconds=0.1,
            step_seconds=1.0,
            num_drafts=30,
            num_draft_tokens=90,
            num_accepted_tokens=70,
        )

    def subscribe(self, listener: EngineListener) -> None:
        self.listeners.append(listener)

    def check_request(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        if self.state is EngineState.LOADING:
            raise EngineLoadingError("loading")
        if self.state is EngineState.DRAINING:
            raise EngineDrainingError("draining")
        if self.state is EngineState.DEAD:
            raise EngineDeadError("dead")
        limits = AdmissionLimits(
            vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN, max_logprobs=self.config.max_logprobs
        )
        limits.check(prompt_token_ids, params)

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        session: str = "",
        tenant: str = "default",
        deadline: float | None = None,
    ) -> AsyncIterator[RequestDelta]:
        self.check_request(prompt_token_ids, params)
        assert request_id is not None
        self.calls.append(
            Call(list(prompt_token_ids), params, request_id, priority, cache_salt, session, tenant, deadline)
        )
        self.num_open_requests += 1
        finished = False
        try:
            for number in range(len(self.pieces)):
                if self.hold == number:
                    self.held.set()
                    await self.go.wait()
                if self.error is not None and self.error_at == number:
                    finished = True
                    raise self.error
                if self.gave_up:
                    finished = True
                    yield self._aborted(params, request_id)
                    return
                await asyncio.sleep(0)
                yield self._delta(number, params, request_id)
            finished = True
        finally:
            self.num_open_requests -= 1
            if not finished:
                self.aborted.append(request_id)

    def _delta(self, number: int, params: SamplingParams, request_id: str) -> RequestDelta:
        last = number == len(self.pieces) - 1
        return RequestDelta(
            request_id=request_id,
            deltas=[self._choice(index, number, params, last=last) for index in range(params.n)],
            num_cached_tokens=self.num_cached_tokens,
            finished=last,
        )

    def _aborted(self, params: SamplingParams, request_id: str) -> RequestDelta:
        deltas = [CompletionDelta(index=index, finish_reason="abort") for index in range(params.n)]
        return RequestDelta(request_id=request_id, deltas=deltas, num_cached_tokens=0, finished=True)

    def _choice(self, index: int, number: int, params: SamplingParams, *, last: bool) -> CompletionDelta:
        text = self.pieces[number]
        token_ids = list(text.encode()) or [0xC3]
        logprobs = None
        if params.logprobs is not None:
            top = tuple((token, -float(token)) for token in range(65, 65 + params.logprobs))
            logprobs = [Logprob(token, float("-inf") if token == ord("!") else -0.5, 1, top) for token in token_ids]
        return CompletionDelta(
            index=index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,  # type: ignore[arg-type]
            finish_reason=self.finish_reason if last else None,
            stop_reason=self.stop_reason if last else None,
        )


class Connection:
    """One request to an ASGI application, whose answer is seen as it comes and whose client can go away."""

    def __init__(self, app: Any, path: str, body: bytes, headers: Mapping[str, str]) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.chunks: list[bytes] = []
        self._changed = asyncio.Condition()
        self._to_read = [{"type": "http.request", "body": body, "more_body": False}]
        self._gone = asyncio.Event()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("test", 80),
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._to_read:
            return self._to_read.pop()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        async with self._changed:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            elif message["body"]:
                self.chunks.append(message["body"])
            self._changed.notify_all()

    async def wait_for_chunks(self, count: int) -> None:
        """Wait until `count` pieces of the body have come."""
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(lambda: len(self.chunks) >= count), 5)

    async def disconnect(self) -> None:
        """Go away, and wait until the application is done."""
        self._gone.set()
        await asyncio.wait_for(self.task, 5)

    async def finish(self) -> None:
        """Wait until the application is done."""
        await asyncio.wait_for(self.task, 5)


@pytest.fixture
async def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def server_config() -> ServerConfig:
    return ServerConfig()


@pytest.fixture
def make_client(engine: ScriptedEngine) -> Callable[..., httpx.AsyncClient]:
    """A client for the application with the given options of ServerConfig."""

    def make(**options: Any) -> httpx.AsyncClient:
        app = create_app(engine, ServerConfig(**options))  # type: ignore[arg-type]
        return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")

    return make


@pytest.fixture
def client(make_client: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    return make_client()


@pytest.fixture
def connect(engine: ScriptedEngine) -> Callable[..., Connection]:
    """Open a connection that can be watched and broken: `connect(path, json, **options of ServerConfig)`."""

    def make(path: str, body: object, **options: Any) -> Connection:
        app = create_app(engine, ServerConfig(**options))  # type: ignore[arg-type]
        return Connection(app, path, json.dumps(body).encode(), {"content-type": "application/json"})

    return make
