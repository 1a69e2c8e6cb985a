"""What the terminal shows while the server starts: progress at once, then what was loaded and where memory goes."""

from __future__ import annotations

import asyncio
import json
import shlex
import time
from typing import TYPE_CHECKING

from aios_serve.async_engine import EngineState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from aios_serve.async_engine import AsyncEngine
    from aios_serve.config import EngineConfig
    from aios_serve.listen import Address
    from aios_serve.model_info import EngineInfo

POLL_SECONDS = 0.1
PLAIN_SECONDS = 5.0
"""Between two lines about one stage where there is no terminal."""


async def show_progress(engine: AsyncEngine, console: Console) -> None:
    """Follow a loading engine: one changing line on a terminal, one plain line per stage elsewhere."""
    if console.is_terminal:
        with console.status("starting") as status:
            while engine.state is EngineState.LOADING:
                status.update(_sentence(engine))
                await asyncio.sleep(POLL_SECONDS)
        return
    shown, shown_at = "", 0.0
    while engine.state is EngineState.LOADING:
        sentence = _sentence(engine)
        silence = time.monotonic() - shown_at
        if _stage(sentence) != _stage(shown) or (sentence != shown and silence > PLAIN_SECONDS):
            _print(console, f"{sentence.removesuffix(' 0%')} ...")
            shown, shown_at = sentence, time.monotonic()
        await asyncio.sleep(POLL_SECONDS)


def show_listening(address: Address, console: Console) -> None:
    """Say that the port is bound: requests get an answer from now on, 503 until the model is there."""
    _print(console, f"listening on {address.url}; answering 503 until the model is loaded")


def show_ready(
    engine: AsyncEngine, address: Address, console: Console, *, needs_key: bool, formats: str | None = None
) -> None:
    """Say what was loaded, how memory is used, what was chosen automatically, and how to ask the first question."""
    for line in ready_lines(engine, address, needs_key=needs_key, formats=formats):
        _print(console, line)


def ready_lines(engine: AsyncEngine, address: Address, *, needs_key: bool, formats: str | None = None) -> Iterator[str]:
    """The lines of `show_ready`; `formats` says how tools and thoughts are written, see `answers.plan`."""
    info, config = engine.info, engine.config
    auto = " (auto)"
    yield f"ready in {info.import_seconds + info.load_seconds:.1f} s, {info.import_seconds:.1f} s of it to import torch"
    yield f"  model     {', '.join(engine.model_names)} ({info.architecture}) from {_source(config)}"
    yield (
        f"  weights   {_megabytes(info.num_weight_bytes)} {_weights(info, config)}"
        f" on {info.device}{auto if config.device == 'auto' else ''}{_threads(info, config)}"
    )
    if config.num_ranks > 1:
        yield f"  ranks     {_ranks(info)}; weights, threads and KV cache are those of all"
    if info.num_offloaded_bytes:
        yield (
            f"  offload   {_megabytes(info.num_offloaded_bytes)} of them in host memory (--cpu-offload-gb "
            f"{config.cpu_offload_gb:g}), through {_megabytes(info.num_staging_bytes)} of buffers; "
            "a step takes as long as copying them at least"
        )
    if config.data_parallel > 1:
        yield (
            f"  replicas  {config.data_parallel} engines, requests routed by {config.data_parallel_routing}; "
            "weights, threads and KV cache are those of each"
        )
    yield f"  kernels   {info.kernels}"
    yield f"  KV cache  {_pool(info, config)}"
    if info.num_host_pages:
        yield f"  offload   {_tiers(info)}"
    yield (
        f"  limits    {info.max_model_len} tokens of context{auto if config.max_model_len is None else ''}, "
        f"{info.max_num_seqs} requests at once, {info.max_num_batched_tokens} tokens per step"
        f"{auto if config.max_num_batched_tokens is None else ''}"
    )
    if formats:
        yield f"  answers   {formats}"
    if (drafts := config.speculative) is not None:
        count = f"{'up to' if drafts.adaptive else 'always'} {drafts.num_speculative_tokens}"
        yield f"  drafts    {drafts.method}, {count} tokens of a request in a step"
    yield f"  endpoint  {address.url}/v1" + (" (needs an API key)" if needs_key else "")
    yield "try it:"
    yield f"  {curl_example(engine, address, needs_key=needs_key)}"


