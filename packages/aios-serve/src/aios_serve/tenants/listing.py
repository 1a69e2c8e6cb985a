"""What `aios-serve tenants list` shows: terms and key ids, never keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_serve.tenants.tenant import Tenant

_COLUMNS = ("tenant", "weight", "priority", "req/min", "tokens/min", "at once", "context", "models", "cache", "keys")


def as_json(tenants: Sequence[Tenant]) -> list[dict[str, Any]]:
    """All that the file says of them, in plain data; null stands for no limit."""
    return [
        {
            "name": tenant.name,
            "enabled": tenant.enabled,
            "weight": tenant.weight,
            "priority": tenant.priority,
            "best_priority": tenant.best_priority,
            "requests_per_minute": tenant.requests_per_minute,
            "tokens_per_minute": tenant.tokens_per_minute,
            "max_concurrent": tenant.max_concurrent,
            "max_context": tenant.max_context,
            "models": None if tenant.models is None else list(tenant.models),
            "prefix_cache": tenant.prefix_cache,
            "cache_group": tenant.cache_group,
            "keys": [
                {"id": key.key_id, "note": key.note, "created": None if key.created is None else str(key.created)}
                for key in tenant.keys
            ],
        }
        for tenant in tenants
    ]


def as_table(tenants: Sequence[Tenant]) -> Table:
    """One row for each, with its keys one below the other; a dash stands for no limit."""
    table = Table(*_COLUMNS)
    for column in table.columns[1:7]:
        column.justify = "right"
    for tenant in tenants:
        table.add_row(*map(escape, _cells(tenant)), style="" if tenant.enabled else "dim")
    return table


def _cells(tenant: Tenant) -> tuple[str, ...]:
    counts = (
        tenant.requests_per_minute,
        tenant.tokens_per_minute,
        tenant.max_concurrent,
        tenant.max_context,
    )
    return (
        tenant.name if tenant.enabled else f"{tenant.name} (disabled)",
        "1" if tenant.weight is None else f"{tenant.weight:g}",
        _priority(tenant),
        *("-" if count is None else f"{count:,}" for count in counts),
        "all" if tenant.models is None else ", ".join(tenant.models),
        "private" if tenant.prefix_cache == "private" else tenant.cache_scope,
        "\n".join(" ".join(filter(None, (key.key_id, str(key.created or ""), key.note))) for key in tenant.keys),
    )


def _priority(tenant: Tenant) -> str:
    own = tenant.priority or 0
    return str(own) if tenant.best_priority in (None, own) else f"{own}, best {tenant.best_priority}"
