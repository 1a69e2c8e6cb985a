"""vLLM's CPU build, in process, stepped as its `LLM.generate` does. Options: `dtype`."""

from __future__ import annotations

import functools
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .timed_job import serve

if TYPE_CHECKING:
    from collections.abc import Callable

    from .timed_job import EngineUnderTest, Timeline

CACHE_GIB = "1"


def main() -> None:
    """Run the job on stdin."""
    serve(prepare)


def prepare() -> Callable[[dict[str, Any]], EngineUnderTest]:
    """Import vLLM, told to stay in this process: the memory of a second one would not be counted."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": CACHE_GIB}
    return functools.partial(VLLM, import_module("vllm"))


class VLLM:
    """The offline engine. Each `step` of its LLMEngine returns what every running request has so far."""

    def __init__(self, vllm: Any, job: dict[str, Any]) -> None:
        # The thread binding is read when the engine starts.
        os.environ["OMP_NUM_THREADS"] = str(job["threads"])
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{job['threads'] - 1}")
        self.version, self.facts = vllm.__version__, {}
        self._vllm = vllm
        engine = vllm.LLM(
            model=job["model"],
            dtype=job["options"]["dtype"],
            max_model_len=job["max_context"] + 1,
            max_num_seqs=len(job["prompts"]),
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )
        self._engine = engine.llm_engine
        self._num_requests = 0

    def generate(self, prompts: list[list[int]], new_tokens: int, timeline: Timeline) -> list[list[int]]:
        """Adds all prompts, then steps until none is left."""
        params = self._vllm.SamplingParams(
            temperature=0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        first = self._num_requests
        for prompt in prompts:
            self._engine.add_request(str(self._num_requests), {"prompt_token_ids": prompt}, params)
            self._num_requests += 1
        tokens: list[list[int]] = [[] for _ in prompts]
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                tokens[int(output.request_id) - first] = list(output.outputs[0].token_ids)
            timeline.record([len(produced) for produced in tokens])
        return tokens
