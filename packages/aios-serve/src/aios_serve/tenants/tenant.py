"""Tenant: who may use the server, on which terms."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Literal

from aios_sched.request import DEFAULT_TENANT

PrefixCache = Literal["private", "shared", "open"]

DEFAULT_GROUP = "shared"
"""The group of tenants that share cached prefixes without naming a group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantKey:
    """One key of a tenant, as far as the file knows it.

    Attributes:
        sha256: 64 hexadecimal digits: the digest of the key.
        note: Whose it is or what it is for.
        created: The day it was made; None if nobody wrote it down.
    """

    sha256: str
    note: str = ""
    created: date | None = None

    @property
    def key_id(self) -> str:
        """What the key is called where it must not be shown: the beginning of its digest, which leads nowhere."""
        return f"key-{self.sha256[:10]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One tenant of the file. None stands for "no limit".

    Attributes:
        name: Up to 64 letters, digits, dots, dashes and underscores.
        keys: Any of them opens the door.
        enabled: Off, its requests are refused with 403.
        weight: Its share under the policy "fair"; None counts as 1.
        priority: Of requests that bring none, under the policy "priority"; lower is more important. None counts as 0.
        best_priority: The lowest number that a request may ask for; None is `priority`.
        requests_per_minute: Requests, refilled evenly; a minute's worth may come at once.
        tokens_per_minute: Tokens of prompts and answers, likewise.
        max_concurrent: Sequences at once: a request is as many as it has prompts times choices.
        max_context: Longest prompt plus answer, in tokens.
        models: Served names that it may use; None for all.
        prefix_cache: "private", or "shared" with the tenants of the same group; "open" where nobody is told apart.
        cache_group: Whom it shares cached prefixes with; None is the group of those that name none.
        is_operator: Not of the file: it holds an `--api-key`, or no keys are asked for. Without limits, it sees what
            every tenant does.
    """

    name: str
    keys: tuple[TenantKey, ...] = ()
    enabled: bool = True
    weight: float | None = None
    priority: int | None = None
    best_priority: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    max_context: int | None = None
    models: tuple[str, ...] | None = None
    prefix_cache: PrefixCache = "private"
    cache_group: str | None = None
    is_operator: bool = False

    @property
    def cache_scope(self) -> str:
        """Where its prefixes are cached: no two scopes are equal that are not meant to be. Empty where it is open."""
        if self.prefix_cache == "open":
            return ""
        if self.prefix_cache == "private":
            return f"tenant:{self.name}"
        return f"group:{self.cache_group or DEFAULT_GROUP}"

    @property
    def limits(self) -> dict[str, int]:
        """The limits it has, by name."""
        names = ("requests_per_minute", "tokens_per_minute", "max_concurrent", "max_context")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def operator(name: str = DEFAULT_TENANT, *, prefix_cache: PrefixCache = "open") -> Tenant:
    """Whoever holds an `--api-key`, or anybody where no keys are asked for."""
    return Tenant(name=name, best_priority=-(2**63), prefix_cache=prefix_cache, is_operator=True)
