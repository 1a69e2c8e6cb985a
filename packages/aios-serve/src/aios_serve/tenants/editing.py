"""Edits of the file of tenants that leave everything else in it, comments too, as it was."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomlkit
from tomlkit.exceptions import ParseError
from tomlkit.items import AoT, Table

from aios_model.errors import ConfigError
from aios_serve.tenants.file_format import check_name, parse_tenants
from aios_serve.tenants.keys import digest_of, new_key
from aios_serve.tenants.tenant import TenantKey

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tomlkit import TOMLDocument

_HEAD = """\
Who may use the server, and on which terms: docs/en/tenants.md says what can stand here.
A running server reads this file again when it changes."""


class TenantsEditor:
    """The tenants of one file, to be changed; see `editing`.

    Every method checks first and changes then. ConfigError says what is wrong, with what to do about it.
    """

    def __init__(self, path: Path, document: TOMLDocument) -> None:
        self._path = path
        self._document = document
        self.is_changed = False

    def add(self, name: str, terms: Mapping[str, object], *, note: str = "") -> str:
        """A new tenant with one key, which is returned and nowhere else. `terms` are fields of the file."""
        if wrong := check_name(name):
            raise ConfigError(f"{name!r} cannot be the name of a tenant: {wrong}")
        tenants = self._tenants()
        if name in tenants:
            raise ConfigError(f"there is a tenant {name!r} already; give it another key with: tenants add-key {name}")
        table = tomlkit.table()
        for field, value in terms.items():
            table.add(field, value)
        if terms:
            table.add(tomlkit.nl())
        table.add("keys", tomlkit.aot())
        tenants.add(name, table)
        return self._new_key(table, note)

    def add_key(self, name: str, *, note: str = "") -> str:
        """Another key of a tenant, which is returned and nowhere else."""
        return self._new_key(self._tenant(name), note)

    def revoke(self, name_or_key_id: str) -> str:
        """Take out a tenant with all its keys, or one key; returns in words what is gone."""
        tenants = self._tenants()
        if name_or_key_id in tenants:
            num_keys = len(tenants[name_or_key_id].get("keys", ()))  # type: ignore[union-attr]
            tenants.remove(name_or_key_id)
            self.is_changed = True
            return f"tenant {name_or_key_id} and its keys, {num_keys}"
        owner, index = self._key(name_or_key_id)
        del self._keys(self._tenant(owner))[index]
        self.is_changed = True
        return f"{name_or_key_id} of tenant {owner}"

    def rotate(self, name_or_key_id: str, *, keep_old: bool = False) -> tuple[str, str]:
        """A new key in place of one, or beside it; returns the tenant's name and the key.

        A tenant's name will do if it has one key.
        """
        tenants = self._tenants()
        if name_or_key_id in tenants:
            owner, keys = name_or_key_id, self._keys(self._tenant(name_or_key_id))
            if len(keys) != 1:
                ids = ", ".join(_key_id(key) for key in keys) or "none"
                raise ConfigError(f"tenant {owner!r} has {len(keys)} keys; say which one to replace: {ids}")
            index = 0
        else:
            owner, index = self._key(name_or_key_id)
        table = self._tenant(owner)
        keys = self._keys(table)
        note = str(keys[index].get("note", ""))
        if not keep_old:
            del keys[index]
        return owner, self._new_key(table, note)

    def text(self) -> str:
        """The file as it is to be, checked as the server will check it."""
        text = tomlkit.dumps(self._document)
        parse_tenants(text, source=str(self._path))
        return text

    def _tenants(self) -> Table:
        if "tenants" not in self._document:
            self._document.add("tenants", tomlkit.table(is_super_table=True))
        return self._document["tenants"]  # type: ignore[return-value]

    def _tenant(self, name: str) -> Table:
        tenants = self._tenants()
        if name not in tenants:
            known = ", ".join(sorted(tenants)) or "none"
            raise ConfigError(f"there is no tenant {name!r}; known: {known}")
        return tenants[name]  # type: ignore[return-value]

    def _keys(self, table: Table) -> AoT:
        if "keys" not in table:
            table.add("keys", tomlkit.aot())
        keys = table["keys"]
        if not isinstance(keys, AoT):
            raise ConfigError(f"{self._path} has keys in one line; write each as a table [[tenants.NAME.keys]] first")
        return keys

    def _key(self, key_id: str) -> tuple[str, int]:
        """Whose key it is, and which."""
        tenants = self._tenants()
        for name in tenants:
            for index, key in enumerate(tenants[name].get("keys", ())):  # type: ignore[union-attr]
                if _key_id(key) == key_id:
                    return name, index
        raise ConfigError(f"there is no tenant and no key {key_id!r}; `aios-serve tenants list` shows what there is")

    def _new_key(self, table: Table, note: str) -> str:
        key = new_key()
        entry = tomlkit.table()
        entry.add("sha256", digest_of(key.encode()).hex())
        if note:
            entry.add("note", note)
        entry.add("created", date.today())
        entry.add(tomlkit.nl())
        self._keys(table).append(entry)
        self.is_changed = True
        return key


@contextmanager
def editing(path: Path) -> Iterator[TenantsEditor]:
    """The tenants of a file, which is written when the block ends without an error and something has changed.

    It is replaced as a whole, readable for its owner alone; what links to it goes on doing so. Others who edit it in
    this way wait.

    Raises:
        ConfigError: The file, as it is or as it would be, cannot be used; or it cannot be written.
    """
    path = path.resolve()
    try:
        with _locked(path.parent):
            editor = TenantsEditor(path, _read(path))
            yield editor
            if editor.is_changed:
                _replace(path, editor.text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be changed: {error}") from None


def _read(path: Path) -> TOMLDocument:
    if not path.exists():
        document = tomlkit.document()
        for line in _HEAD.splitlines():
            document.add(tomlkit.comment(line))
        document.add(tomlkit.nl())
        return document
    text = path.read_text(encoding="utf-8")
    parse_tenants(text, source=str(path))
    try:
        return tomlkit.parse(text)
    except ParseError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else edits a file of this folder meanwhile. Windows has no such locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    """Write beside it and rename: whoever reads the file sees the old one or the new one, even after a power cut."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # with mode 0600
    new = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with suppress(OSError, AttributeError):  # a server that runs as somebody else must still be able to read it
            owner = path.stat()
            os.chown(new, owner.st_uid, owner.st_gid)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def _key_id(key: Mapping[str, Any]) -> str:
    return TenantKey(sha256=str(key["sha256"])).key_id
