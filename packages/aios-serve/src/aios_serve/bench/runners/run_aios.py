"""AIOS itself, through the public InferenceEngine. Options are the engine's own."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from .timed_job import serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .timed_job import EngineUnderTest, Timeline

FACTS = (
    "dtype",
    "quantization",
    "kernels",
    "kv_dtype",
    "num_weight_bytes",
    "num_step_weight_bytes",
    "num_kv_bytes",
    "num_blocks",
    "block_size",
    "max_num_batched_tokens",
    "threads",
)


def main() -> None:
    """Run the job on stdin."""
    serve(prepare)


def prepare() -> Callable[[dict[str, Any]], EngineUnderTest]:
    """Import torch: what the process takes beyond it is what AIOS answers for."""
    torch = import_module("torch")
    return functools.partial(Aios, torch)


class Aios:
    """The whole engine: scheduler, pages, sampler, detokenizer."""

    def __init__(self, torch: Any, job: dict[str, Any]) -> None:
        aios = import_module("aios_serve")
        self.version = f"{version('aios-serve')} on torch {torch.__version__}"
        self._engine = aios.InferenceEngine(
            job["model"],
            device="cpu",
            threads=job["threads"],
            enable_prefix_caching=False,
            **job["options"],
        )
        info = self._engine.info
        self.facts = {name: getattr(info, name) for name in FACTS if hasattr(info, name)}
        self._params = aios.SamplingParams

    def generate(self, prompts: list[list[int]], new_tokens: int, timeline: Timeline) -> list[list[int]]:
        """One call of `generate`, whose steps are stamped."""
        params = self._params(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        with stamped_steps(self._engine, len(prompts), timeline):
            outputs = self._engine.generate(prompts, params)
        return [output.outputs[0].token_ids for output in outputs]


@contextmanager
def stamped_steps(engine: Any, num_prompts: int, timeline: Timeline) -> Iterator[None]:
    """Record in `timeline` what each step of `engine.generate` brought.

    The engine's streams would tell the same in public, but prefill one prompt after the other when read in turn.
    """
    step, outputs = engine._step, {}

    def stamped() -> None:
        outputs.update({id(output): output for output in engine._sinks.values()})
        step()
        counts = [len(output.outputs[0].token_ids) for output in outputs.values()]
        timeline.record(counts + [0] * (num_prompts - len(counts)))

    engine._step = stamped
    try:
        yield
    finally:
        del engine._step
