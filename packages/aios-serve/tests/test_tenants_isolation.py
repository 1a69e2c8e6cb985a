"""Tenants on a real scheduler and real pages: none sees another's prefixes, and weights reach the policy."""

from __future__ import annotations

import asyncio
import importlib.util
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from aios_serve.app import create_app
from aios_serve.async_engine import AsyncEngine
from aios_serve.config import EngineConfig
from aios_serve.engine_client import ThreadClient
from aios_serve.engine_process import serve
from aios_serve.server_config import ServerConfig
from aios_serve.tenants.file_format import parse_tenants
from aios_serve.tenants.keys import digest_of
from aios_serve.tenants.registry import TenantRegistry

spec = importlib.util.spec_from_file_location("scripted", Path(__file__).with_name("scripted.py"))
scripted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripted)

PROMPT = "a prompt that fills several pages of four"


def text(**tenants):
    return "".join(
        f'[tenants.{name}]\n{terms}\n[[tenants.{name}.keys]]\nsha256 = "{digest_of(name.encode()).hex()}"\n'
        for name, terms in tenants.items()
    )


@asynccontextmanager
async def serving(path, *, api_keys=(), **options):
    ports = []

    def build(config, progress):
        built = scripted.build_scripted(config, progress)
        ports.append(built.port)
        return built

    config = EngineConfig(**options)
    engine = AsyncEngine(
        config,
        new_client=lambda replica: ThreadClient(lambda channel: serve(channel, build)),
        find=scripted.find_scripted,
        read=scripted.read_scripted,
    )
    server = ServerConfig(tenants=path, api_keys=api_keys)
    registry = TenantRegistry.of(server, config)
    app = create_app(engine, server, registry)
    await engine.start()
    await engine.wait_ready()
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            yield client, registry, ports
    finally:
        await engine.shutdown()


async def complete(client, key, prompt=PROMPT, **fields):
    body = {"prompt": prompt, "max_tokens": 4} | fields
    response = await client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
    assert response.status_code == 200, response.text
    return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


async def test_cached_tokens_of_another_tenant_are_0_unless_shared_on_purpose(tmp_path):
    path = tmp_path / "tenants.toml"
    shared = 'prefix_cache = "shared"'
    path.write_text(text(a="", b="", c=shared, d=shared, e=f'{shared}\ncache_group = "other"'))
    async with serving(path, api_keys=("one", "two")) as (client, _, _):
        for key in ("a", "b", "c", "e", "one", "two"):  # whoever came before, the first time nothing is there
            assert await complete(client, key) == 0, key
            assert await complete(client, key) > 0, key
        assert await complete(client, "d") > 0
        for salt in ("tenant:b", "tenant:a", "group:shared", "group:other"):
            assert await complete(client, "a", cache_salt=salt) == 0


async def test_prompts_at_the_same_time_are_not_shared_either(tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text(text(a="", b=""))
    async with serving(path) as (client, _, _):
        slow = scripted.SLOW + PROMPT
        cached = await asyncio.gather(*(complete(client, key, slow, max_tokens=8) for key in ("a", "b")))
        assert cached == [0, 0]


async def test_weights_reach_the_policy_and_follow_the_file(tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text(text(a="weight = 2", b=""))
    async with serving(path, scheduling_policy="fair") as (client, registry, ports):
        policy = ports[0]._engine._scheduler._waiting
        for key in ("a", "b"):
            await complete(client, key)
        assert {name: tenant.weight for name, tenant in policy._tenants.items()} == {"a": 2.0, "b": 1.0}
        assert policy.counters["b"] > 0
        registry.adopt(parse_tenants(text(a="weight = 0.5", b=""), source="test"))
        await complete(client, "a")
        assert policy._tenants["a"].weight == 0.5
