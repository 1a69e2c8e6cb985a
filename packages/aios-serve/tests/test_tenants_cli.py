"""`aios-serve tenants`: what it writes the server reads, what it shows are no keys, and the rest of the file stays."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading

import pytest

from aios_model.errors import ConfigError
from aios_serve.cli import main
from aios_serve.tenants.editing import editing
from aios_serve.tenants.file_format import read_tenants
from aios_serve.tenants.keys import digest_of
from aios_serve.tenants.registry import TenantRegistry

HAND_WRITTEN = """\
# My tenants.

[tenants.alice]   # research
weight = 2        # twice the share
models = [
  "llama",        # the old one
]

[tenants.bob]
enabled = false   # until March

# alice's keys
[[tenants.alice.keys]]
sha256 = "{}"  # the laptop
note = "laptop"
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tenants.toml"


@pytest.fixture
def run(path, capsys):
    """Runs a command and returns (status, stdout, stderr)."""

    def run(*args):
        with pytest.raises(SystemExit) as left:
            main(["tenants", *args, *([] if "--help" in args else ["--file", str(path)])])
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return run


def works(path, key):
    account = TenantRegistry(path=path, scheduling_policy="fair").find(key.strip().encode())
    return None if account is None else account.tenant.name


def test_a_new_tenant_gets_a_key_that_works_and_is_stored_nowhere(run, path):
    status, out, err = run(
        "add", "alice", "--requests-per-minute", "60", "--tokens-per-minute", "100000", "--note", "x"
    )
    assert status == 0
    key = out.strip()
    assert works(path, key) == "alice"
    assert key not in path.read_text()
    assert key not in err
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]
    [alice] = read_tenants(path)
    assert (alice.requests_per_minute, alice.tokens_per_minute, alice.keys[0].note) == (60, 100_000, "x")
    assert alice.keys[0].created is not None


def test_every_option_reaches_the_file(run, path):
    options = "--weight 2.5 --max-concurrent 4 --max-context 8k --model a --model org/b --prefix-cache shared"
    status, _, err = run("add", "alice", *options.split(), "--cache-group", "g", "--disabled")
    assert status == 0, err
    run("add", "bob", "--priority", "3", "--best-priority", "-1")
    alice, bob = read_tenants(path)
    assert (alice.weight, alice.max_concurrent, alice.max_context, alice.models) == (2.5, 4, 8192, ("a", "org/b"))
    assert (alice.prefix_cache, alice.cache_group, alice.enabled) == ("shared", "g", False)
    assert (bob.priority, bob.best_priority) == (3, -1)


def test_comments_and_what_was_written_by_hand_stay(run, path):
    mine = "my own key"
    path.write_text(HAND_WRITTEN.format(digest_of(mine.encode()).hex()))
    _, second, _ = run("add-key", "alice", "--note", "phone")
    _, bobs, _ = run("add-key", "bob")
    _, carols, _ = run("add", "carol", "--weight", "3")
    assert [works(path, key) for key in (mine, second, bobs, carols)] == ["alice", "alice", "bob", "carol"]
    text = path.read_text()
    for line in HAND_WRITTEN.splitlines():
        assert line.partition('"{}"')[0] in text, line
    assert "# the laptop" in text
    alice, bob, carol = read_tenants(path)
    assert (alice.weight, bob.enabled, carol.weight) == (2.0, False, 3.0)
    assert [key.note for key in alice.keys] == ["laptop", "phone"]


def test_revoke_takes_out_one_key_or_a_tenant(run, path):
    first, second = run("add", "alice")[1], run("add-key", "alice")[1]
    other = run("add", "bob", "--weight", "2")[1]
    [alice, _] = read_tenants(path)
    status, out, err = run("revoke", alice.keys[0].key_id)
    assert (status, out) == (0, "")
    assert "of tenant alice" in err
    assert [works(path, key) for key in (first, second, other)] == [None, "alice", "bob"]
    run("revoke", "alice")
    assert [works(path, key) for key in (second, other)] == [None, "bob"]
    run("revoke", "bob")
    assert read_tenants(path) == ()
    assert works(path, run("add", "bob")[1]) == "bob"


