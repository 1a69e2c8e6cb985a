"""How fast an answer came, and how near that is to what the machine's memory allows."""

from __future__ import annotations

import time

import psutil
import torch
from rich.table import Table

from aios_model.hardware import measure_read_bandwidth
from aios_model.inspect import kv_bytes
from aios_model.model import LoadedModel


class GenerationTimer:
    """Counts tokens and the time they took, from its creation on."""

    def __init__(self) -> None:
        self._ticks = [time.perf_counter()]

    def tick(self) -> None:
        """Notes that a token came."""
        self._ticks.append(time.perf_counter())

    @property
    def time_to_first_token(self) -> float:
        """Seconds from the start to the first token; 0 if none came."""
        return self._ticks[1] - self._ticks[0] if len(self._ticks) > 1 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first over the time they took; 0 with fewer than two tokens."""
        if len(self._ticks) < 3:
            return 0.0
        return (len(self._ticks) - 2) / (self._ticks[-1] - self._ticks[1])

    def report(self, model: LoadedModel, *, num_prompt_tokens: int) -> Table:
        """A table of the run; on a CPU it measures the read bandwidth to compare with, which takes half a second."""
        num_output = len(self._ticks) - 1
        table = Table(show_header=False, box=None)
        table.add_row(
            "prompt", f"{num_prompt_tokens} tokens, first token after {self.time_to_first_token * 1e3:.0f} ms"
        )
        table.add_row("answer", f"{num_output} tokens, {self.decode_tokens_per_second:.1f} tok/s")
        table.add_row("memory", self._memory(model))
        if model.decoder.device.type == "cpu" and self.decode_tokens_per_second:
            table.add_row("limit", self._share_of_limit(model, num_prompt_tokens + num_output // 2))
        return table

    def _memory(self, model: LoadedModel) -> str:
        if model.decoder.device.type == "cuda":
            used = f"{torch.cuda.max_memory_allocated(model.decoder.device) / 1e6:.0f} MB on the device at most"
        else:
            used = f"{psutil.Process().memory_info().rss / 1e6:.0f} MB in this process"
        return f"{used}, {model.num_weight_bytes / 1e6:.0f} MB of it weights"

    def _share_of_limit(self, model: LoadedModel, context: int) -> str:
        cached = kv_bytes(model.config, context=context, dtype_bytes=model.decoder.dtype.itemsize)
        reached = (model.num_weight_bytes + cached) * self.decode_tokens_per_second
        bandwidth = measure_read_bandwidth()
        return f"{reached / 1e9:.1f} of {bandwidth / 1e9:.1f} GB/s read bandwidth ({reached / bandwidth:.0%})"
