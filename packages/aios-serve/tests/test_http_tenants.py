"""Tenants over HTTP: limits, models, caches, priorities, figures; and that none of them is another's."""

from __future__ import annotations

import asyncio
import json
import math

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from aios_serve.app import create_app
from aios_serve.config import EngineConfig
from aios_serve.server_config import ServerConfig
from aios_serve.tenants.file_format import parse_tenants
from aios_serve.tenants.keys import digest_of
from aios_serve.tenants.registry import TenantRegistry

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HELLO = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 10}
PROMPT_TOKENS = len("<user>Hi<assistant>")


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Place:
    """A server with tenants: `place.write(alice="weight = 2")`, then `place.post("alice")`. Names are the keys."""

    def __init__(self, engine, path):
        self.engine, self.path, self.clock = engine, path, Clock()
        self.registry = self.client = None

    def write(self, **tenants):
        self.path.write_text(self.text(**tenants))
        return self

    @staticmethod
    def text(**tenants):
        return "".join(
            f'[tenants.{name}]\n{terms}\n[[tenants.{name}.keys]]\nsha256 = "{digest_of(name.encode()).hex()}"\n'
            for name, terms in tenants.items()
        )

    def open(self, policy="fcfs", api_keys=()):
        self.engine.config = EngineConfig(scheduling_policy=policy)
        config = ServerConfig(tenants=self.path, api_keys=api_keys)
        self.registry = TenantRegistry(path=self.path, api_keys=api_keys, scheduling_policy=policy, clock=self.clock)
        app = create_app(self.engine, config, self.registry)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
        return self

    def adopt(self, **tenants):
        self.registry.adopt(parse_tenants(self.text(**tenants), source="test"))

    async def post(self, key, path=CHAT, body=None, **fields):
        return await self.client.post(path, json=(body or HELLO) | fields, headers={"authorization": f"Bearer {key}"})

    async def get(self, key, path):
        return await self.client.get(path, headers={"authorization": f"Bearer {key}"})

    async def figures(self, key):
        """{(name, labels without the tenant's): value} of each tenant that this key may see."""
        seen = {}
        for family in text_string_to_metric_families((await self.get(key, "/metrics")).text):
            for sample in family.samples:
                if sample.name.startswith("aios_tenant"):
                    labels = dict(sample.labels)
                    seen.setdefault(labels.pop("tenant"), {})[(sample.name, *labels.values())] = sample.value
        return seen


@pytest.fixture
def place(engine, tmp_path):
    return Place(engine, tmp_path / "tenants.toml")


def error(response, status):
    assert response.status_code == status, response.text
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return body


async def test_keys_open_for_their_tenants_only(place):
    place.write(alice="", bob="enabled = false").open()
    assert (await place.post("alice")).status_code == 200
    [call] = place.engine.calls
    assert (call.tenant, call.tenant_weight, call.priority) == ("alice", 1.0, 0)
    for response in (await place.post("bob"), await place.get("bob", "/v1/models")):
        body = error(response, 403)
        assert (body["code"], body["type"]) == ("tenant_disabled", "permission_error")
    error(await place.post("carol"), 401)
    assert (await place.client.get("/health")).status_code == 200
    assert (await place.client.get("/metrics")).status_code == 401


async def test_weight_travels_with_each_request_also_after_a_reload(place):
    place.write(alice="weight = 2.5").open("fair")
    await place.post("alice")
    place.adopt(alice="weight = 4")
    await place.post("alice", COMPLETIONS, {"prompt": "x"})
    assert [call.tenant_weight for call in place.engine.calls] == [2.5, 4.0]


async def test_requests_per_minute(place):
    place.write(alice="requests_per_minute = 3", bob="requests_per_minute = 1").open()
    for left in (2, 1, 0):
        response = await place.post("alice")
        assert response.status_code == 200
        assert response.headers["x-ratelimit-remaining-requests"] == str(left)
        assert response.headers["x-ratelimit-limit-requests"] == "3"
    response = await place.post("alice")
    body = error(response, 429)
    assert response.headers["retry-after"] == "20"
    assert (body["code"], body["type"], body["param"]) == ("rate_limit_exceeded", "requests", None)
    assert all(word in body["message"] for word in ("'alice'", "requests_per_minute", "limit 3", "left 0", "20 s"))
    assert (await place.post("bob")).status_code == 200
    assert (await place.get("alice", "/v1/models")).status_code == 200  # lists are free
    place.clock.now += 20
    assert (await place.post("alice", "/tokenize", {"prompt": "x"})).status_code == 200  # work is counted
    assert (await place.post("alice")).status_code == 429
    assert len(place.engine.calls) == 4


