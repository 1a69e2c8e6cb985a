"""llama.cpp through the C functions that llama-cpp-python declares.

The loop is that of llama.cpp's own `llama-batched-bench`: the prompts in pieces of n_batch tokens, then one
`llama_decode` per step with one token of every sequence. Greedy sampling is numpy's argmax, which is quicker than
llama.cpp's sampler chain.

Options: `flash_attention` is true or false.
"""

from __future__ import annotations

import ctypes
import functools
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, Any

from .timed_job import serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .timed_job import EngineUnderTest, Timeline

# llama.cpp's own defaults.
BATCH = 2048
MICRO_BATCH = 512
CONTEXT_MULTIPLE = 256


def main() -> None:
    """Run the job on stdin."""
    serve(prepare)


def prepare() -> Callable[[dict[str, Any]], EngineUnderTest]:
    """Import llama-cpp-python."""
    return functools.partial(LlamaCpp, import_module("llama_cpp"), import_module("numpy"))


class LlamaCpp:
    """A model and one context with room for all sequences."""

    def __init__(self, llama: Any, numpy: Any, job: dict[str, Any]) -> None:
        self._llama, self._numpy = llama, numpy
        self.version = llama.__version__
        self.facts = {"system": llama.llama_print_system_info().decode()}
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(job["model"].encode(), llama.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {job['model']}")
        self._num_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._context = llama.llama_init_from_model(self._model, self._context_params(job))
        if not self._context:
            raise SystemExit(f"llama.cpp makes no context for {job['max_context']} tokens with {job['options']}")
        self._batch = llama.llama_batch_init(BATCH, 0, 1)

    def generate(self, prompts: list[list[int]], new_tokens: int, timeline: Timeline) -> list[list[int]]:
        """All prompts, then all sequences in step."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        newest = self._prefill(prompts)
        tokens = [[token] for token in newest]
        timeline.record([1] * len(prompts))
        for position in range(len(prompts[0]), len(prompts[0]) + new_tokens - 1):
            newest = self._decode([(token, position, sequence, True) for sequence, token in enumerate(newest)])
            for produced, token in zip(tokens, newest, strict=True):
                produced.append(token)
            timeline.record([len(produced) for produced in tokens])
        return tokens

    def _context_params(self, job: dict[str, Any]) -> Any:
        params = self._llama.llama_context_default_params()
        per_sequence = -(-job["max_context"] // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE
        params.n_ctx = len(job["prompts"]) * per_sequence
        params.n_batch, params.n_ubatch, params.n_seq_max = BATCH, MICRO_BATCH, len(job["prompts"])
        params.n_threads = params.n_threads_batch = job["threads"]
        kind = "ENABLED" if job["options"]["flash_attention"] else "DISABLED"
        params.flash_attn_type = getattr(self._llama, f"LLAMA_FLASH_ATTN_TYPE_{kind}")
        return params

    def _prefill(self, prompts: list[list[int]]) -> list[int]:
        entries = (
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        )
        newest: list[int] = []
        while piece := list(islice(entries, BATCH)):
            newest += self._decode(piece)
        return newest

    def _decode(self, entries: Iterable[tuple[int, int, int, bool]]) -> list[int]:
        """One llama_decode of (token, position, sequence, wants logits); the greedy tokens of those that want them."""
        batch, sampled, count = self._batch, [], 0
        for token, position, sequence, wants_logits in entries:
            batch.token[count], batch.pos[count] = token, position
            batch.n_seq_id[count], batch.seq_id[count][0] = 1, sequence
            batch.logits[count] = wants_logits
            if wants_logits:
                sampled.append(count)
            count += 1
        batch.n_tokens = count
        status = self._llama.llama_decode(self._context, batch)
        if status:
            raise SystemExit(f"llama_decode of {count} tokens returned {status}")
        return [self._likeliest(row) for row in sampled]

    def _likeliest(self, row: int) -> int:
        logits = self._llama.llama_get_logits_ith(self._context, row)
        floats = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(self._numpy.argmax(self._numpy.ctypeslib.as_array(floats, (self._num_vocab,))))
