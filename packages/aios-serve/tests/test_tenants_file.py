"""The file of tenants: what it may say, and that mistakes are named with their line and field."""

from __future__ import annotations

from datetime import date

import pytest

from aios_model.errors import ConfigError
from aios_serve.tenants.file_format import parse_tenants, read_tenants
from aios_serve.tenants.keys import PREFIX, digest_of, new_key
from aios_serve.tenants.registry import TenantRegistry
from aios_serve.tenants.tenant import Tenant, TenantKey
from aios_serve.tenants.toml_lines import line_of

DIGESTS = [digest_of(bytes([number])).hex() for number in range(4)]
WHOLE = f"""
# Who may use the server.
[tenants.alice]          # research
enabled = true
weight = 2
requests_per_minute = 60
tokens_per_minute = 100_000
max_concurrent = 8
max_context = 4096
models = ["llama", "org/qwen"]
prefix_cache = "shared"
cache_group = "research"

[[tenants.alice.keys]]
sha256 = "{DIGESTS[0]}"
note = "laptop"
created = 2026-11-20

[[tenants.alice.keys]]
sha256 = "{DIGESTS[1]}"
created = 2026-11-20T10:00:00Z

[tenants."b.o-b_2"]
priority = 3
best_priority = -1
"""


def parse(text):
    return parse_tenants(text, source="tenants.toml")


def test_everything_a_file_may_say():
    alice, bob = parse(WHOLE)
    assert alice == Tenant(
        name="alice",
        keys=(
            TenantKey(sha256=DIGESTS[0], note="laptop", created=date(2026, 11, 20)),
            TenantKey(sha256=DIGESTS[1], created=date(2026, 11, 20)),
        ),
        weight=2.0,
        requests_per_minute=60,
        tokens_per_minute=100_000,
        max_concurrent=8,
        max_context=4096,
        models=("llama", "org/qwen"),
        prefix_cache="shared",
        cache_group="research",
    )
    assert bob == Tenant(name="b.o-b_2", priority=3, best_priority=-1)
    assert type(alice.keys[1].created) is date


@pytest.mark.parametrize("text", ["", "[tenants]", "# nothing\n"])
def test_no_tenants_is_a_file_too(text):
    assert parse(text) == ()


KEY = f'[[tenants.a.keys]]\nsha256 = "{DIGESTS[0]}"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[tenants.a]\nweight = 0\n", ["line 2", "tenants.a.weight", "0.001"]),
        ("[tenants.a]\nweight = nan", ["line 2", "tenants.a.weight"]),
        ("[tenants.a]\n\nweight = true", ["line 3", "tenants.a.weight"]),
        ('[tenants.a]\nweight = "2"', ["line 2", "'2'"]),
        ("[tenants.a]\nenabled = 1", ["line 2", "tenants.a.enabled", "true or false"]),
        ("[tenants.a]\nrequests_per_minute = 0", ["line 2", "requests_per_minute", "at least 1"]),
        ("[tenants.a]\nrequests_per_minute = 1.5", ["whole number"]),
        ("[tenants.a]\ntokens_per_minute = -5", ["tokens_per_minute"]),
        ("[tenants.a]\nmax_concurrent = 0", ["max_concurrent"]),
        ("[tenants.a]\nmax_context = 1", ["max_context", "at least 2"]),
        (f"[tenants.a]\nmax_context = {2**80}", ["max_context"]),
        ("[tenants.a]\nmodels = []", ["models", "leave it out"]),
        ('[tenants.a]\nmodels = "llama"', ["models"]),
        ('[tenants.a]\nprefix_cache = "open"', ["prefix_cache", '"private" or "shared"']),
        ('[tenants.a]\ncache_group = "g"', ["cache_group", "private"]),
        ('[tenants.a]\nprefix_cache = "shared"\ncache_group = "a/b"', ["line 3", "cache_group"]),
        ("[tenants.a]\npriority = 0\nbest_priority = 1", ["line 3", "best_priority", "worse"]),
        ("[tenants.a]\nrequest_per_minute = 5", ["line 2", "did you mean 'requests_per_minute'"]),
        ("[tenants.a]\nzzz = 5", ["zzz", "known are", "weight"]),
        ("[tenant.a]\n", ["line 1", "tenant", "did you mean 'tenants'"]),
        ("tenants = 5", ["line 1", "must be a table"]),
        ("[tenants]\na = 5", ["line 2", "tenants.a", "must be a table"]),
        ("[tenants.default]\n", ["line 1", "'default'"]),
        ("[tenants.key-1]\n", ["line 1", "'key-1'", "taken"]),
        ('[tenants."a/b"]\n', ["line 1", "'a/b'"]),
        ('[tenants."ä"]\n', ["'ä'"]),
        (f"[tenants.{'a' * 65}]", ["64"]),
        ("[tenants.a]\nkeys = 5", ["line 2", "tenants.a.keys", "[["]),
        ('[[tenants.a.keys]]\nnote = "x"\n', ["line 1", "tenants.a.keys.0", "no sha256"]),
        ('[[tenants.a.keys]]\nkey = "sk-x"\n', ["key", "not known"]),
        (KEY + '\n[[tenants.a.keys]]\nsha256 = "sk-aios-x"', ["line 5", "tenants.a.keys.1.sha256", "never the key"]),
        (f'[[tenants.a.keys]]\nsha256 = "{DIGESTS[0].upper()}"', ["lower case"]),
        (KEY + "note = 5", ["line 3", "tenants.a.keys.0.note"]),
        (KEY + 'note = "a\\nb"', ["one line"]),
        (KEY + 'created = "2026-11-20"', ["created", "without quotes"]),
        (KEY + KEY, ["line 4", "a key of 'a' already"]),
        (KEY + KEY.replace("tenants.a", "tenants.b"), ["line 4", "tenants.b.keys.0", "a key of 'a' already"]),
        ("[tenants.a]\nweight =\nmodels = []", ["not TOML", "line 2"]),
        ("[tenants.a]\n[tenants.a]", ["not TOML"]),
    ],
)
def test_a_mistake_is_named_with_its_place(text, words):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    message = str(caught.value)
    assert "tenants.toml" in message
    assert all(word in message for word in words), message


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(ConfigError, match="aios-serve tenants add NAME --file"):
        read_tenants(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "binary.toml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_tenants(path)


def test_lines_of_things_that_have_none_of_their_own():
    text = "[tenants]\na = { weight = 0, keys = [] }\n[tenants.b]\n[[tenants.b.keys]] # 1\n[[ tenants.b.keys ]]\nx=1"
    assert line_of(text, ("tenants", "a", "weight")) == 2
    assert line_of(text, ("tenants", "b", "keys", 1, "x")) == 6
    assert line_of(text, ("tenants", "b", "keys", 0, "y")) == 4
    assert line_of(text, ("nothing",)) is None


def test_keys_are_random_and_known_by_their_digest():
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith(PREFIX) and len(key) >= len(PREFIX) + 43 for key in keys)


