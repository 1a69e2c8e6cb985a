"""TP x PP over two hosts, started by torchrun and by Ray: the tokens of one device, and what a killed rank does."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

pytest.importorskip("pyroute2")
from two_hosts import HOSTS, TwoHosts, why_not

from aios_serve import InferenceEngine, SamplingParams

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
    pytest.mark.timeout(280),
]

BIN = Path(sys.executable).parent
PORT = 8477
PROMPT = "The capital of France is"
ENGINE = {"max_model_len": 512, "kv_cache_dtype": "float32", "quantization": "as-stored-a16", "threads": 1}
FLAGS = [word for name, value in ENGINE.items() for word in (f"--{name.replace('_', '-')}", str(value))]
FLAGS += ["--tensor-parallel-size", "2", "--pipeline-parallel-size", "2", "--host", "0.0.0.0", "--port", str(PORT)]


@pytest.fixture
def hosts(tmp_path):
    two = TwoHosts(tmp_path)
    yield two
    two.close()


def start_with_torchrun(hosts: TwoHosts) -> None:
    for node, host in enumerate(HOSTS):
        hosts.start(
            host,
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}"),
            *("--nproc-per-node=2", f"--master-addr={HOSTS['a']}", "--master-port=29533", "-m", "aios_serve", *FLAGS),
        )


def start_with_ray(hosts: TwoHosts) -> None:
    pytest.importorskip("ray")
    folder = Path(f"/tmp/r{secrets.token_hex(3)}")  # paths of sockets must be short
    folder.mkdir()
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    common = ["--num-cpus=2", "--object-store-memory=100000000", "--block"]
    head = [f"--node-ip-address={HOSTS['a']}", "--port=6399", f"--temp-dir={folder}", "--include-dashboard=false"]
    hosts.start("a", BIN / "ray", "start", "--head", *head, *common, environment=environment)
    deadline = time.monotonic() + 60
    while "Ray runtime started" not in hosts.said():
        assert time.monotonic() < deadline, hosts.said()
        time.sleep(0.3)
    worker = [f"--address={HOSTS['a']}:6399", f"--node-ip-address={HOSTS['b']}"]
    hosts.start("b", BIN / "ray", "start", *worker, *common, environment=environment)
    while hosts.said().count("Ray runtime started") < 2:
        assert time.monotonic() < deadline, hosts.said()
        time.sleep(0.3)
    executor = ["--distributed-executor-backend", "ray", "--ray-address", f"{HOSTS['a']}:6399"]
    hosts.start("a", sys.executable, "-m", "aios_serve", *FLAGS, *executor, environment=environment)


def url(hosts: TwoHosts, path: str) -> str:
    return f"http://{hosts.address}:{PORT}{path}"


def status(hosts: TwoHosts) -> int:
    try:
        return httpx.get(url(hosts, "/ready"), timeout=5).status_code
    except httpx.HTTPError:
        return 0


def wait_ready(hosts: TwoHosts, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while status(hosts) != 200:
        assert time.monotonic() < deadline, hosts.said()
        time.sleep(0.3)


def complete(hosts: TwoHosts, prompt: str = PROMPT, **fields) -> dict:
    request = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "model": "SmolLM2-135M-Instruct", **fields}
    answer = httpx.post(url(hosts, "/v1/completions"), json=request, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


class Stream(threading.Thread):
    """Reads an answer as it comes, and remembers how and when it ended."""

    def __init__(self, hosts: TwoHosts) -> None:
        super().__init__(daemon=True)
        self.url = url(hosts, "/v1/completions")
        self.events: list[dict] = []
        self.ended: float | None = None

    def run(self) -> None:
        fields = {"prompt": "1 2 3 4", "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True}
        request = {"model": "SmolLM2-135M-Instruct", **fields}
        with httpx.stream("POST", self.url, json=request, timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self.events.append(json.loads(line.removeprefix("data: ")))
        self.ended = time.monotonic()


@pytest.mark.parametrize("start", [start_with_torchrun, start_with_ray])
def test_two_hosts_answer_as_one_device_and_survive_a_killed_rank(hosts, start) -> None:
    start(hosts)
    with InferenceEngine(**ENGINE) as engine:
        params = SamplingParams(temperature=0, max_tokens=24)
        expected = engine.generate([PROMPT], params)[0].outputs[0].text
    wait_ready(hosts)
    assert complete(hosts)["text"] == expected
    ranks = {host: hosts.pids(host, "aios_serve.rank_process --") for host in HOSTS}
    assert {host: len(pids) for host, pids in ranks.items()} == {"a": 2, "b": 2}

    stream = Stream(hosts)
    stream.start()
    while len(stream.events) < 5:
        assert stream.is_alive(), hosts.said()
        time.sleep(0.01)
    killed = time.monotonic()
    os.kill(ranks["b"][-1], signal.SIGKILL)
    stream.join(10)
    assert stream.ended is not None
    assert stream.ended - killed < 5
    assert "error" in stream.events[-1], stream.events[-1]
    assert status(hosts) == 503
    refused = httpx.post(url(hosts, "/v1/completions"), json={"prompt": "x"}, timeout=10)
    assert refused.status_code == 503

    wait_ready(hosts)
    assert complete(hosts)["text"] == expected
    again = {host: hosts.pids(host, "aios_serve.rank_process --") for host in HOSTS}
    assert {host: len(pids) for host, pids in again.items()} == {"a": 2, "b": 2}
    assert not set(ranks["b"]) & set(again["b"])
