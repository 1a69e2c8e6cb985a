"""The file of tenants: TOML in, checked `Tenant`s out. What is not known, or cannot be honoured, is refused.

[tenants.alice]
weight = 2
requests_per_minute = 60

[[tenants.alice.keys]]
sha256 = "…"            # of the key; the key itself is nowhere
note = "laptop"
created = 2026-11-20
"""

from __future__ import annotations

import re
import tomllib
from datetime import date, datetime
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn

from aios_model.errors import ConfigError
from aios_sched.request import DEFAULT_TENANT
from aios_serve.tenants.tenant import Tenant, TenantKey
from aios_serve.tenants.toml_lines import TomlPath, line_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LEAST_WEIGHT, MOST_WEIGHT = 0.001, 1000.0
KEY_ID_PREFIX = "key-"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST = 2**48


def read_tenants(path: Path) -> tuple[Tenant, ...]:
    """The tenants of a file.

    Raises:
        ConfigError: It cannot be read, is no TOML, or says something that cannot be honoured; with line and field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"there is no file {path}; create it with: aios-serve tenants add NAME --file {path}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the tenants in {path} cannot be read: {error}") from None
    return parse_tenants(text, source=str(path))


def parse_tenants(text: str, *, source: str) -> tuple[Tenant, ...]:
    """The tenants in a text; see `read_tenants`. `source` names it in errors."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not TOML: {error}") from None
    reader = _Reader(text, source)
    reader.known((), document, ("tenants",))
    tables = reader.table(("tenants",), document.get("tenants", {}))
    tenants = tuple(reader.tenant(("tenants", name), table) for name, table in tables.items())
    reader.refuse_shared_keys(tenants)
    return tenants


def check_name(name: str) -> str | None:
    """What is wrong with the name of a tenant or a group; None if nothing is."""
    if not _NAME.fullmatch(name):
        return "a name has up to 64 letters, digits, dots, dashes and underscores, and begins with a letter or a digit"
    if name == DEFAULT_TENANT or name.startswith(KEY_ID_PREFIX):
        return f"{DEFAULT_TENANT!r} and names that begin with {KEY_ID_PREFIX!r} are taken, by --api-key and key ids"
    return None


