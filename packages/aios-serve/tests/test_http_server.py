"""The life of the server process: binding, loading, draining, leaving. A real process around a scripted engine."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.slow  # a process per test
PROGRAM = Path(__file__).with_name("scripted_server.py")
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


class Server:
    """The process, and everything it said so far."""

    def __init__(self, *, engine=None, **server):
        options = json.dumps({"engine": engine or {}, "server": {"port": 0} | server})
        self.process = subprocess.Popen([sys.executable, str(PROGRAM), options], stderr=subprocess.PIPE, text=True)
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def said(self):
        return "".join(self.lines)

    def wait_for(self, text, seconds=30):
        deadline = time.monotonic() + seconds
        while text not in self.said:
            assert time.monotonic() < deadline, self.said
            if self.process.poll() is not None and not self._reader.is_alive():
                assert text in self.said, self.said
            time.sleep(0.02)

    @property
    def url(self):
        self.wait_for("listening on ")
        [line] = [line for line in self.lines if line.startswith("listening on ")]
        return line.split()[2].rstrip(";")

    def stop(self, expected, seconds=10):
        """Wait for the process and compare its exit status."""
        assert self.process.wait(seconds) == expected, self.said
        self._reader.join(5)


@pytest.fixture
def start():
    servers = []

    def run(**options):
        servers.append(Server(**options))
        return servers[-1]

    yield run
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()
        server._reader.join(5)
        server.process.stderr.close()


def open_stream(server, done):
    """Read a stream in a thread; its text is put into `done` at the end."""

    def read():
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=HELLO | {"stream": True}) as response:
            done.append("".join(response.iter_text()))

    thread = threading.Thread(target=read)
    thread.start()
    while httpx.get(f"{server.url}/load").json()["server_load"] == 0:
        time.sleep(0.02)
    return thread


def test_port_answers_503_while_loading_and_serves_afterwards(start):
    server = start(engine={"load_seconds": 2})
    response = httpx.post(f"{server.url}/v1/chat/completions", json=HELLO)
    assert response.status_code == 503
    assert "loading weights 41%" in response.json()["error"]["message"]
    server.wait_for("loading weights 41% ...")
    server.wait_for("try it")
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.post(f"{server.url}/v1/chat/completions", json=HELLO).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    server.stop(0)


def test_start_report_says_what_was_loaded_and_how_to_ask(start):
    server = start()
    server.wait_for("curl")
    assert "org/tiny, tiny (llama) from the bundled file" in server.said
    assert "538 MB as float32 (auto) on cpu (auto), 2 threads (auto)" in server.said
    assert "7 MB of float32: 100 pages x 16 tokens = 1600 tokens (auto)" in server.said
    assert "256 tokens of context (auto), 64 requests at once" in server.said
    command = next(line for line in server.lines if "curl " in line).strip()
    answer = subprocess.run(["bash", "-c", command + " -s"], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"] == "Hello!"


def test_model_that_cannot_be_loaded_ends_the_server_with_the_reason(start):
    server = start(engine={"load_error": "there is no folder /models/x; give a path or a hub name"})
    server.stop(1)
    assert "there is no folder /models/x" in server.said
    assert "Traceback" not in server.said


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(start):
    server = start(engine={"hold": 2}, shutdown_timeout=2)
    server.wait_for("try it")
    done = []
    thread = open_stream(server, done)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("shutting down: 1 request")
    assert httpx.get(f"{server.url}/ready").status_code == 503
    assert httpx.get(f"{server.url}/health").status_code == 200
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=HELLO)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_draining")
    assert "retry-after" in refused.headers
    server.stop(0)
    thread.join(5)
    assert '"finish_reason":"abort"' in done[0]  # it did not finish by itself within the timeout
    assert done[0].endswith("data: [DONE]\n\n")
    assert "aborted" in server.said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_leaves_at_once(start, number):
    server = start(engine={"hold": 2}, shutdown_timeout=60)
    server.wait_for("try it")
    thread = threading.Thread(target=lambda: httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}))
    thread.daemon = True
    threading.excepthook, before = (lambda _: None), threading.excepthook  # its connection is meant to break
    try:
        thread.start()
        while httpx.get(f"{server.url}/load").json()["server_load"] == 0:
            time.sleep(0.02)
        server.process.send_signal(number)
        server.wait_for("shutting down")
        started = time.monotonic()
        server.process.send_signal(number)
        server.stop(128 + number)
        assert time.monotonic() - started < 3
        thread.join(5)
    finally:
        threading.excepthook = before


def test_sigterm_while_loading_leaves(start):
    server = start(engine={"load_seconds": 60})
    server.wait_for("loading weights")
    server.process.send_signal(signal.SIGTERM)
    server.stop(0)


def test_port_in_use_is_one_line_with_the_remedy(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        from aios_serve.listen import BindError, bind
        from aios_serve.server_config import ServerConfig

        with pytest.raises(BindError, match=rf"port {port} on 127.0.0.1 is in use .* --port {port + 1}"):
            bind(ServerConfig(port=port))


@pytest.mark.parametrize(("host", "remedy"), [("no-such-host.invalid", "unknown"), ("192.0.2.1", "0.0.0.0 for all")])
def test_hosts_that_cannot_be_bound_are_explained(host, remedy):
    from aios_serve.listen import BindError, bind
    from aios_serve.server_config import ServerConfig

    with pytest.raises(BindError, match=remedy):
        bind(ServerConfig(host=host, port=0))


def test_unix_socket_is_served_and_removed(start, tmp_path):
    path = tmp_path / "aios.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    server = start(uds=str(path))
    server.wait_for("try it")
    assert f"--unix-socket {path}" in server.said
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as client:
        assert client.post("/v1/chat/completions", json=HELLO).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    server.stop(0)
    assert not path.exists()


def test_unix_socket_never_replaces_a_file(tmp_path):
    from aios_serve.listen import BindError, bind
    from aios_serve.server_config import ServerConfig

    path = tmp_path / "precious.txt"
    path.write_text("data")
    with pytest.raises(BindError, match="is no socket"):
        bind(ServerConfig(uds=path))
    assert path.read_text() == "data"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_https(start, tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=localhost"
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    server = start(ssl_certfile=str(certificate), ssl_keyfile=str(key))
    assert server.url.startswith("https://")
    server.wait_for("try it")
    with httpx.Client(verify=False) as client:
        assert client.post(f"{server.url}/v1/chat/completions", json=HELLO).status_code == 200


def tenants_text(*names):
    return "".join(
        f'[[tenants.{name}.keys]]\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n' for name in names
    )


def status(server, key):
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/chat/completions", json=HELLO, headers=headers, timeout=10).status_code


def test_tenants_follow_their_file_and_sighup(start, tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text(tenants_text("alice", "bob"))
    server = start(tenants=str(path))
    server.wait_for("try it:")
    assert "(needs an API key)" in server.said
    assert [status(server, key) for key in ("alice", "bob", "carol")] == [200, 200, 401]
    path.write_text(tenants_text("alice", "carol"))
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("the tenants have changed: 2", seconds=5)
    assert [status(server, key) for key in ("alice", "bob", "carol")] == [200, 401, 200]
    path.write_text(tenants_text("carol") + "[tenants.carol]\nspeed = 1")
    server.wait_for("the tenants stay as they were", seconds=5)
    assert [status(server, key) for key in ("alice", "carol")] == [200, 200]
    path.write_text(tenants_text("carol"))
    server.wait_for("the tenants have changed: 1", seconds=5)
    assert [status(server, key) for key in ("alice", "carol")] == [401, 200]
    server.process.send_signal(signal.SIGTERM)
    server.stop(0)


@pytest.mark.skipif(
    signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, reason="the tests run under nohup, and what they start does, too"
)
def test_without_tenants_sighup_ends_the_server_as_ever(start):
    server = start()
    server.wait_for("try it:")
    server.process.send_signal(signal.SIGHUP)
    server.stop(-signal.SIGHUP)


def test_tenants_that_cannot_be_used_are_told_before_anything_is_bound(start, tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text("[tenants.alice]\nweight = 2\n")
    server = start(tenants=str(path))
    server.stop(1)
    assert "tenants.alice.weight has no effect under scheduling_policy='fcfs'" in server.said
    assert "listening on" not in server.said
