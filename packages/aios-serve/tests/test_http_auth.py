"""API keys: what needs one, what does not, and no way around."""

from __future__ import annotations

import pytest

HELLO = {"messages": [{"role": "user", "content": "Hi"}]}
KEYS = ("first-key", "second-key")


@pytest.fixture
def locked(make_client):
    return make_client(api_keys=KEYS)


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("key", KEYS)
async def test_each_key_opens(locked, key):
    assert (await locked.post("/v1/chat/completions", json=HELLO, headers=bearer(key))).status_code == 200


async def test_scheme_is_case_insensitive(locked):
    assert (await locked.get("/v1/models", headers={"authorization": "bearer first-key"})).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        bearer("first-keyx"),
        bearer("first-ke"),
        bearer(""),
        {"authorization": "first-key"},
        {"authorization": "Basic first-key"},
        {"authorization": "Bearer"},
        {"authorization": b"Bearer \xff\xfe"},
        {"x-api-key": "first-key"},
    ],
)
async def test_without_a_right_key_it_is_401(locked, headers):
    response = await locked.post("/v1/chat/completions", json=HELLO, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert "first-key" not in response.text


async def test_two_keys_in_one_request_are_refused(locked):
    headers = [("authorization", "Bearer wrong"), ("authorization", "Bearer first-key")]
    assert (await locked.get("/v1/models", headers=headers)).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping"])
async def test_probes_are_public(locked, path):
    assert (await locked.get(path)).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1/models",
        "/v1/models/tiny",
        "/metrics",
        "/version",
        "/load",
        "/openapi.json",
        "/docs",
        "/nothing",
        "/health/",
        "/Health",
        "//health",
        "/health/../v1/models",
        "/v1/models;/health",
        "/v1/models?/health",
        "/%2e/health",
    ],
)
async def test_everything_else_needs_a_key(locked, path):
    assert (await locked.get(path)).status_code == 401


async def test_every_route_but_the_probes_needs_a_key(engine, locked):
    app = locked._transport.app
    paths = set(app.openapi()["paths"]) - {"/health", "/ready", "/live", "/ping"}
    assert {"/v1/chat/completions", "/tokenize", "/metrics"} <= paths
    for path in paths:
        for method in ("GET", "POST"):
            assert (await locked.request(method, path)).status_code == 401


@pytest.mark.parametrize("host", ["test/health?", "health", "test/health#", "evil/health"])
async def test_a_forged_host_opens_nothing(locked, host):
    assert (await locked.get("/v1/models", headers={"host": host})).status_code == 401


async def test_a_root_path_opens_nothing(locked):
    app = locked._transport.app
    for path, root_path in (("/health/v1/models", "/health"), ("/health", "/health"), ("/x/health", "/x")):
        statuses = []

        async def send(message, statuses=statuses):
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        scope = {"type": "http", "method": "GET", "path": path, "root_path": root_path, "headers": []}
        await app(scope | {"query_string": b""}, receive, send)
        assert statuses == [401]


async def test_websockets_need_a_key_too(locked):
    sent = []

    async def send(message):
        sent.append(message["type"])

    async def receive():
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/health", "headers": [], "query_string": b""}
    await locked._transport.app(scope, receive, send)
    assert sent == ["websocket.close"]


async def test_without_keys_nothing_is_asked(client):
    assert (await client.get("/v1/models")).status_code == 200


async def test_body_is_not_read_without_a_key(locked):
    read = []

    async def body():
        read.append(1)
        yield b"{}"

    # The transport reads the first piece before it knows the answer; a second would mean that we asked for it.
    assert (await locked.post("/v1/chat/completions", content=body())).status_code == 401
    assert read == []
