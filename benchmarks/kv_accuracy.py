"""What fewer bits in the KV pages cost and what they bring: the bundled model over pages of each type, in one run.

Accuracy is measured with float32 weights, so that only the pages differ, on the bundled evaluation text: perplexity,
KL divergence from the next-token distributions over float32 pages, how often the likeliest token is the same, and how
long greedy answers stay the same. Speed is that of native steps alone, without scheduler or HTTP, with the weights that
`--scheme` names; the types take turns, figures are medians of the repeats.

    uv run python benchmarks/kv_accuracy.py                              # some three minutes
    uv run python benchmarks/kv_accuracy.py --windows 2 --contexts 512 --json figures.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from aios_kvcache.native.native_cache import KV_DTYPES
from aios_kvcache.sizing import native_kv_bytes_per_token
from aios_model.decoder import DecoderModel
from aios_model.model import load_decoder
from aios_model.tokenizer.tokenizer import Tokenizer
from aios_model.weights.hub import resolve_model
from aios_quant.calibrate.data import read_windows
from aios_quant.checkpoints.source import quantized_checkpoint
from aios_quant.evaluate import Candidate, Evaluation, EvaluationSettings, evaluate
from aios_quant.runner import Kernels, Runner, kernel_factory, make_runner
from aios_quant.schemes.registry import find_scheme
from aios_quant.transform import quantize_model

NUM_DECODED = 24


def measure_accuracy(model: str | None, arguments: argparse.Namespace) -> dict[str, Evaluation]:
    """Each type beside float32 pages."""
    tokenizer = Tokenizer.from_files(resolve_model(model))
    windows = read_windows(tokenizer, None, bundled="evaluation", length=arguments.window, limit=arguments.windows)
    candidates = [
        Candidate(name=name, model=None, scheme="none", kv_dtype=dtype)
        for dtype, name in KV_DTYPES.items()
        if dtype != torch.float32
    ]
    settings = EvaluationSettings(
        num_answers=len(windows.tokens_WS), num_prompt_tokens=128, kernels="native", threads=arguments.threads
    )
    report = evaluate(model, candidates, windows.tokens_WS, text=windows.name, settings=settings)
    print(f"{report.model}, {report.kernels}, float32 weights; {report.num_positions} positions of {report.text}, ")
    print(f"{report.num_answers} greedy answers of {report.num_new_tokens} tokens\n")
    original, *others = report.evaluations
    return {"float32": original, **{evaluation.name: evaluation for evaluation in others}}


def load(model: str | None, kernels: Kernels, scheme: str) -> DecoderModel:
    """The model with packed weights."""
    transform = quantize_model(find_scheme(scheme), kernel_factory=kernels.pack)
    return load_decoder(
        resolve_model(model),
        dtype="float32",
        device="cpu",
        transforms=[transform],
        source_transforms=[quantized_checkpoint],
    )


def decode_seconds(runner: Runner, decoder: DecoderModel, tokens_T: torch.Tensor) -> float:
    """One token, the head's product included; the median of a few in a row."""
    times = []
    for token in tokens_T:
        start = time.perf_counter()
        decoder.logits(runner.extend(token[None])).argmax()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_speed(
    decoder: DecoderModel, kernels: Kernels, arguments: argparse.Namespace
) -> dict[str, dict[int, float]]:
    """Tokens per second of one sequence, by type and context."""
    speeds: dict[str, dict[int, float]] = {name: {} for name in KV_DTYPES.values()}
    for context in arguments.contexts:
        tokens_S = torch.randint(0, decoder.config.vocab_size, (context,))
        length = context + NUM_DECODED * arguments.repeats
        runners = {
            name: make_runner(decoder, kernels, max_length=length, kv_dtype=dtype) for dtype, name in KV_DTYPES.items()
        }
        for runner in runners.values():
            runner.start(tokens_S)
        times: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(arguments.repeats):
            for name, runner in runners.items():
                times[name].append(decode_seconds(runner, decoder, tokens_S[:NUM_DECODED]))
        for name, seconds in times.items():
            speeds[name][context] = 1 / statistics.median(seconds)
    return speeds


def print_table(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """The figures, in Markdown."""
    speeds = [f"tok/s at {context}" for context in arguments.contexts]
    titles = ["pages", "bytes a token", "perplexity", "KL (nats)", "greedy agreement", "same tokens", *speeds]
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for row in rows:
        accuracy = [f"{row['perplexity']:.3f}", f"{row['kl']:.1e}", f"{row['agreement']:.2%}", f"{row['prefix']:.1f}"]
        cells = [row["pages"], f"{row['bytes']:,}", *accuracy, *(f"{row['speed'][c]:.0f}" for c in arguments.contexts)]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as for aios-serve; the bundled one if left out")
    parser.add_argument("--scheme", default="as-stored", help="weights of the speed test")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--window", type=int, default=1024, help="tokens of text that the model sees at once")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    accuracy = measure_accuracy(arguments.model, arguments)
    kernels = kernel_factory("native", arguments.threads)
    decoder = load(arguments.model, kernels, arguments.scheme)
    speeds = measure_speed(decoder, kernels, arguments)
    rows = [
        {
            "pages": name,
            "bytes": native_kv_bytes_per_token(decoder.config, name),
            "perplexity": evaluation.perplexity,
            "kl": evaluation.kl_divergence,
            "agreement": evaluation.agreement,
            "prefix": evaluation.common_prefix,
            "speed": speeds[name],
        }
        for name in KV_DTYPES.values()
        for evaluation in (accuracy[name],)
    ]
    print_table(rows, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