class _Reader:
    """Knows where things stand, so that a mistake is named with its place."""

    def __init__(self, text: str, source: str) -> None:
        self._text = text
        self._source = source

    def tenant(self, path: TomlPath, value: object) -> Tenant:
        name = str(path[-1])
        if wrong := check_name(name):
            self.fail(path, f"{name!r} cannot be the name of a tenant: {wrong}")
        table = self.table(path, value)
        self.known(path, table, (*_FIELDS, "keys"))
        fields = {each: check(self, (*path, each), table[each]) for each, check in _FIELDS.items() if each in table}
        tenant = Tenant(name=name, keys=self._keys((*path, "keys"), table.get("keys", [])), **fields)
        self._check_together(path, tenant)
        return tenant

    def table(self, path: TomlPath, value: object) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.fail(path, f"must be a table, not {value!r}")
        return value

    def known(self, path: TomlPath, table: dict[str, Any], names: tuple[str, ...]) -> None:
        for name in table:
            if name not in names:
                close = get_close_matches(name, names, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"
                self.fail((*path, name), f"is not known; {hint}")

    def refuse_shared_keys(self, tenants: tuple[Tenant, ...]) -> None:
        owners: dict[str, str] = {}
        for tenant in tenants:
            for index, key in enumerate(tenant.keys):
                if key.sha256 in owners:
                    self.fail(
                        ("tenants", tenant.name, "keys", index, "sha256"),
                        f"{key.key_id} is a key of {owners[key.sha256]!r} already; a key belongs to one tenant, once",
                    )
                owners[key.sha256] = tenant.name

    def fail(self, path: TomlPath, what: str) -> NoReturn:
        line = line_of(self._text, path)
        where = self._source if line is None else f"{self._source}, line {line}"
        raise ConfigError(f"{where}: {'.'.join(map(str, path))} {what}")

    def _keys(self, path: TomlPath, value: object) -> tuple[TenantKey, ...]:
        if not isinstance(value, list):
            self.fail(path, "must be written as [[…keys]] tables, one for each key")
        return tuple(self._key((*path, index), each) for index, each in enumerate(value))

    def _key(self, path: TomlPath, value: object) -> TenantKey:
        table = self.table(path, value)
        self.known(path, table, ("sha256", *_KEY_FIELDS))
        if "sha256" not in table:
            hint = "; a key itself must not stand in the file" if "key" in table else ""
            self.fail(path, f"has no sha256, the digest of a key that `aios-serve tenants add` writes{hint}")
        fields = {each: check(self, (*path, each), table[each]) for each, check in _KEY_FIELDS.items() if each in table}
        return TenantKey(sha256=_digest(self, (*path, "sha256"), table["sha256"]), **fields)

    def _check_together(self, path: TomlPath, tenant: Tenant) -> None:
        priority, best = tenant.priority or 0, tenant.best_priority
        if best is not None and best > priority:
            self.fail((*path, "best_priority"), f"= {best} is worse than priority = {priority}; lower is better")
        if tenant.cache_group is not None and tenant.prefix_cache == "private":
            self.fail((*path, "cache_group"), 'has no effect on a private cache; add prefix_cache = "shared"')


def _whole(low: int, high: int = _MOST) -> Callable[[_Reader, TomlPath, object], int]:
    def check(reader: _Reader, path: TomlPath, value: object) -> int:
        if type(value) is not int or not low <= value <= high:
            span = f"from {low} to {high}" if high < _MOST else f"of at least {low}"
            reader.fail(path, f"= {value!r} cannot be used: it must be a whole number {span}")
        return value

    return check


def _weight(reader: _Reader, path: TomlPath, value: object) -> float:
    if type(value) not in (int, float) or not LEAST_WEIGHT <= value <= MOST_WEIGHT:  # type: ignore[operator]
        reader.fail(path, f"= {value!r} cannot be used: it must be a number from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}")
    return float(value)  # type: ignore[arg-type]


def _switch(reader: _Reader, path: TomlPath, value: object) -> bool:
    if type(value) is not bool:
        reader.fail(path, f"= {value!r} cannot be used: it must be true or false")
    return value


def _models(reader: _Reader, path: TomlPath, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
        reader.fail(path, "must be a list of names of models; leave it out to allow all")
    return tuple(value)


def _sharing(reader: _Reader, path: TomlPath, value: object) -> str:
    if value not in ("private", "shared"):
        reader.fail(path, f'= {value!r} cannot be used: it must be "private" or "shared"')
    return str(value)


def _group(reader: _Reader, path: TomlPath, value: object) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        reader.fail(path, f"= {value!r} cannot be used: {check_name('')}")
    return value


def _digest(reader: _Reader, path: TomlPath, value: object) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        reader.fail(path, "must be 64 hexadecimal digits in lower case: the SHA-256 of a key, never the key")
    return value


def _note(reader: _Reader, path: TomlPath, value: object) -> str:
    if not isinstance(value, str) or len(value) > 200 or not value.isprintable():
        reader.fail(path, "must be a text on one line of up to 200 characters")
    return value


def _date(reader: _Reader, path: TomlPath, value: object) -> date:
    if not isinstance(value, date):
        reader.fail(path, f"= {value!r} cannot be used: write a date such as 2026-11-20, without quotes")
    return value.date() if isinstance(value, datetime) else value


_FIELDS: dict[str, Callable[[_Reader, TomlPath, object], Any]] = {
    "enabled": _switch,
    "weight": _weight,
    "priority": _whole(-(2**31), 2**31 - 1),
    "best_priority": _whole(-(2**31), 2**31 - 1),
    "requests_per_minute": _whole(1),
    "tokens_per_minute": _whole(1),
    "max_concurrent": _whole(1),
    "max_context": _whole(2),
    "models": _models,
    "prefix_cache": _sharing,
    "cache_group": _group,
}
_KEY_FIELDS: dict[str, Callable[[_Reader, TomlPath, object], Any]] = {"note": _note, "created": _date}