async def test_an_exhausted_tenant_is_refused_before_its_body_is_read(place):
    place.write(alice="requests_per_minute = 1").open()
    await place.post("alice")
    read = []

    async def body():
        read.append(1)
        yield b"{}"

    response = await place.client.post(CHAT, content=body(), headers={"authorization": "Bearer alice"})
    assert response.status_code == 429
    assert read == []


async def test_tokens_per_minute_counts_prompts_and_answers_and_gives_back_the_rest(place):
    place.write(alice="tokens_per_minute = 100").open()
    assert (await place.post("alice")).status_code == 200  # "Hello!", 6 of 10
    account = place.registry.find(b"alice")
    assert (account.tokens.available, account.tokens.held) == (100 - PROMPT_TOKENS - 6, 0)
    response = await place.post("alice", n=2)  # one prompt, two answers; the header still counts what is held
    assert response.headers["x-ratelimit-remaining-tokens"] == str(100 - 2 * PROMPT_TOKENS - 6 - 20)
    assert (await place.post("alice")).status_code == 200
    left = 100 - 3 * PROMPT_TOKENS - 4 * 6
    response = await place.post("alice")
    body = error(response, 429)
    assert body["type"] == "tokens"
    assert f"left {left}, asked for {PROMPT_TOKENS + 10}" in body["message"]
    assert int(response.headers["retry-after"]) == math.ceil((PROMPT_TOKENS + 10 - left) * 0.6)
    place.clock.now += int(response.headers["retry-after"])
    assert (await place.post("alice")).status_code == 200


async def test_a_request_that_never_fits_is_400_and_costs_no_tokens(place):
    place.write(alice="tokens_per_minute = 60\nmax_concurrent = 2").open()
    body = error(await place.post("alice", max_tokens=60), 400)
    assert (body["code"], body["param"]) == ("tenant_limit_exceeded", "max_tokens")
    assert "tokens_per_minute is 60" in body["message"]
    body = error(await place.post("alice", n=3, max_tokens=1), 400)
    assert (body["code"], body["param"]) == ("tenant_limit_exceeded", "n")
    long = {"prompt": "x" * 100, "max_tokens": 5}
    assert error(await place.post("alice", COMPLETIONS, long), 400)["param"] == "prompt"
    assert place.engine.calls == []
    assert place.registry.find(b"alice").tokens.available == 60


async def test_an_answer_without_a_length_is_as_long_as_the_minute_allows(place):
    place.write(alice="tokens_per_minute = 60", bob="max_context = 30").open()
    body = {"messages": HELLO["messages"]}
    assert (await place.post("alice", body=body)).status_code == 200
    assert (await place.post("bob", body=body)).status_code == 200
    assert [call.params.max_tokens for call in place.engine.calls] == [60 - PROMPT_TOKENS, 30 - PROMPT_TOKENS]


async def test_max_context_bounds_prompt_and_answer(place):
    place.write(alice="max_context = 30").open()
    assert (await place.post("alice", max_tokens=30 - PROMPT_TOKENS)).status_code == 200
    for path, body in (
        (CHAT, HELLO | {"max_tokens": 30}),
        (COMPLETIONS, {"prompt": "x" * 30, "max_tokens": 5}),
        (RESPONSES, {"input": "Hi", "max_output_tokens": 30}),
    ):
        reply = error(await place.post("alice", path, body), 400)
        assert reply["code"] == "context_length_exceeded"
        assert "tenant 'alice'" in reply["message"]
        assert "30 tokens" in reply["message"]