def test_scopes_of_caches_are_equal_only_where_that_is_meant():
    tenants = [
        Tenant(name="a"),
        Tenant(name="b"),
        Tenant(name="shared"),
        Tenant(name="c", prefix_cache="shared"),
        Tenant(name="d", prefix_cache="shared"),
        Tenant(name="e", prefix_cache="shared", cache_group="a"),
        Tenant(name="f", prefix_cache="shared", cache_group="g"),
        Tenant(name="g", prefix_cache="shared", cache_group="g"),
    ]
    scopes = [tenant.cache_scope for tenant in tenants]
    assert scopes[3] == scopes[4]
    assert scopes[6] == scopes[7]
    assert len(set(scopes)) == 6
    assert "" not in scopes


@pytest.mark.parametrize(
    ("field", "policy", "other"), [("weight", "fair", "fcfs"), ("priority", "priority", "fair")], ids=["weight", "prio"]
)
def test_what_the_policy_cannot_honour_is_refused(tmp_path, field, policy, other):
    path = tmp_path / "tenants.toml"
    path.write_text(f"[tenants.a]\n{field} = 2\n")
    TenantRegistry(path=path, scheduling_policy=policy)
    with pytest.raises(ConfigError, match=rf"tenants\.a\.{field} has no effect under scheduling_policy='{other}'"):
        TenantRegistry(path=path, scheduling_policy=other)


def test_a_key_cannot_be_the_operators_and_a_tenants(tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text(f'[[tenants.a.keys]]\nsha256 = "{digest_of(b"mine").hex()}"\n')
    with pytest.raises(ConfigError, match="API key of the operator"):
        TenantRegistry(path=path, api_keys=("other", "mine"))


def test_the_registry_finds_every_key_and_no_other(tmp_path):
    path = tmp_path / "tenants.toml"
    keys = [new_key() for _ in range(50)]
    lines = [
        f'[[tenants.t{number % 7}.keys]]\nsha256 = "{digest_of(key.encode()).hex()}"' for number, key in enumerate(keys)
    ]
    path.write_text("\n".join(lines))
    registry = TenantRegistry(path=path, api_keys=("one", "two"))
    found = [registry.find(key.encode()) for key in keys]
    assert [account.tenant.name for account in found] == [f"t{number % 7}" for number in range(50)]
    assert found[0] is found[7]
    assert registry.find(b"two").tenant.name == "key-2"
    assert registry.find(b"two").tenant.is_operator
    for wrong in (b"", b"three", keys[0][:-1].encode(), bytes.fromhex(digest_of(keys[0].encode()).hex())):
        assert registry.find(wrong) is None
    assert len(registry.accounts) == 9
