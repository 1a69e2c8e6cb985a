"""A group of ranks against one process, on the shape of a 1B-parameter model with random INT8 weights.

    python benchmarks/group_speed.py threads=1 tensor_parallel=2 pipeline_parallel=2

Each argument is one engine, as options of `InferenceEngine` joined by commas. Decoding is timed by the difference
between two lengths of answer, each the best of two, so that prompts and start-up cancel out.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from aios_model.weights.bundled import find_bundled_model
from aios_serve import InferenceEngine, SamplingParams

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}


def main() -> None:
    """Prints a line per engine."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE))
        for given in sys.argv[1:] or ["threads=1"]:
            options = {name: int(value) for name, value in (pair.split("=") for pair in given.split(","))}
            with InferenceEngine(
                model=folder,
                tokenizer=str(find_bundled_model()),
                load_format="dummy",
                enable_prefix_caching=False,
                max_model_len=1024,
                **options,
            ) as engine:
                print(f"{given}: {measure(engine)}", flush=True)


def measure(engine: InferenceEngine) -> str:
    """Tokens per second of the four kinds of work."""
    rng = random.Random(0)

    def seconds(batch: int, prompt: int, output: int) -> float:
        prompts = [[rng.randrange(100, 40_000) for _ in range(prompt)] for _ in range(batch)]
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        started = perf_counter()
        engine.generate(prompts, params)
        return perf_counter() - started

    def best(*work: int) -> float:
        return min(seconds(*work) for _ in range(2))

    def decode(batch: int, steps: int) -> float:
        return batch * steps / (best(batch, 8, 2 + steps) - best(batch, 8, 2))

    seconds(1, 16, 4)  # warm-up
    return (
        f"decode 1: {decode(1, 32):.1f} tok/s, decode 64: {decode(64, 16):.0f} tok/s, "
        f"prefill 512: {512 / best(1, 512, 1):.0f} tok/s, prefill 8 x 512: {4096 / best(8, 512, 1):.0f} tok/s"
    )


if __name__ == "__main__":
    main()