async def test_models_of_a_tenant(place):
    place.write(alice='models = ["tiny", "elsewhere"]', bob='models = ["elsewhere"]', carol="").open()
    names = {
        key: [card["id"] for card in (await place.get(key, "/v1/models")).json()["data"]] for key in ("alice", "bob")
    }
    assert names == {"alice": ["tiny"], "bob": []}
    assert (await place.post("alice")).json()["model"] == "tiny"
    for path in (CHAT, COMPLETIONS, RESPONSES, "/tokenize"):
        body = {CHAT: HELLO, RESPONSES: {"input": "x"}}.get(path, {"prompt": "x"})
        reply = error(await place.post("alice", path, body, model="org/tiny"), 404)
        assert reply["code"] == "model_not_found"
        assert "served: 'tiny'" in reply["message"]
    error(await place.get("alice", "/v1/models/org/tiny"), 404)
    error(await place.post("bob"), 404)
    assert (await place.post("carol", model="org/tiny")).status_code == 200
    assert place.registry.models_not_served(place.engine.model_names) == ["elsewhere"]


async def test_max_concurrent_counts_choices_and_is_free_again_afterwards(place):
    place.write(alice="max_concurrent = 3", bob="max_concurrent = 1").open()
    place.engine.hold = 1
    running = asyncio.create_task(place.post("alice", n=2))
    await place.engine.held.wait()
    body = error(await place.post("alice", n=2), 429)
    assert body["type"] == "concurrency"
    assert "limit 3, running 3, asked for 1" in body["message"]
    more = asyncio.create_task(place.post("alice"))
    bobs = asyncio.create_task(place.post("bob"))
    await asyncio.sleep(0.05)
    assert error(await place.post("alice"), 429)["code"] == "rate_limit_exceeded"
    place.engine.go.set()
    assert [(await each).status_code for each in (running, more, bobs)] == [200, 200, 200]
    assert (await place.post("alice", n=3)).status_code == 200
    assert {account.num_running for account in place.registry.accounts} == {0}


async def test_priorities_have_a_default_and_a_best(place):
    place.write(alice="priority = 5\nbest_priority = 2", bob="").open("priority")
    for key, fields in (
        ("alice", {}),
        ("alice", {"priority": 2}),
        ("alice", {"priority": 9}),
        ("bob", {"priority": 7}),
    ):
        assert (await place.post(key, **fields)).status_code == 200
    assert [call.priority for call in place.engine.calls] == [5, 2, 9, 7]
    for key, priority in (("alice", 1), ("bob", -1)):
        assert error(await place.post(key, priority=priority), 400)["param"] == "priority"


async def test_salts_are_the_tenants_own_unless_shared(place):
    shared = 'prefix_cache = "shared"'
    place.write(a="", b="", c=shared, d=shared, e=f'{shared}\ncache_group = "x"').open(api_keys=("root",))
    for key in ("a", "b", "c", "d", "e", "root"):
        await place.post(key)
    salts = [call.cache_salt for call in place.engine.calls]
    assert salts[2] == salts[3]
    assert len(set(salts)) == 5
    assert "" not in salts
    for salt in ("tenant:b", "group:shared", "b", salts[1], salts[2], f"../{salts[1]}"):
        await place.post("a", cache_salt=salt)  # no salt of a client leads out of its scope
        assert place.engine.calls[-1].cache_salt.startswith("tenant:a/")
        await place.post("root", cache_salt=salt)
        assert place.engine.calls[-1].cache_salt.startswith("tenant:default/")


async def test_several_api_keys_do_not_share_a_cache_and_a_single_one_is_as_it_was(make_client, engine):
    for keys, salts in ((("one", "two"), ["tenant:key-1", "tenant:key-1/s"]), (("one",), ["", "s"])):
        engine.calls.clear()
        client = make_client(api_keys=keys)
        for fields in ({}, {"cache_salt": "s", "priority": -3}):
            assert (await client.post(CHAT, json=HELLO | fields, headers={"authorization": "Bearer one"})).is_success
        assert [call.cache_salt for call in engine.calls] == salts


async def test_api_keys_beside_tenants_are_the_operators(place):
    place.write(alice="requests_per_minute = 1").open(api_keys=("root",))
    for _ in range(3):
        assert (await place.post("root", priority=-1)).status_code == 200
    assert {call.tenant for call in place.engine.calls} == {"default"}
    await place.post("alice")
    assert set(await place.figures("root")) == {"default", "alice"}
    assert set(await place.figures("alice")) == {"alice"}  # nobody else's names, nobody else's load


