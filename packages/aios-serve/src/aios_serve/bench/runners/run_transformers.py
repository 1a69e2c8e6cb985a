"""transformers, `generate` on a static batch. Options: `dtype`; `compile` for torch.compile with a static cache."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .timed_job import serve

if TYPE_CHECKING:
    from collections.abc import Callable

    from .timed_job import EngineUnderTest, Timeline


def main() -> None:
    """Run the job on stdin."""
    serve(prepare)


def prepare() -> Callable[[dict[str, Any]], EngineUnderTest]:
    """Import torch and transformers, which resolves its classes when they are first asked for."""
    torch, transformers = import_module("torch"), import_module("transformers")
    _ = transformers.AutoModelForCausalLM
    return functools.partial(Transformers, torch, transformers)


class Transformers:
    """A model with its default (SDPA) attention."""

    def __init__(self, torch: Any, transformers: Any, job: dict[str, Any]) -> None:
        self.version = f"{transformers.__version__} on torch {torch.__version__}"
        self.facts = {}
        self._torch, self._criteria = torch, transformers.StoppingCriteriaList
        torch.set_num_threads(job["threads"])
        dtype = getattr(torch, job["options"]["dtype"])
        self._model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).eval()
        self._model.generation_config.eos_token_id = None
        self._options = {"cache_implementation": "static"} if job["options"].get("compile") else {}
        if job["options"].get("compile"):
            self._model.forward = torch.compile(self._model.forward, dynamic=True)

    def generate(self, prompts: list[list[int]], new_tokens: int, timeline: Timeline) -> list[list[int]]:
        """One call; a stopping criterion that never stops stamps its steps."""
        ids = self._torch.tensor(prompts)
        never = self._torch.zeros(len(prompts), dtype=self._torch.bool)

        def stamp(tokens: Any, _scores: Any, **_: Any) -> Any:
            timeline.record([tokens.shape[1] - ids.shape[1]] * len(prompts))
            return never

        with self._torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                do_sample=False,
                pad_token_id=0,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                stopping_criteria=self._criteria([stamp]),
                **self._options,
            )
        return [tokens[ids.shape[1] :] for tokens in output.tolist()]
