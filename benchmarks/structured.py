"""Structured output on the bundled model: does it hold what it promises, and what does it cost?

`validity` generates for random JSON schemas with random seeds: how many outputs finish within their tokens, and whether
every one of those parses and validates. `speed` decodes the same work with and without a mask on every token, in turns.

    uv run python benchmarks/structured.py validity                    # 500 schemas, about four minutes
    uv run python benchmarks/structured.py validity --schemas 100
    uv run python benchmarks/structured.py speed                       # about a minute
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import jsonschema

from aios_serve import InferenceEngine, SamplingParams, StructuredOutputsParams

CASES = Path(__file__).parent.parent / "packages/aios-serve/tests/structured_cases.py"


def main() -> int:
    """Runs one of the two; returns 1 if an output that finished was not valid."""
    given = _arguments()
    with InferenceEngine(max_model_len=2048, max_num_seqs=given.streams, threads=given.threads) as engine:
        return _validity(engine, given) if given.what == "validity" else _speed(engine, given)


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["validity", "speed"])
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


def _validity(engine: InferenceEngine, given: Any) -> int:
    seeds = range(given.first_seed, given.first_seed + given.schemas)
    schemas = [_random_schema(Random(seed)) for seed in seeds]
    prompts = [_prompt(engine, f"Answer with JSON of this schema: {json.dumps(schema)}") for schema in schemas]
    params = [
        SamplingParams(
            temperature=given.temperature,
            seed=seed,
            max_tokens=given.max_tokens,
            structured_outputs=StructuredOutputsParams(json=schema),
        )
        for seed, schema in zip(seeds, schemas, strict=True)
    ]
    started = time.perf_counter()
    outputs = [output.outputs[0] for output in engine.generate(prompts, params)]
    seconds = time.perf_counter() - started
    finished = [pair for pair in zip(schemas, outputs, strict=True) if pair[1].finish_reason == "stop"]
    reasons = {output.finish_reason for output in outputs}
    wrong = [(schema, output.text) for schema, output in finished if not _is_valid(output.text, schema)]
    num_tokens = sum(len(output.token_ids) for output in outputs)
    print(f"{given.schemas} schemas, temperature {given.temperature:g}, at most {given.max_tokens} tokens")
    print(f"{num_tokens} tokens in {seconds:.0f} s; finish reasons {sorted(map(str, reasons))}")
    print(f"finished: {len(finished)} ({len(finished) / given.schemas:.1%})")
    print(f"of these, parse and validate: {len(finished) - len(wrong)} ({1 - len(wrong) / max(len(finished), 1):.1%})")
    for schema, text in wrong[:5]:
        print(f"  {text!r}\n    does not follow {json.dumps(schema, ensure_ascii=False)}")
    return 1 if wrong else 0


def _prompt(engine: InferenceEngine, question: str) -> list[int]:
    return engine.tokenizer.encode_chat([{"role": "user", "content": question}])


def _is_valid(text: str, schema: dict[str, Any]) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def _random_schema(random: Random) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("structured_cases", CASES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.random_schema(random)


def _speed(engine: InferenceEngine, given: Any) -> int:
    """Both ways draw the same number of tokens: lists of strings go on for ever, and plain text ignores its end."""
    schema = {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 20},
                "age": {"type": "integer", "minimum": 0, "maximum": 120},
                "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
            },
            "required": ["name", "age", "tags"],
            "additionalProperties": False,
        },
        "minItems": 1000,
    }
    num_tokens = 128
    prompts = [_prompt(engine, f"Write a list of people as JSON, list {number}.") for number in range(given.streams)]
    ways = {
        "plain": {"ignore_eos": True},
        "JSON schema": {"structured_outputs": StructuredOutputsParams(json=schema)},
        "regex": {"structured_outputs": StructuredOutputsParams(regex="([a-z]+ ){1000}")},
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(given.repeats + 1):
        for way, options in ways.items():
            params = [
                SamplingParams(temperature=given.temperature, seed=number, max_tokens=num_tokens, **options)
                for number in range(given.streams)
            ]
            started = time.perf_counter()
            outputs = engine.generate(prompts, params)
            seconds = time.perf_counter() - started
            assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs), way
            rates[way] += [given.streams * num_tokens / seconds] if repeat else []  # the first one warms up
    print(f"{given.streams} streams, {num_tokens} tokens each, {given.repeats} rounds in turns; {engine.info.kernels}")
    for way, values in rates.items():
        shares = [value / plain for value, plain in zip(values, rates["plain"], strict=True)]
        print(
            f"{way:12} {statistics.median(values):7.1f} tok/s, {statistics.median(shares):.1%} of plain "
            f"(from {min(shares):.1%} to {max(shares):.1%})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