def _ranks(info: EngineInfo) -> str:
    parts = [f"{info.tensor_parallel} share each layer"] if info.tensor_parallel > 1 else []
    parts += [f"{info.pipeline_parallel} stages of layers"] if info.pipeline_parallel > 1 else []
    return f"{info.tensor_parallel * info.pipeline_parallel} processes: {' in each of '.join(parts)}"


def curl_example(engine: AsyncEngine, address: Address, *, needs_key: bool) -> str:
    """A command to copy: a chat if the model has a template for it, else a completion."""
    if engine.tokenizer.has_chat_template:
        route, body = "chat/completions", {"messages": [{"role": "user", "content": "Why is the sky blue?"}]}
    else:
        route, body = "completions", {"prompt": "The sky is blue because"}
    body = {"model": engine.model_name, **body, "max_tokens": 64}
    parts = ["curl", *address.curl_options, f"{address.url}/v1/{route}", "-H", "Content-Type: application/json"]
    command = shlex.join([*parts, "-d", json.dumps(body, ensure_ascii=False)])
    return command + (' -H "Authorization: Bearer $AIOS_API_KEY"' if needs_key else "")


def _print(console: Console, line: str) -> None:
    """One line as it is: no markup, no wrapping, so that commands can be copied."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _sentence(engine: AsyncEngine) -> str:
    return engine.state_detail or "starting"


def _stage(detail: str) -> str:
    """`detail` without its percentage: "loading weights 41%" and "loading weights 42%" are one stage."""
    words = detail.split()
    return " ".join(word for word in words if not word.endswith("%"))


def _source(config: EngineConfig) -> str:
    if config.model in (None, "bundled"):
        return "the bundled file"
    return config.model + (f" at {config.revision}" if config.revision else "")


def _weights(info: EngineInfo, config: EngineConfig) -> str:
    """What weights became, and whether that was our choice: auto picks the fastest that keeps the quality."""
    if info.quantization == "none":
        return f"as {info.dtype}" + (" (auto)" if config.dtype == "auto" else "")
    words = "as stored" if info.quantization == "as-stored" else f"as {info.quantization}"
    return words + (" (auto)" if config.quantization == "auto" else "")


def _threads(info: EngineInfo, config: EngineConfig) -> str:
    if info.device != "cpu":
        return ""
    return f", {info.threads} thread{'s' if info.threads > 1 else ''}{' (auto)' if config.threads is None else ''}"


def _pool(info: EngineInfo, config: EngineConfig) -> str:
    sized_by_us = config.kv_cache_memory_bytes is None and config.num_gpu_blocks_override is None
    parts = [
        f"{_megabytes(info.num_kv_bytes)} of {info.kv_dtype}: {info.num_blocks} pages x {info.block_size} tokens = "
        f"{info.num_blocks * info.block_size} tokens{' (auto)' if sized_by_us else ''}"
    ]
    if info.kv_cache_policy != "paged":
        parts.append(info.kv_cache_policy)
    if info.device == "cpu":
        parts.append("reserved now, used as it fills")
    parts.append(f"prefix caching {'on' if info.enable_prefix_caching else 'off'}")
    return ", ".join(parts)


def _tiers(info: EngineInfo) -> str:
    parts = [f"{_megabytes(info.num_host_tier_bytes)} of host memory: {info.num_host_pages} pages, used as it fills"]
    if info.num_disk_pages:
        parts.append(f"{_megabytes(info.num_disk_tier_bytes)} of disk: {info.num_disk_pages} pages")
    return ", ".join(parts)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
