"""EngineConfig: every option the engine honours, checked before anything is loaded.

The flags of `aios-serve` and the keyword arguments of `InferenceEngine` are these fields.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_type_hints

from aios_model.errors import ConfigError
from aios_model.native.cores import parse_cpu_list
from aios_quant.schemes.registry import SCHEME_NAMES
from aios_sched.policy.registry import PolicyName
from aios_sched.routing.base import RoutingName
from aios_sched.speculative.config import SpeculativeConfig

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
DType = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Device = Literal["auto", "cpu", "cuda"]
KVCachePolicy = Literal["paged", "contiguous"]
KVCacheDType = Literal["auto", "float32", "bfloat16", "int8", "fp8", "fp8_e4m3"]
PreemptionMode = Literal["auto", "recompute", "swap"]
ExecutorBackend = Literal["auto", "mp", "torchrun", "ray"]
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Options of one engine. None means "decide from the model and the machine" wherever it is allowed.

    Attributes:
        model: Folder, GGUF file, hub id ("org/name", "org/name:file.gguf"), or None / "bundled" for the bundled model.
        tokenizer: Folder, GGUF file or hub id to take the tokenizer from; None takes the model's own.
        revision: Branch, tag or commit on the hub.
        download_dir: Folder for downloads; None uses the hub's cache.
        load_format: Which weights to read; "dummy" draws random ones for a model that has only a config.
        dtype: Type of weights and activations; "auto" is the checkpoint's own on a GPU, and on the CPU what
            `quantization` makes of it, or float32. On the CPU "bfloat16" keeps weights so and computes in float32.
        device: "auto" takes a GPU if there is one.
        seed: Seeds dummy weights and requests that bring no seed of their own; None draws those from the system.
        max_model_len: Longest prompt plus output, in tokens; None takes what the model and the pool allow.
        max_num_seqs: Requests that run at once.
        max_num_batched_tokens: Tokens per step; None is 256 on the CPU, where more would stall running requests for
            seconds, and 2048 on a GPU.
        enable_chunked_prefill: Split prompts over steps. Off, a prompt must fit in one step.
        enable_prefix_caching: Keep pages of finished requests and find them by their tokens.
        block_size: Tokens per page.
        kv_cache_memory_bytes: Size of the pool; None lets `device_memory_utilization` decide.
        num_gpu_blocks_override: Number of pages, whatever the memory; vLLM's name, on the CPU too.
        device_memory_utilization: Share of the memory that is free once the weights are loaded, for the pool. None is
            0.9 on a GPU; on the CPU it is 0.25, and no more than max_num_seqs requests of full length need.
        cpu_offload_gb: GiB of weights, per rank, that stay in host memory: whole layers, streamed to the GPU ahead of
            use; vLLM's name. Steps then take no less than the time to copy them. Not for the CPU.
        kv_cache_policy: "paged", or "contiguous": one reservation of max_model_len per slot, for comparison.
        scheduling_policy: Who is admitted next, and who gives way: "fcfs" by arrival, "priority" by the requests' own
            priorities and their age, "fair" shares between tenants, "prefix" cached prompts first.
        priority_aging_seconds: Seconds of waiting that count like one level of priority; None is 10.
        tenant_weights: Tenants and their shares under "fair": others are refused, but "default" always exists. None:
            every name is a tenant, of the weight that its requests bring, 1 by default.
        request_timeout: Seconds after which a request ends with finish_reason "timeout"; None never. A request may ask
            for less.
        kv_offloading_size: Bytes of host memory, of all ranks together, for pages that the pool has no room for; 0 for
            none. Evicted prefixes and pages of preempted requests go there and come back.
        kv_offloading_disk_size: Bytes of disk below that, for pages that leave host memory; 0 for none.
        kv_offloading_path: Folder for the disk's file, which has no name and vanishes with the process; None takes the
            system's folder for temporary files. Give a real disk: some systems keep temporary files in memory.
        preemption_mode: Whether a preempted request's pages are saved in host memory ("swap") or computed again
            ("recompute"); "auto" does what was measured to be faster. Only with kv_offloading_size.
        speculative: Tokens to guess ahead and check together with the next one: a `SpeculativeConfig`, or its fields in
            a dict or in JSON, such as {"method": "ngram", "num_speculative_tokens": 4}; None guesses nothing. The
            output is the same either way.
        max_num_queued_reqs: Requests that may wait before more are refused; None means any number.
        max_logprobs: Most alternatives per token a request may ask for.
        structured_outputs_timeout: Seconds that a schema, expression or grammar may take to compile.
        served_model_name: Names that requests may use, the first of them in answers; empty uses the checkpoint's name.
        generation_config: "auto" takes sampling defaults from the model, "none" takes none of them (vLLM's word "vllm"
            is accepted), a folder takes its generation_config.json.
        chat_template: Template text, or a file holding it, instead of the model's own.
        threads: Threads on the CPU, of each rank; None takes one per core, within this process's share of them, dealt
            out to ranks and replicas.
        tensor_parallel: Ranks that share each layer: GPUs, or processes on the CPU.
        pipeline_parallel: Stages, each of them a group of `tensor_parallel` ranks that holds some of the layers.
        expert_parallel: Deal the experts of a mixture out to the ranks of a stage, rather than cutting each of them.
        distributed_executor: Who starts the ranks: "mp" this process, on this host; "torchrun", on every host it was
            started on; "ray", on a cluster. "auto" is torchrun under torchrun, else mp.
        ray_address: Of the Ray cluster for `distributed_executor="ray"`, such as "10.0.0.1:6379"; None joins the one
            this host belongs to, or starts one here.
        rank_timeout: Seconds without a sign of life, or of progress with a step, after which a rank counts as lost.
        quantization: Scheme of the weights: "int8", "int4", "fp8", "as-stored" and more (`aios_quant.SCHEME_NAMES`),
            "none" for plain numbers, or "auto": on a CPU the fastest that keeps the quality, see `backend.py`.
        kv_cache_dtype: Numbers in the pages: "float32", "bfloat16", "int8" with a scale per token and head, or "fp8"
            (E4M3, also called "fp8_e4m3"); "auto" is bfloat16 with native kernels and what the model computes with
            elsewhere.
        cpu_bind: Cores that the native kernels' threads are bound to: "none", "auto" (fills one NUMA node before the
            next), or a list such as "0-3,8".
        engine_process: Run the engine in a process of its own (`AsyncEngine` only).
        heartbeat_timeout: Seconds without a sign of life after which the engine counts as stuck and is started again;
            more where a step was seen to take long.
        data_parallel: Engines that serve the same model side by side, each with weights, pages and, on the CPU, an even
            share of the cores of its own (`AsyncEngine` only).
        data_parallel_routing: Which of them gets a request: the one that has computed most of its prompt, unless it is
            far busier; the one with the least to do; always the same for a session; or one after the other.
        max_engine_restarts: Restarts of an engine that died, within ten minutes, before it stays dead; 0 for none.
        log_level: How much the engine process says.
    """

    model: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    download_dir: str | None = None
    load_format: LoadFormat = "auto"
    dtype: DType = "auto"
    device: Device = "auto"
    seed: int | None = 0
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    block_size: int = 16
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    device_memory_utilization: float | None = None
    cpu_offload_gb: float = 0.0
    kv_cache_policy: KVCachePolicy = "paged"
    scheduling_policy: PolicyName = "fcfs"
    priority_aging_seconds: float | None = None
    tenant_weights: dict[str, float] | None = None
    request_timeout: float | None = None
    kv_offloading_size: int = 0
    kv_offloading_disk_size: int = 0
    kv_offloading_path: str | None = None
    preemption_mode: PreemptionMode = "auto"
    speculative: SpeculativeConfig | None = None
    max_num_queued_reqs: int | None = 1024
    max_logprobs: int = 20
    structured_outputs_timeout: float = 5.0
    served_model_name: tuple[str, ...] = ()
    generation_config: str = "auto"
    chat_template: str | None = None
    threads: int | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: bool = False
    distributed_executor: ExecutorBackend = "auto"
    ray_address: str | None = None
    rank_timeout: float = 4.0
    quantization: str = "auto"
    kv_cache_dtype: KVCacheDType = "auto"
    cpu_bind: str = "none"
    engine_process: bool = True
    heartbeat_timeout: float = 30.0
    data_parallel: int = 1
    data_parallel_routing: RoutingName = "prefix-affinity"
    max_engine_restarts: int = 5
    log_level: LogLevel = "info"

    def __post_init__(self) -> None:
        self._normalise()
        self._check_types()
        self._check_choices()
        self._check_ranges()
        self._check_combinations()

    @classmethod
    def from_options(cls, **options: Any) -> EngineConfig:
        """Build from keyword arguments; an unknown one is a ConfigError that names the closest known option."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known options: {', '.join(known)}"
                raise ConfigError(f"unknown engine option {name!r}; {hint}")
        return cls(**options)

    @property
    def num_ranks(self) -> int:
        """Processes that hold the model together."""
        return self.tensor_parallel * self.pipeline_parallel

    def _normalise(self) -> None:
        for name in ("model", "tokenizer", "download_dir", "generation_config", "chat_template", "kv_offloading_path"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                self._set(name, os.fspath(value))
        names = self.served_model_name
        self._set("served_model_name", (names,) if isinstance(names, str) else tuple(names or ()))
        if self.quantization is None:
            self._set("quantization", "none")
        if self.kv_cache_dtype == "fp8_e4m3":
            self._set("kv_cache_dtype", "fp8")
        if self.generation_config == "vllm":
            self._set("generation_config", "none")
        self._set("speculative", read_speculative(self.speculative))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_types(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            kinds = _plain_types(hint)
            if kinds and type(getattr(self, name)) not in kinds:
                wanted = " or ".join(sorted(kind.__name__.replace("NoneType", "None") for kind in kinds))
                raise _bad(name, getattr(self, name), f"it must be {wanted}")
        if not all(isinstance(name, str) and name for name in self.served_model_name):
            raise _bad("served_model_name", self.served_model_name, "every name must be a string that is not empty")
        weights = self.tenant_weights
        if weights is not None and not (isinstance(weights, dict) and all(map(_is_share, weights.items()))):
            raise _bad("tenant_weights", weights, "it must be a dict from names to positive numbers")

    def _check_choices(self) -> None:
        for name, kinds in (
            ("load_format", LoadFormat),
            ("dtype", DType),
            ("device", Device),
            ("kv_cache_policy", KVCachePolicy),
            ("kv_cache_dtype", KVCacheDType),
            ("preemption_mode", PreemptionMode),
            ("distributed_executor", ExecutorBackend),
            ("data_parallel_routing", RoutingName),
            ("scheduling_policy", PolicyName),
            ("log_level", LogLevel),
        ):
            choices = get_args(kinds)
            if getattr(self, name) not in choices:
                raise _bad(name, getattr(self, name), f"choose one of {', '.join(choices)}")
        if self.quantization not in ("auto", *SCHEME_NAMES):
            raise _bad("quantization", self.quantization, f"choose one of auto, {', '.join(SCHEME_NAMES)}")
        if self.cpu_bind not in ("auto", "none"):
            parse_cpu_list(self.cpu_bind)

    def _check_ranges(self) -> None:
        for name, low in (
            ("max_model_len", 1),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("block_size", 1),
            ("kv_cache_memory_bytes", 1),
            ("num_gpu_blocks_override", 1),
            ("kv_offloading_size", 0),
            ("kv_offloading_disk_size", 0),
            ("max_num_queued_reqs", 0),
            ("max_logprobs", 0),
            ("max_engine_restarts", 0),
            ("data_parallel", 1),
            ("threads", 1),
            ("tensor_parallel", 1),
            ("pipeline_parallel", 1),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value < 2**48:
                raise _bad(name, value, f"it must be at least {low}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise _bad("seed", self.seed, "it must be between 0 and 2**63 - 1")
        share = self.device_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise _bad("device_memory_utilization", share, "it is a share above 0 and up to 1, such as 0.9")
        if not 0 <= self.cpu_offload_gb < float("inf"):
            raise _bad("cpu_offload_gb", self.cpu_offload_gb, "it is a number of GiB from 0, such as 4")
        for name in (
            "heartbeat_timeout",
            "rank_timeout",
            "request_timeout",
            "priority_aging_seconds",
            "structured_outputs_timeout",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise _bad(name, value, "it must be a positive number of seconds")

    def _check_combinations(self) -> None:
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise _bad(
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                f"a step must hold one token of each of max_num_seqs={self.max_num_seqs} requests; "
                "raise it or lower max_num_seqs",
            )
        self._check_pool()
        if self.cpu_offload_gb and self.device == "cpu":
            raise _bad(
                "cpu_offload_gb", self.cpu_offload_gb, "on the CPU weights are in host memory already; leave it out"
            )
        self._check_offloading()
        if self.data_parallel > 1 and not self.engine_process:
            raise _bad("data_parallel", self.data_parallel, "each replica is a process; leave engine_process on")

        for name, policy in (("priority_aging_seconds", "priority"), ("tenant_weights", "fair")):
            if getattr(self, name) is not None and self.scheduling_policy != policy:
                raise _bad(name, getattr(self, name), f"it needs scheduling_policy={policy!r}")
        if self.speculative is not None and self.speculative.needs_model and self.num_ranks > 1:
            raise _bad(
                "speculative",
                self.speculative.method,
                "a draft model runs on one device, beside the served one; ranks take 'suffix' or 'ngram'",
            )
        if self.expert_parallel and self.tensor_parallel == 1:
            raise _bad("expert_parallel", True, "experts are dealt out to the tensor_parallel ranks; ask for 2 or more")

    def _check_pool(self) -> None:
        pages, size, length = self.num_gpu_blocks_override, self.block_size, self.max_model_len
        if pages is None:
            return
        if self.kv_cache_memory_bytes is not None:
            raise ConfigError(
                "kv_cache_memory_bytes and num_gpu_blocks_override both size the pool of pages; give one of them"
            )
        if self.kv_cache_policy == "paged" and length is not None and pages * size < length:
            raise _bad(
                "num_gpu_blocks_override",
                pages,
                f"one sequence of max_model_len={length} tokens needs {-(-length // size)} pages of {size} tokens, "
                f"and these hold {pages * size} tokens; give as many pages, or lower max_model_len to {pages * size}",
            )

    def _check_offloading(self) -> None:
        if not self.kv_offloading_size:
            for name in ("kv_offloading_disk_size", "kv_offloading_path"):
                if getattr(self, name):
                    raise _bad(
                        name, getattr(self, name), "pages reach the disk through kv_offloading_size; give that too"
                    )
            if self.preemption_mode == "swap":
                raise _bad("preemption_mode", "swap", "pages are swapped to kv_offloading_size; give it, such as 4GiB")
        elif self.kv_cache_policy != "paged":
            raise _bad("kv_offloading_size", self.kv_offloading_size, "a contiguous reservation has no pages to move")
        if self.kv_offloading_path and not self.kv_offloading_disk_size:
            raise _bad("kv_offloading_path", self.kv_offloading_path, "give kv_offloading_disk_size too")


def read_speculative(value: SpeculativeConfig | Mapping[str, Any] | str | None) -> SpeculativeConfig | None:
    """How to speculate, from what stands for it: the fields in a dict, or as a JSON object.

    Raises:
        ConfigError: no such method or option, or a value out of range; it says what there is.
    """
    try:
        if isinstance(value, str):
            return SpeculativeConfig.from_json(value)
        return SpeculativeConfig.from_mapping(value) if isinstance(value, Mapping) else value
    except ConfigError as error:
        raise ConfigError(f"speculative={value!r} is refused: {error}") from None


def parse_count(text: str, *, option: str) -> int:
    """Read a number of tokens or bytes as people write it: "8192", "8k" (8192), "2.5M", "4GiB", "1g".

    Suffixes k, m, g and t are powers of 1024, with or without "b" or "ib" behind, in any case.

    Raises:
        ConfigError: not such a number; the message names `option`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(?:i?b)?|b)?", text.strip().lower(), re.ASCII)
    if match is None:
        raise _bad(option, text, "write a number such as 8192, 8k or 4GiB")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))


def _plain_types(hint: object) -> tuple[type, ...]:
    """The exact types a field annotated `hint` may hold; empty where choices are checked by name."""
    kinds = tuple(get_args(hint)) or (hint,)
    if not all(isinstance(kind, type) for kind in kinds):
        return ()
    plain = tuple(kind for kind in kinds if isinstance(kind, type))
    return (*plain, int) if float in plain else plain


def _is_share(item: tuple[object, object]) -> bool:
    name, weight = item
    return isinstance(name, str) and type(weight) in (int, float) and 0 < weight < float("inf")  # type: ignore[operator]


def _bad(name: str, value: object, remedy: str) -> ConfigError:
    return ConfigError(f"{name}={value!r} cannot be used: {remedy}")