def test_rotate_replaces_a_key_and_keeps_its_note(run, path):
    first = run("add", "alice", "--note", "laptop")[1]
    second = run("rotate", "alice")[1]
    assert [works(path, key) for key in (first, second)] == [None, "alice"]
    third = run("rotate", "alice", "--keep-old")[1]
    assert [works(path, key) for key in (second, third)] == ["alice", "alice"]
    [alice] = read_tenants(path)
    assert [key.note for key in alice.keys] == ["laptop", "laptop"]
    status, out, err = run("rotate", "alice")
    assert (status, out) == (2, "")
    assert all(key.key_id in err for key in alice.keys)
    fourth = run("rotate", alice.keys[0].key_id)[1]
    assert [works(path, key) for key in (second, third, fourth)] == [None, "alice", "alice"]


def test_list_shows_limits_and_ids_and_no_keys(run, path):
    keys = [run("add", "alice", "--tokens-per-minute", "1234567", "--note", "[red]laptop")[1].strip()]
    keys.append(run("add", "bob", "--disabled", "--model", "llama")[1].strip())
    _, table, _ = run("list")
    assert all(word in table for word in ("alice", "1,234,567", "[red]laptop", "bob (disabled)", "llama", "private"))
    tenants = json.loads(run("list", "--json")[1])
    assert [each["name"] for each in tenants] == ["alice", "bob"]
    assert tenants[0]["tokens_per_minute"] == 1234567
    assert tenants[0]["max_context"] is None
    assert set(tenants[0]["keys"][0]) == {"id", "note", "created"}
    for text in (table, json.dumps(tenants)):
        assert tenants[1]["keys"][0]["id"] in text
        assert not any(key in text or digest_of(key.encode()).hex() in text for key in keys)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("add", "alice"), ["'alice' already", "add-key alice"]),
        (("add", "key-1"), ["'key-1'", "taken"]),
        (("add", "a/b"), ["'a/b'", "letters"]),
        (("add", "bob", "--weight", "-1"), ["weight", "0.001"]),
        (("add", "bob", "--requests-per-minute", "0"), ["requests_per_minute"]),
        (("add", "bob", "--max-context", "lots"), ["--max-context", "8k"]),
        (("add", "bob", "--cache-group", "g"), ["cache_group", "private"]),
        (("add", "bob", "--note", "a\nb"), ["one line"]),
        (("add-key", "bob"), ["no tenant 'bob'", "known: alice"]),
        (("rotate", "bob"), ["'bob'", "tenants list"]),
        (("revoke", "key-0000000000"), ["'key-0000000000'"]),
        (("revoke",), ["NAME|KEY-ID"]),
        (("add", "bob", "--speed", "5"), ["--speed", "aios-serve tenants --help"]),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(run, path, args, words):
    run("add", "alice")
    before = path.read_bytes()
    status, out, err = run(*args)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert path.read_bytes() == before


def test_a_file_that_cannot_be_used_is_not_overwritten(run, path):
    path.write_text("[tenants.alice]\nspeed = 5\n")
    for args in (("add", "bob"), ("list",), ("revoke", "alice")):
        status, _, err = run(*args)
        assert status == 2
        assert "line 2" in err
    assert path.read_text() == "[tenants.alice]\nspeed = 5\n"
    path.write_text("[tenants.alice]\nkeys = [{ sha256 = '" + "0" * 64 + "' }]\n")
    assert "write each as a table" in run("add-key", "alice")[2]


def test_no_file_is_begun_by_add_alone(run, path):
    assert "tenants add" in run("list")[2]
    assert "no tenant" in run("revoke", "alice")[2]
    assert not path.exists()
    run("add", "alice")
    assert path.read_text().startswith("# Who may use the server")


def test_a_link_stays_a_link(run, path, tmp_path):
    real = tmp_path / "elsewhere"
    real.mkdir()
    path.symlink_to(real / "real.toml")
    run("add", "alice")
    assert path.is_symlink()
    assert [tenant.name for tenant in read_tenants(real / "real.toml")] == ["alice"]


def test_those_who_edit_at_the_same_time_wait_for_each_other(path):
    def add(number):
        with editing(path) as editor:
            editor.add(f"t{number}", {})

    threads = [threading.Thread(target=add, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_tenants(path)) == 12


def test_a_failed_write_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    with editing(path) as editor:
        editor.add("alice", {})
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ConfigError, match="disk full"), editing(path) as editor:
        editor.add("bob", {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_help_names_the_commands(run):
    status, out, _ = run("--help")
    assert status == 0
    assert all(name in out for name in ("add", "add-key", "list", "revoke", "rotate"))


def test_a_model_in_a_folder_of_that_name_is_still_served():
    command = [sys.executable, "-m", "aios_serve", "./tenants", "--port", "99999"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--port=99999" in done.stderr
