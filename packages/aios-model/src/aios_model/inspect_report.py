"""Prints the arithmetic of `inspect.py` as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from aios_model.config import ModelConfig
from aios_model.hardware import Hardware
from aios_model.inspect import (
    active_parameters,
    count_parameters,
    flops_per_token,
    kv_bytes,
    num_parameters,
    roofline,
)
from aios_model.weights.hub import ModelFiles

# Bytes per weight of the encodings people choose between; 4 bits carry one 16-bit scale per group of 32.
_ENCODINGS = {"float32": 4.0, "BF16": 2.0, "INT8": 1.0, "4-bit": 0.5625}
_KV_BYTES = 2


def print_report(
    console: Console,
    files: ModelFiles,
    config: ModelConfig,
    machines: Sequence[Hardware],
    *,
    memory_gb: float | None,
    context: int,
) -> None:
    """Prints everything `aios-model inspect` knows.

    Args:
        console: Where to.
        files: The model's files, for its name.
        config: Its configuration.
        machines: Hardware to draw rooflines for.
        memory_gb: Memory to fit the model into, or None.
        context: Tokens in the cache for figures per token.
    """
    console.print(f"[bold]{files.name}[/bold]  {config.architecture}, {_shape(config)}")
    console.print(_parameter_table(config))
    console.print(_cost_table(config, context))
    if memory_gb is not None:
        console.print(_fit_table(config, memory_gb))
    for machine in machines:
        console.print(_roofline_table(config, machine, context))


def _shape(config: ModelConfig) -> str:
    experts = f", {config.num_experts} experts ({config.num_experts_per_tok} per token)" if config.num_experts else ""
    return (
        f"{config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_attention_heads} query heads, "
        f"{config.num_key_value_heads} kv heads of {config.head_dim}, context {config.max_context_length}{experts}"
    )


def _parameter_table(config: ModelConfig) -> Table:
    table = Table(title="parameters", title_justify="left")
    for heading in ("part", "parameters", "share", "read per token"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    total = num_parameters(config)
    for part in count_parameters(config):
        share = f"{part.parameters / total:.1%}" if part.parameters else "tied"
        table.add_row(part.name, f"{part.parameters:,}", share, f"{part.active:,}")
    table.add_section()
    table.add_row("all", f"{total:,}", "100%", f"{active_parameters(config):,}")
    return table


def _cost_table(config: ModelConfig, context: int) -> Table:
    table = Table(title=f"one token, {context} tokens of context", title_justify="left", show_header=False)
    table.add_row("operations", f"{flops_per_token(config, context=context) / 1e9:.2f} GFLOP")
    per_token = config.kv_bytes_per_token(_KV_BYTES)
    table.add_row("KV cache", f"{per_token / 1024:.1f} KiB per token in 16 bits")
    table.add_row("KV read", f"{kv_bytes(config, context=context, dtype_bytes=_KV_BYTES) / 1e6:.1f} MB")
    sizes = "  ".join(f"{name} {_gigabytes(num_parameters(config) * size)}" for name, size in _ENCODINGS.items())
    table.add_row("weights", sizes)
    return table


def _fit_table(config: ModelConfig, memory_gb: float) -> Table:
    table = Table(title=f"what fits in {memory_gb:g} GB", title_justify="left")
    for heading in ("weights", "bytes", "tokens of 16-bit KV cache", f"sequences of {config.max_context_length}"):
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    for name, size in _ENCODINGS.items():
        weights = num_parameters(config) * size
        tokens = int((memory_gb * 1e9 - weights) // config.kv_bytes_per_token(_KV_BYTES))
        fits = (f"{tokens:,}", f"{tokens / config.max_context_length:,.1f}") if tokens > 0 else ("does not fit", "–")
        table.add_row(name, _gigabytes(weights), *fits)
    return table


def _roofline_table(config: ModelConfig, machine: Hardware, context: int) -> Table:
    title = (
        f"roofline of {machine.name} ({machine.source}): {machine.bandwidth / 1e9:,.0f} GB/s, "
        f"{machine.flops / 1e12:,.2f} TFLOP/s"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("weights", "MB read per token", "reading", "computing", "tok/s at most", "balanced batch"):
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    for name, size in _ENCODINGS.items():
        limit = roofline(config, machine, context=context, bytes_per_weight=size, kv_dtype_bytes=_KV_BYTES)
        table.add_row(
            name,
            f"{limit.bytes_per_token / 1e6:,.0f}",
            f"{limit.seconds_reading * 1e3:.2f} ms",
            f"{limit.seconds_computing * 1e3:.2f} ms",
            f"{limit.tokens_per_second:,.0f}",
            f"{limit.balanced_batch:,}",
        )
    return table


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
