"""OpenVINO GenAI.

Options: `pipeline` is "continuous" (continuous batching over paged attention) or "stateful" (the KV cache inside the
model, one sequence); `properties` go to OpenVINO's CPU plugin as they are.
"""

from __future__ import annotations

import functools
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .timed_job import serve

if TYPE_CHECKING:
    from collections.abc import Callable

    from .timed_job import EngineUnderTest, Timeline

CACHE_GIB = 1  # for all sequences: 32 of 300 tokens need 0.1, and what is not used is not backed


def main() -> None:
    """Run the job on stdin."""
    serve(prepare)


def prepare() -> Callable[[dict[str, Any]], EngineUnderTest]:
    """Import GenAI."""
    return functools.partial(load, import_module("openvino_genai"), import_module("openvino"), import_module("numpy"))


def load(genai: Any, openvino: Any, numpy: Any, job: dict[str, Any]) -> EngineUnderTest:
    """The pipeline that the options name."""
    kind = {"continuous": ContinuousPipeline, "stateful": StatefulPipeline}[job["options"]["pipeline"]]
    return kind(genai, lambda rows: openvino.Tensor(numpy.array(rows, dtype=numpy.int64)), job)


class ContinuousPipeline:
    """ContinuousBatchingPipeline, driven step by step as a server would."""

    def __init__(self, genai: Any, tensor: Callable[[Any], Any], job: dict[str, Any]) -> None:
        self.version, self.facts = genai.get_version(), {}
        self._genai, self._tensor = genai, tensor
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = CACHE_GIB
        self._pipeline = genai.ContinuousBatchingPipeline(job["model"], scheduler, "CPU", _properties(job))
        self._num_requests = 0

    def generate(self, prompts: list[list[int]], new_tokens: int, timeline: Timeline) -> list[list[int]]:
        """Adds all prompts, then steps until none is left."""
        handles = [self._add(prompt, new_tokens) for prompt in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for handle, produced in zip(handles, tokens, strict=True):
                while handle.can_read():
                    produced.extend(next(iter(handle.read().values())).generated_ids)
            timeline.record([len(produced) for produced in tokens])
        return tokens

    def _add(self, prompt: list[int], new_tokens: int) -> Any:
        self._num_requests += 1
        return self._pipeline.add_request(self._num_requests, self._tensor([prompt]), _greedy(self._genai, new_tokens))


class StatefulPipeline:
    """LLMPipeline on the model's own KV cache; its streamer tells the tokens of a single sequence only."""

    def __init__(self, genai: Any, tensor: Callable[[Any], Any], job: dict[str, Any]) -> None:
        if len(job["prompts"]) != 1:
            raise SystemExit("the stateful pipeline is measured with one sequence only")
        self.version, self.facts = genai.get_version(), {}
        self._genai, self._tensor = genai, tensor
        self._pipeline = genai.LLMPipeline(job["model"], "CPU", ATTENTION_BACKEND="SDPA", **_properties(job))

    def generate(self, prompts: list[list[int]], new_tokens: int, timeline: Timeline) -> list[list[int]]:
        """One call, whose steps a streamer stamps."""
        mask = [[1] * len(prompts[0])]
        inputs = self._genai.TokenizedInputs(self._tensor(prompts), self._tensor(mask))
        result = self._pipeline.generate(inputs, _greedy(self._genai, new_tokens), _stamps(self._genai, timeline))
        return [list(map(int, tokens)) for tokens in result.tokens]


def _stamps(genai: Any, timeline: Timeline) -> Any:
    class Stamps(genai.StreamerBase):
        count = 0

        def write(self, token: int | list[int]) -> Any:
            self.count += len(token) if isinstance(token, list) else 1
            timeline.record([self.count])
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    return Stamps()


def _greedy(genai: Any, new_tokens: int) -> Any:
    return genai.GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        ignore_eos=True,
        do_sample=False,
        apply_chat_template=False,
    )


def _properties(job: dict[str, Any]) -> dict[str, Any]:
    return {"INFERENCE_NUM_THREADS": job["threads"], **job["options"].get("properties", {})}
