"""AIOS against transformers on the bundled model: decode of one and of sixteen sequences, and what else AIOS costs.

Both run the same float32 weights with the same threads, in fresh processes that take turns; every figure is the median
of the repeats, with the smallest and the largest beside it, and only ratios within one run mean anything.

    uv run python benchmarks/spine.py                   # about ten minutes
    uv run python benchmarks/spine.py --repeats 5 --json results.json

Rows:
    decode 1, decode 16     tokens per second while decoding, prompt of 128 random tokens, 128 generated
    first token             seconds from `import torch` being done to the first byte of an answer, over HTTP
    load                    peak memory while loading, beyond `import torch` and the weights
    scheduler               share of `Engine.step` spent in the scheduler, 64 requests
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROMPT_TOKENS = 128
NEW_TOKENS = 128
ORACLE = Path(__file__).parents[1] / "packages/aios-model/tests/support"


def prompts(count: int) -> list[list[int]]:
    """The same random prompts in every process."""
    generator = random.Random(7)
    return [[generator.randrange(100, 49_000) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def decode_rate(run: Callable[[int], float], batch: int) -> float:
    """Tokens per second of decoding: a run of 1 + NEW_TOKENS tokens less a run of one, the prompt's share."""
    run(2)
    first = min(run(1) for _ in range(2))
    return batch * NEW_TOKENS / (run(1 + NEW_TOKENS) - first)


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_transformers(batch: int, threads: int) -> dict[str, float]:
    """Eager `generate` on a static batch, as transformers offers it, with its default (SDPA) attention."""
    import torch

    sys.path.insert(0, str(ORACLE))
    import bundled_oracle

    torch.set_num_threads(threads)
    model = bundled_oracle.transformers_model()
    ids = torch.tensor(prompts(batch))
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 2, "attention_mask": torch.ones_like(ids)}

    def run(tokens: int) -> float:
        outputs = []
        seconds = timed(
            lambda: outputs.extend(model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, **options))
        )
        assert [len(output) for output in outputs] == [PROMPT_TOKENS + tokens] * batch
        return seconds

    return {"tok/s": decode_rate(run, batch)}


def measure_aios(batch: int, threads: int) -> dict[str, float]:
    """The whole engine: scheduler, pages, sampler. Prefix caching is off, or the second run would skip its prompts."""
    from aios_serve import InferenceEngine, SamplingParams

    with InferenceEngine(
        max_num_seqs=max(batch, 16), threads=threads, dtype="float32", device="cpu", enable_prefix_caching=False
    ) as engine:

        def run(tokens: int) -> float:
            params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
            outputs = []
            seconds = timed(lambda: outputs.extend(engine.generate(prompts(batch), params)))
            # A request that failed is quick, too.
            assert [len(output.outputs[0].token_ids) for output in outputs] == [tokens] * batch, outputs
            return seconds

        rate = decode_rate(run, batch)
        return {"tok/s": rate, "scheduler share": engine.stats().scheduler_share}


def measure_load(threads: int) -> dict[str, float]:
    """Peak resident memory of loading, in MiB, beyond `import torch` and the weights themselves."""
    import resource

    import torch

    torch.set_num_threads(threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    from aios_model import load_model

    start = time.perf_counter()
    model = load_model(device="cpu", dtype="float32")
    seconds = time.perf_counter() - start
    weights = model.num_weight_bytes / 2**20
    beyond = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before - weights
    return {"import torch MiB": before, "weights MiB": weights, "beyond MiB": beyond, "seconds": seconds}


def measure_first_token(threads: int) -> dict[str, float]:
    """Starts `aios-serve` and asks as soon as it is ready; the server's own log tells when torch was imported."""
    import httpx

    port = _free_port()
    command = [sys.executable, "-m", "aios_serve.cli", "--port", str(port), "--threads", str(threads)]
    start = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            listening = _poll(lambda: client.get("/health").status_code > 0)
            _poll(lambda: client.get("/ready").status_code == 200)
            ready = time.perf_counter()
            body = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())
                first = time.perf_counter()
    finally:
        server.terminate()
        log, _ = server.communicate(timeout=30)
    said = re.search(r"ready in ([\d.]+) s, ([\d.]+) s of it to import torch", log)
    assert said is not None, f"the start-up log does not say how long loading took:\n{log}"
    imported, loaded = float(said[2]), float(said[1]) - float(said[2])
    return {
        "listening s": listening - start,
        "ready s": ready - start,
        "import torch s": imported,
        "first token s": first - start,
        "after import s": loaded + first - ready,
    }


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _poll(condition: Callable[[], bool]) -> float:
    import httpx

    deadline = time.perf_counter() + 120
    while time.perf_counter() < deadline:
        try:
            if condition():
                return time.perf_counter()
        except httpx.TransportError:
            pass
        time.sleep(0.01)
    raise TimeoutError("the server did not come up within two minutes")