async def test_figures_of_a_tenant(place):
    place.write(alice="requests_per_minute = 3", bob="").open()
    await place.post("alice")
    await place.post("alice", temperature=-1)
    place.engine.error, place.engine.error_at = RuntimeError("broken"), 1
    assert (await place.post("alice", stream=True)).status_code == 200
    await place.post("alice")
    seen = await place.figures("alice")
    assert set(seen) == {"alice"}
    figures = seen["alice"]
    outcomes = {key[1]: value for key, value in figures.items() if key[0] == "aios_tenant_requests_total"}
    assert outcomes == {
        "success": 1, "invalid": 1, "failed": 1, "throttled": 1, "unavailable": 0, "disconnected": 0
    }  # fmt: skip
    assert figures[("aios_tenant_throttled_total", "requests_per_minute")] == 1
    assert figures[("aios_tenant_prompt_tokens_total",)] == 2 * PROMPT_TOKENS
    assert figures[("aios_tenant_cached_tokens_total",)] == 4
    assert figures[("aios_tenant_generation_tokens_total",)] == 9
    assert figures[("aios_tenant_concurrent_sequences",)] == 0
    assert figures[("aios_tenant_time_to_first_token_seconds_count",)] == 2
    assert figures[("aios_tenant_time_to_first_token_seconds_bucket", "+Inf")] == 2


async def test_without_keys_there_are_no_tenants(client):
    assert (await client.post(CHAT, json=HELLO | {"cache_salt": "s", "priority": 3})).status_code == 200
    assert "aios_tenant" not in (await client.get("/metrics")).text


async def test_what_the_server_cannot_take_does_not_count(place):
    place.write(alice="requests_per_minute = 1").open()
    state = place.engine.state
    place.engine.state = type(state).DRAINING
    for _ in range(3):
        assert (await place.post("alice")).status_code == 503
    place.engine.state = state
    assert (await place.post("alice")).status_code == 200
    assert place.registry.find(b"alice").outcomes["unavailable"] == 3


async def test_a_client_that_goes_away_frees_what_it_held(place):
    place.write(alice="max_concurrent = 1\ntokens_per_minute = 100").open()
    account = place.registry.find(b"alice")
    place.engine.hold = 1
    app = place.client._transport.app
    sent, gone = [], asyncio.Event()
    body = [{"type": "http.request", "body": json.dumps(HELLO | {"stream": True}).encode(), "more_body": False}]

    async def receive():
        if body:
            return body.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    headers = [(b"authorization", b"Bearer alice"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "root_path": "", "query_string": b"", "headers": headers}
    task = asyncio.create_task(app(scope, receive, send))
    await place.engine.held.wait()
    assert (account.num_running, account.tokens.held) == (1, 10 - len("Hel"))
    gone.set()
    await asyncio.wait_for(task, 5)
    assert (account.num_running, account.tokens.held) == (0, 0)
    assert account.tokens.available == 100 - PROMPT_TOKENS - len("Hel")
    assert account.outcomes["disconnected"] == 1


async def test_a_revoked_key_fails_at_its_next_request_and_open_ones_end(place):
    place.write(alice="max_concurrent = 5", bob="").open()
    place.engine.hold = 1
    running = asyncio.create_task(place.post("alice"))
    await place.engine.held.wait()
    place.adopt(bob="")
    error(await place.post("alice"), 401)
    place.engine.go.set()
    assert (await running).status_code == 200
    assert [account.tenant.name for account in place.registry.accounts] == ["bob"]


async def test_a_flood_is_throttled_and_the_other_tenant_is_not(place):
    place.write(flood="requests_per_minute = 60", calm="requests_per_minute = 60").open()
    statuses = {"flood": [], "calm": []}
    for tick in range(600):  # a minute: ten requests a second, and one every two seconds
        place.clock.now += 0.1
        statuses["flood"].append((await place.post("flood")).status_code)
        if tick % 20 == 0:
            statuses["calm"].append((await place.post("calm")).status_code)
    assert set(statuses["calm"]) == {200}
    assert statuses["flood"].count(429) == 600 - statuses["flood"].count(200)
    assert 118 <= statuses["flood"].count(200) <= 120  # a burst, and what flowed in


async def test_memory_does_not_grow_with_requests_or_wrong_keys(place):
    place.write(alice="requests_per_minute = 1").open()
    for number in range(300):
        await place.post(f"wrong-{number}")
        await place.post("alice", user=str(number))
    assert len(place.registry.accounts) == 1
    assert len((await place.figures("alice"))["alice"]) < 50
