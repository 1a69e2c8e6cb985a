"""Requests that lose their replica, and the ingress around them: with replicas that die on cue, without Ray."""

from __future__ import annotations

import asyncio
import json
import random

import httpx
import pytest

from aios_sched.errors import QueueFullError
from aios_serve.app import create_app
from aios_serve.errors import EngineLoadingError
from aios_serve.ray_app.asgi_call import AnswerStart, AsgiCall, call_app
from aios_serve.ray_app.errors import ReplicaLostError
from aios_serve.ray_app.forwarding import MAX_LOST_REPLICAS, Forwarder
from aios_serve.ray_app.ingress import Ingress
from aios_serve.ray_app.merged_metrics import merge_expositions
from aios_serve.ray_app.options import RayServeConfig
from aios_serve.ray_app.roll_call import FRESH_SECONDS, ReplicaReport, RollCall
from aios_serve.request_identity import RequestIdentity, prompt_seed
from aios_serve.server_config import ServerConfig

PLAIN = AnswerStart(status=200, headers=[(b"content-type", b"application/json")], body=b"{}")
EVENTS = AnswerStart(status=200, headers=[(b"content-type", b"text/event-stream; charset=utf-8")], body=b"data: 1\n\n")
LOST = ReplicaLostError("gone")


def call(body=None, path="/v1/completions"):
    return AsgiCall(
        method="POST",
        path=path,
        query_string=b"",
        headers=[(b"content-type", b"application/json")],
        body=json.dumps(body or {}).encode(),
        identity=RequestIdentity.draw(random.Random()),
    )


class Pool:
    """Each call plays the next script: parts are yielded, errors raised, None waits for ever."""

    def __init__(self, *scripts, up=True):
        self.scripts = list(scripts)
        self.up = up
        self.calls = []
        self.closed = 0

    async def call(self, call):
        self.calls.append(call)
        try:
            for part in self.scripts.pop(0):
                if part is None:
                    await asyncio.Event().wait()
                if isinstance(part, Exception):
                    raise part
                yield part
        finally:
            self.closed += 1

    def is_up(self):
        return self.up


async def answer(pool, patience=60.0, request=None):
    return [part async for part in Forwarder(pool, patience=patience).answer(request or call())]


async def test_a_request_that_loses_its_replica_before_the_first_byte_is_asked_again_as_the_same():
    pool = Pool([LOST], [LOST], [PLAIN])
    assert await answer(pool) == [PLAIN]
    assert len(pool.calls) == 3
    assert len({call.identity for call in pool.calls}) == 1
    assert pool.closed == 3


async def test_a_replica_that_ends_without_an_answer_counts_as_lost():
    assert await answer(Pool([], [PLAIN])) == [PLAIN]


async def test_a_request_that_takes_every_replica_with_it_gets_no_other():
    pool = Pool(*[[LOST]] * MAX_LOST_REPLICAS, [PLAIN])
    with pytest.raises(ReplicaLostError):
        await answer(pool)
    assert len(pool.calls) == MAX_LOST_REPLICAS


async def test_a_full_queue_refuses_new_requests_but_not_those_that_lost_their_replica():
    with pytest.raises(QueueFullError):
        await answer(Pool([QueueFullError("full")]))
    assert await answer(Pool([LOST], [QueueFullError("full")], [QueueFullError("full")], [PLAIN])) == [PLAIN]


async def test_a_stream_that_loses_its_replica_ends_with_an_error_event():
    parts = await answer(Pool([EVENTS, b"data: 2\n\n", LOST]))
    assert parts[:2] == [EVENTS, b"data: 2\n\n"]
    error, done = parts[2].decode().removesuffix("\n\n").split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    assert done == "data: [DONE]"


async def test_a_stream_that_was_complete_is_not_ended_twice():
    parts = [EVENTS, b"data: 2\n\ndata: [DONE]\n\n"]
    assert await answer(Pool([*parts, LOST])) == parts


async def test_a_body_that_is_no_stream_of_events_breaks_off():
    with pytest.raises(ReplicaLostError):
        await answer(Pool([PLAIN, b"more", LOST]))


async def test_patience_ends_when_no_replica_runs_and_not_when_all_are_busy():
    with pytest.raises(EngineLoadingError, match="No replica is running"):
        await answer(Pool([None], up=False), patience=0.05)
    task = asyncio.create_task(answer(Pool([None]), patience=0.05))
    await asyncio.sleep(0.3)
    assert not task.done()
    task.cancel()


async def test_closing_the_answer_closes_the_call():
    pool = Pool([EVENTS, None])
    parts = Forwarder(pool, patience=60).answer(call())
    assert await anext(parts) == EVENTS
    await parts.aclose()
    assert pool.closed == 1


async def in_pieces(app, request):
    parts = [part async for part in call_app(app, request)]
    return parts[0], b"".join([parts[0].body, *parts[1:]])


@pytest.mark.parametrize("stream", [False, True])
async def test_an_application_called_so_says_what_it_says_over_http(engine, client, stream):
    app = create_app(engine, ServerConfig())
    body = {"prompt": "ab", "stream": stream}
    request = call(body)
    start, text = await in_pieces(app, request)
    over_http = await client.post("/v1/completions", json=body)
    assert start.status == over_http.status_code == 200
    assert [(name.decode(), value.decode()) for name, value in start.headers] == over_http.headers.multi_items()
    assert f"cmpl-{request.identity.id}" in text.decode()
    assert engine.calls[0].request_id == f"cmpl-{request.identity.id}"