WORKERS: dict[str, Callable[[int], dict[str, float]]] = {
    "transformers-1": lambda threads: measure_transformers(1, threads),
    "aios-1": lambda threads: measure_aios(1, threads),
    "transformers-16": lambda threads: measure_transformers(16, threads),
    "aios-16": lambda threads: measure_aios(16, threads),
    "aios-64": lambda threads: measure_aios(64, threads),
    "first-token": measure_first_token,
    "load": measure_load,
}


def run_worker(name: str, threads: int) -> dict[str, float]:
    """One measurement in a fresh process; its last line of output is JSON."""
    command = [sys.executable, __file__, "--worker", name, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(values: list[float]) -> dict[str, float]:
    """Median, smallest, largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def print_table(results: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Prints Markdown, returns what it says."""
    report: dict[str, Any] = {
        name: {key: summary([run[key] for run in runs]) for key in runs[0]} for name, runs in results.items()
    }
    print("\n| decode | transformers tok/s | AIOS tok/s | ratio, pair by pair |\n|---|---|---|---|")
    for batch in (1, 16):
        ours, theirs = results[f"aios-{batch}"], results[f"transformers-{batch}"]
        ratios = summary([a["tok/s"] / b["tok/s"] for a, b in zip(ours, theirs, strict=True)])
        report[f"ratio-{batch}"] = ratios
        cells = [_cell(report[f"transformers-{batch}"]["tok/s"]), _cell(report[f"aios-{batch}"]["tok/s"])]
        print(f"| {batch} sequence{'s' * (batch > 1)} | {cells[0]} | {cells[1]} | {_cell(ratios, 2)} |")
    print("\n| AIOS beside it | median (min – max) |\n|---|---|")
    for title, worker, key, digits in (
        ("decode of 64 sequences, tok/s", "aios-64", "tok/s", 1),
        ("scheduler's share of a step at 64 requests", "aios-64", "scheduler share", 4),
        ("server listens, seconds after start", "first-token", "listening s", 2),
        ("`import torch` in the engine process, seconds", "first-token", "import torch s", 2),
        ("first token, seconds after `import torch` was done", "first-token", "after import s", 2),
        ("first token, seconds after start", "first-token", "first token s", 2),
        ("weights, MiB", "load", "weights MiB", 0),
        ("peak while loading beyond `import torch` and weights, MiB", "load", "beyond MiB", 0),
    ):
        print(f"| {title} | {_cell(report[worker][key], digits)} |")
    return report


def _cell(values: dict[str, float], digits: int = 1) -> str:
    median, low, high = (f"{values[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low} – {high})"


def machine(threads: int) -> dict[str, str]:
    """What the figures were taken on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    packages = ("torch", "transformers", "aios-serve")
    return {
        "processor": model,
        "cores": str(os.cpu_count()),
        "threads": str(threads),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def main() -> None:
    """Runs all workers in turn and prints the tables; JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="rounds of all measurements")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of both engines")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--only", nargs="*", choices=WORKERS, help="measure these only, print JSON")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(WORKERS[arguments.worker](arguments.threads)))
        return
    names = arguments.only or list(WORKERS)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for round_number in range(arguments.repeats):
        for name in names:
            results[name].append(run_worker(name, arguments.threads))
            print(f"round {round_number + 1}: {name} {results[name][-1]}", file=sys.stderr, flush=True)
    report = {} if arguments.only else print_table(results)
    output = {"machine": machine(arguments.threads), "summary": report, "runs": results}
    print("\n" + json.dumps(output if arguments.only else {"machine": output["machine"]}))
    if arguments.json:
        arguments.json.write_text(json.dumps(output, indent=2) + "\n")


if __name__ == "__main__":
    main()
