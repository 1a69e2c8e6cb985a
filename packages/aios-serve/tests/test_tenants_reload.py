"""The file of tenants changes while the server runs: what is read, when, and what happens if it cannot be."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import asynccontextmanager

import pytest

from aios_model.errors import ConfigError
from aios_serve.tenants.file_format import read_tenants
from aios_serve.tenants.keys import digest_of
from aios_serve.tenants.registry import TenantRegistry
from aios_serve.tenants.watcher import TenantsWatcher


def text(**tenants):
    return "".join(
        f'[tenants.{name}]\n{terms}\n[[tenants.{name}.keys]]\nsha256 = "{digest_of(name.encode()).hex()}"\n'
        for name, terms in tenants.items()
    )


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text(text(alice="requests_per_minute = 2", bob=""))
    return path


@asynccontextmanager
async def watching(registry, interval=0.01):
    watcher = TenantsWatcher(registry, registry.path, interval=interval)
    task = asyncio.create_task(watcher.run())
    try:
        yield watcher
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_change_is_read_and_counters_stay(path):
    registry = TenantRegistry(path=path)
    account = registry.find(b"alice")
    account.enter()
    async with watching(registry):
        path.write_text(text(alice="requests_per_minute = 5", carol=""))
        await until(lambda: registry.find(b"carol"))
        assert registry.find(b"bob") is None
        assert registry.find(b"alice") is account
        assert account.requests.per_minute == 5
        assert account.num_running == 1
        assert account.requests.available < 2


async def test_a_file_put_in_place_by_renaming_is_read(path, tmp_path):
    registry = TenantRegistry(path=path)
    async with watching(registry):
        new = tmp_path / "new"
        new.write_text(text(dora=""))
        os.utime(new, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))  # as `cp -p` would leave it
        new.rename(path)
        await until(lambda: registry.find(b"dora"))


async def test_a_broken_file_changes_nothing_and_is_reported_once(path, caplog):
    registry = TenantRegistry(path=path)
    async with watching(registry):
        path.write_text(text(alice="") + "[tenants.bob]\nweight = -1\n")
        await until(lambda: "stay as they were" in caplog.text)
        await asyncio.sleep(0.1)
        assert caplog.text.count("stay as they were") == 1
        assert "tenants.bob.weight" in caplog.text
        assert "line 6" in caplog.text
        assert [tenant.requests_per_minute for tenant in registry.tenants] == [2, None]
        path.unlink()
        await until(lambda: "there is no file" in caplog.text)
        assert registry.find(b"bob")
        path.write_text(text(bob=""))
        await until(lambda: registry.find(b"alice") is None)


async def test_what_the_policy_cannot_honour_changes_nothing(path, caplog):
    registry = TenantRegistry(path=path)
    async with watching(registry):
        path.write_text(text(alice="weight = 2"))
        await until(lambda: "no effect under scheduling_policy='fcfs'" in caplog.text)
        assert registry.find(b"bob")


async def test_half_a_file_is_not_taken_for_a_whole_one(path):
    registry = TenantRegistry(path=path)
    async with watching(registry, interval=0.2):
        whole = text(alice="", carol="")
        path.write_text("")  # an editor begins to write
        await asyncio.sleep(0.05)
        path.write_text(whole)
        seen = set()
        async with asyncio.timeout(5):
            while not registry.find(b"carol"):
                seen.add(registry.find(b"alice") is not None)
                await asyncio.sleep(0.005)
        assert seen == {True}


async def test_told_to_it_reads_at_once(path, caplog):
    caplog.set_level(logging.INFO)
    registry = TenantRegistry(path=path)
    async with watching(registry, interval=60) as watcher:
        path.write_text(text(carol=""))
        watcher.reload_now()
        await until(lambda: registry.find(b"carol"))
        assert "the tenants have changed: 1" in caplog.text


async def test_a_file_that_changed_before_anyone_watched_is_read(path):
    registry = TenantRegistry(path=path)
    path.write_text(text(carol=""))
    async with watching(registry):
        await until(lambda: registry.find(b"carol"))


def test_adopting_is_all_or_nothing(path):
    registry = TenantRegistry(path=path, api_keys=("root",))
    path.write_text(text(alice="requests_per_minute = 9", root=""))
    with pytest.raises(ConfigError, match="API key of the operator"):
        registry.adopt(read_tenants(path))
    assert registry.find(b"alice").requests.per_minute == 2
    assert registry.find(b"bob")