async def test_the_seed_of_the_identity_is_used_where_the_request_has_none(engine):
    app = create_app(engine, ServerConfig())
    request = call({"prompt": ["ab", "ab"], "temperature": 1})
    await in_pieces(app, request)
    seeds = [c.params.seed for c in engine.calls]
    assert seeds == [request.identity.seed, prompt_seed(request.identity.seed, 1)]
    assert len(set(seeds)) == 2
    await in_pieces(app, request)
    assert [c.params.seed for c in engine.calls[2:]] == seeds
    await in_pieces(app, call({"prompt": "ab", "seed": 7}))
    assert engine.calls[-1].params.seed == 7


async def test_leaving_a_called_application_aborts_the_request(engine):
    engine.hold = 1
    parts = call_app(create_app(engine, ServerConfig()), call({"prompt": "ab", "stream": True}))
    assert (await anext(parts)).is_event_stream
    await parts.aclose()
    assert len(engine.aborted) == 1
    assert engine.num_open_requests == 0


async def test_what_an_application_raises_is_raised():
    async def broken(scope, receive, send):
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        await in_pieces(broken, call())


def make_ingress(pool, *reports, **options):
    """The ASGI application of the ingress, with `pool` in the place of Ray's replicas, which have told `reports`."""
    ingress = Ingress.__new__(Ingress)
    ingress._replicas, ingress._roll_call, ingress._config = pool, RollCall(), RayServeConfig.from_args(options)
    for rank, (state, healthy) in enumerate(reports):
        ingress._roll_call.hear(report(rank, state=state, healthy=healthy))
    return ingress.__serve_build_asgi_app__()


def report(rank, *, state="ready", healthy=True, metrics=""):
    return ReplicaReport(rank=rank, state=state, healthy=healthy, num_open_requests=3, metrics=metrics)


def client_of(app, root_path=""):
    transport = httpx.ASGITransport(app, root_path=root_path, raise_app_exceptions=True)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.mark.parametrize(
    ("reports", "health", "ready"),
    [
        ([], (503, "loading"), (503, "loading")),
        ([("ready", True)], (200, "ready"), (200, "ready")),
        ([("ready", False), ("ready", True)], (200, "ready"), (200, "ready")),
        ([("ready", False)], (503, "stuck"), (503, "stuck")),
        ([("dead", False)], (503, "dead"), (503, "dead")),
        ([("draining", True)], (200, "draining"), (503, "stuck")),
    ],
)
async def test_health_is_that_of_the_replica_that_is_best_off(reports, health, ready):
    client = client_of(make_ingress(Pool(), *reports))
    for path, expected in (("/health", health), ("/ping", health), ("/ready", ready)):
        got = await client.get(path)
        assert (got.status_code, got.json()["status"]) == expected
    assert (await client.get("/load")).json() == {"server_load": 3 * len(reports)}


@pytest.mark.parametrize("root_path", ["", "/llm"])
async def test_keys_are_asked_for_at_the_ingress_whatever_the_prefix(root_path):
    pool = Pool([PLAIN])
    client = client_of(make_ingress(pool, ("ready", True), api_key="secret"), root_path)
    assert (await client.get(f"{root_path}/health")).status_code == 200
    refused = await client.get(f"{root_path}/v1/models")
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert pool.calls == []
    allowed = await client.get(f"{root_path}/v1/models?a=b", headers={"Authorization": "Bearer secret"})
    assert (allowed.status_code, allowed.content) == (200, b"{}")
    assert (pool.calls[0].path, pool.calls[0].query_string) == ("/v1/models", b"a=b")


async def test_errors_of_the_ingress_have_the_shape_of_all_errors():
    client = client_of(make_ingress(Pool([QueueFullError("full")])))
    answer = await client.post("/v1/completions", json={})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"] == {"message": "full", "type": "server_error", "param": None, "code": "queue_full"}


async def test_a_body_beyond_the_limit_is_refused_before_a_replica_is_asked():
    pool = Pool([PLAIN])
    client = client_of(make_ingress(pool))

    async def chunks():
        for _ in range(11):
            yield b" " * 2**20

    for content in (b" " * (10 * 2**20 + 1), chunks()):
        answer = await client.post("/v1/completions", content=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert pool.calls == []


def test_a_replica_that_is_silent_counts_as_gone(monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    roll_call = RollCall()
    roll_call.hear(report(1))
    now += FRESH_SECONDS / 2
    roll_call.hear(report(0, state="draining"))
    roll_call.hear(report(0))
    assert [(said.rank, said.state) for said in roll_call.reports()] == [(0, "ready"), (1, "ready")]
    now += FRESH_SECONDS * 0.75
    assert [said.rank for said in roll_call.reports()] == [0]


async def test_metrics_of_replicas_are_told_apart_by_the_label_engine(client):
    text = (await client.get("/metrics")).text
    merged, content_type = merge_expositions([(0, text), (2, text)], "")
    assert content_type.startswith("text/plain")
    lines = merged.decode().splitlines()
    running = [line for line in lines if line.startswith("vllm:num_requests_running{")]
    assert running == [
        'vllm:num_requests_running{engine="0",model_name="org/tiny"} 3.0',
        'vllm:num_requests_running{engine="2",model_name="org/tiny"} 3.0',
    ]
    assert lines.count("# TYPE vllm:time_to_first_token_seconds histogram") == 1
    plain = [line for line in text.splitlines() if not line.startswith("#")]
    assert len([line for line in lines if not line.startswith("#")]) == 2 * len(plain)
