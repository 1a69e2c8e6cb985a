"""InferenceEngine: generate for a list of prompts, in this process. The course's own call.

engine = InferenceEngine(model="...", max_batch_size=64, kv_cache_policy="paged")
outputs = engine.generate(["Hello"], SamplingParams(temperature=0, max_tokens=32))
print(outputs[0].outputs[0].text, outputs[0].outputs[0].token_ids)
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from aios_model.errors import ConfigError, InvalidRequestError
from aios_model.sampling.bad_words import resolve_bad_words
from aios_model.sampling.params import SamplingParams
from aios_sched.errors import QueueFullError
from aios_serve.admission import AdmissionLimits
from aios_serve.config import EngineConfig
from aios_serve.engine_process import build_with_progress
from aios_serve.errors import RequestFailedError
from aios_serve.interrupts import deferred_interrupt
from aios_serve.offline_inputs import CheckedPrompt, as_conversations, as_prompts
from aios_serve.output_processor import OutputProcessor
from aios_serve.progress_bar import generation_progress
from aios_serve.served_model import ServedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from aios_kvcache.page_recorder import PageRecorder
    from aios_model.generation_config import GenerationDefaults
    from aios_model.tokenizer.tokenizer import Tokenizer
    from aios_parallel.expert_load import ExpertLoad
    from aios_parallel.tracing.group_tracer import GroupTracer
    from aios_sched.stats import EngineStats
    from aios_serve.assembly import BuiltEngine
    from aios_serve.model_info import EngineInfo
    from aios_serve.offline_inputs import Message, Prompt
    from aios_serve.open_request import OpenRequest
    from aios_serve.outputs import RequestDelta, RequestOutput

logger = logging.getLogger(__name__)


class InferenceEngine:
    """One model, many prompts, all of them batched. Belongs to one thread.

    Args:
        model: Folder, GGUF file or hub id; None is the bundled model.
        max_batch_size: Requests that run at once; the course's word for `max_num_seqs`.
        on_progress: Told what is being done while loading, and how much of it is done (0..1) where that is known.
        options: Any other field of `EngineConfig`, such as `tensor_parallel` or `kv_cache_policy`.

    Raises:
        ConfigError: an option is unknown, out of range, or cannot be honoured.
        ModelError, PoolTooSmallError: from loading; the message says what to do.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        max_batch_size: int | None = None,
        on_progress: Callable[[str, float | None], None] | None = None,
        **options: Any,
    ) -> None:
        config = _offline_config(model, max_batch_size, options)
        built = build_with_progress(config, on_progress or (lambda stage, fraction: None))
        self._setup(config, built, ServedModel.read(config, built.files))

    @classmethod
    def from_built(cls, config: EngineConfig, built: BuiltEngine, served: ServedModel) -> InferenceEngine:
        """An InferenceEngine around an engine that was built, and a model that was read, elsewhere."""
        engine = cls.__new__(cls)
        engine._setup(config, built, served)
        return engine

    def _setup(self, config: EngineConfig, built: BuiltEngine, served: ServedModel) -> None:
        self._built = built
        self._port = built.port
        self._served = served
        self._limits = AdmissionLimits.of(built.info, max_logprobs=config.max_logprobs)
        self._processor = OutputProcessor(served.tokenizer, eos_token_ids=served.eos_token_ids, seed=config.seed)
        self._sinks: dict[str, _Sink] = {}
        self._closed = False

    @property
    def info(self) -> EngineInfo:
        """What was built, and where the memory goes."""
        return self._built.info

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._served.tokenizer

    @property
    def generation_defaults(self) -> GenerationDefaults:
        """Sampling defaults of the model, applied where no params are given."""
        return self._served.generation_defaults

    @property
    def tracer(self) -> GroupTracer | None:
        """Shows where the time of a group of ranks goes, from `start` to `stop`; None where there is one device."""
        return self._built.tracer

    def stats(self) -> EngineStats:
        """The engine's counters."""
        return self._port.stats()

    def record_pages(self, *, max_events: int = 100_000) -> PageRecorder:
        """Remembers what happens to KV pages from now on: who takes and shares them, what is found and evicted.

            with engine.record_pages() as recorder:
                engine.generate(prompts)
            recorder.trace().write(Path("pages.jsonl"))

        Args:
            max_events: How many events to remember, the last ones; a few hundred bytes each.

        Raises:
            ConfigError: `max_events` is below 1.
        """
        return self._port.record_pages(max_events=max_events)

    def expert_load(self) -> ExpertLoad:
        """How many tokens each expert of a mixture was sent so far; empty for models without experts."""
        return self._built.expert_load()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Generate for every prompt, as many at once as fit.

        Args:
            prompts: A text or a list of token ids, or a list of these.
            sampling_params: For all prompts or one for each; None takes the model's defaults.
            progress: Show a bar on stderr.

        Returns:
            One output per prompt, in their order. A request that failed inside the engine has finish reason "error";
            the others are not affected.

        Raises:
            InvalidRequestError: a prompt or its parameters are refused; nothing has been generated then.
            KeyboardInterrupt: Ctrl-C; what was in flight is aborted and the engine can be used again.
        """
        texts = as_prompts(prompts)
        params = self._params_for(len(texts), sampling_params, self._default_params())
        return self._run([self._check(prompt, each) for prompt, each in zip(texts, params, strict=True)], progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """`generate` for a conversation, or a list of them, put through the model's chat template.

        Without params an answer may take what the context has left.

        Raises:
            ChatTemplateError: there is no template, or it refused the messages.
        """
        conversations = as_conversations(messages)
        defaults = self._default_params(max_tokens=None)
        params = self._params_for(len(conversations), sampling_params, defaults)
        checked = []
        for conversation, each in zip(conversations, params, strict=True):
            options = {"tools": tools, **(chat_template_kwargs or {})}
            prompt = self.tokenizer.apply_chat_template(conversation, **options)
            token_ids = self.tokenizer.encode(prompt, add_special_tokens=False)
            checked.append(self._check_ids(token_ids, each, prompt=prompt))
        return self._run(checked, progress)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestDelta]:
        """Generate for one prompt, yielding what is new after each step. Several streams may be read in turn.

        Closing the iterator, or losing it, aborts the request.

        Raises:
            InvalidRequestError: at once, before the first delta is asked for.
            RequestFailedError: the request failed inside the engine.
        """
        return self._stream(self._check(prompt, sampling_params or self._default_params()))

    def close(self) -> None:
        """Abort what is open and let go of the engine. Calling it twice is fine."""
        if not self._closed:
            self._abort(self._processor.open_requests)
            self._closed = True
            self._built.close()

    def __enter__(self) -> InferenceEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _default_params(self, **given: Any) -> SamplingParams:
        defaults = self.generation_defaults
        if defaults.max_new_tokens is not None:
            given.setdefault("max_tokens", defaults.max_new_tokens)
        return SamplingParams.from_optional(given, defaults=defaults)

    def _params_for(
        self, count: int, params: SamplingParams | Sequence[SamplingParams] | None, default: SamplingParams
    ) -> Sequence[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or default] * count
        if len(params) != count:
            raise InvalidRequestError(f"{count} prompts came with {len(params)} sampling_params; give one, or one each")
        return params

    def _check(self, prompt: Prompt, params: SamplingParams) -> CheckedPrompt:
        if isinstance(prompt, str):
            return self._check_ids(self.tokenizer.encode(prompt), params, prompt=prompt)
        return self._check_ids(prompt, params, prompt=None)

    def _check_ids(self, token_ids: Sequence[int], params: SamplingParams, *, prompt: str | None) -> CheckedPrompt:
        if self._closed:
            raise InvalidRequestError("the engine is closed; make a new one")
        params = resolve_bad_words(params, self.tokenizer)
        self._limits.check(token_ids, params)
        return CheckedPrompt(prompt=prompt, token_ids=list(token_ids), params=params)

    def _run(self, checked: Sequence[CheckedPrompt], progress: bool) -> list[RequestOutput]:
        outputs = [each.empty_output(index) for index, each in enumerate(checked)]
        waiting = deque(zip(checked, outputs, strict=True))
        requests: list[OpenRequest] = []
        num_finished = 0  # from the front
        with generation_progress(len(checked), shown=progress) as bar:
            try:
                while num_finished < len(outputs):
                    with deferred_interrupt():
                        self._submit(waiting, requests)
                        self._step()
                    while num_finished < len(outputs) and outputs[num_finished].finished:
                        num_finished += 1
                    bar.update(outputs, last=num_finished == len(outputs))
            finally:
                self._abort(requests)
        return outputs

    def _submit(self, waiting: deque[tuple[CheckedPrompt, RequestOutput]], requests: list[OpenRequest]) -> None:
        """Hand over as many requests as the queue takes; the others wait here."""
        while waiting:
            try:
                requests.append(self._open(*waiting[0]))
            except QueueFullError:
                if not self._port.has_unfinished:
                    raise  # it will never be less full
                return
            waiting.popleft()

    def _stream(self, checked: CheckedPrompt) -> Iterator[RequestDelta]:
        news = _News()
        request = None
        try:
            with deferred_interrupt():
                request = self._open(checked, news)
            finished = False
            while not finished:
                while not news.deltas and news.error is None:
                    with deferred_interrupt():
                        self._step()
                if not news.deltas:
                    raise RequestFailedError(news.error or "", request_id=request.request_id)
                delta = news.deltas.popleft()
                finished = delta.finished
                yield delta
        finally:
            if request is not None:
                self._abort([request])

    def _open(self, checked: CheckedPrompt, sink: _Sink) -> OpenRequest:
        request = self._processor.open(checked.token_ids, checked.params)
        try:
            self._port.add(request.add_request)
        except Exception:
            self._processor.close(request)
            raise
        self._sinks[request.key] = sink
        return request

    def _step(self) -> None:
        """One step of the engine; its news go to whoever asked for them."""
        step = self._processor.process(self._port.step().outputs)
        self._port.abort(step.aborts)
        for request, delta in step.deltas:
            self._sinks[request.key].add(delta)
        for request, message in step.failures:
            logger.error("request %s failed: %s", request.request_id, message)
            self._sinks[request.key].fail(message)
        for request in step.finished:
            del self._sinks[request.key]

    def _abort(self, requests: Iterable[OpenRequest]) -> None:
        """End what still runs of `requests`."""
        for request in requests:
            running = self._processor.close(request)
            if running:
                self._port.abort(running)
                self._sinks.pop(request.key, None)


class _Sink(Protocol):
    """Where the news of one request go."""

    def add(self, delta: RequestDelta) -> None: ...

    def fail(self, message: str) -> None: ...


class _News:
    """The sink of a stream: keeps what nobody has looked at yet."""

    def __init__(self) -> None:
        self.deltas: deque[RequestDelta] = deque()
        self.error: str | None = None

    def add(self, delta: RequestDelta) -> None:
        self.deltas.append(delta)

    def fail(self, message: str) -> None:
        self.error = message


def _offline_config(model: str | None, max_batch_size: int | None, options: dict[str, Any]) -> EngineConfig:
    if max_batch_size is not None:
        if "max_num_seqs" in options:
            raise ConfigError("max_batch_size and max_num_seqs mean the same; give one of them")
        options["max_num_seqs"] = max_batch_size
    if options.get("data_parallel", 1) != 1:
        raise ConfigError(
            f"data_parallel={options['data_parallel']} cannot be used here: an InferenceEngine is one engine in this "
            "process; serve replicas with aios-serve --data-parallel-size or AsyncEngine, or run several processes"
        )
    # A list of prompts is its own queue; nobody is served better by refusing the end of it.
    options.setdefault("max_num_queued_reqs", None)
    return EngineConfig.from_options(model=model, **options)
