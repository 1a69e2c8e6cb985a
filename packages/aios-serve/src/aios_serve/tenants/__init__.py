"""Who shares the server, and on which terms: tenants with keys, limits, weights and caches of their own.

A file (`file_format.py`) says who they are. While the server runs, each of them has an account (`account.py`) with the
counters that its limits need, and each of its requests is a visit (`visit.py`) that takes from the account and gives
back. `registry.py` finds the account of a key, `gate.py` stands in front of the routes, `watcher.py` reads the file
again when it changes, and `cli.py` edits it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aios_serve.tenants.account import TenantAccount as TenantAccount
    from aios_serve.tenants.file_format import read_tenants as read_tenants
    from aios_serve.tenants.registry import TenantRegistry as TenantRegistry
    from aios_serve.tenants.tenant import Tenant as Tenant
    from aios_serve.tenants.tenant import TenantKey as TenantKey
    from aios_serve.tenants.token_bucket import TokenBucket as TokenBucket
    from aios_serve.tenants.visit import Visit as Visit

_MODULES = {
    # who they are
    "Tenant": "aios_serve.tenants.tenant",
    "TenantKey": "aios_serve.tenants.tenant",
    "read_tenants": "aios_serve.tenants.file_format",
    # what they take
    "TenantRegistry": "aios_serve.tenants.registry",
    "TenantAccount": "aios_serve.tenants.account",
    "TokenBucket": "aios_serve.tenants.token_bucket",
    "Visit": "aios_serve.tenants.visit",
}

__all__ = [*_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
