"""TenantRegistry: whose key is it? All tenants with their accounts, replaced as a whole when the file changes."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aios_model.errors import ConfigError
from aios_serve.tenants.account import TenantAccount
from aios_serve.tenants.file_format import read_tenants
from aios_serve.tenants.keys import digest_of
from aios_serve.tenants.tenant import Tenant, operator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from aios_serve.config import EngineConfig
    from aios_serve.server_config import ServerConfig

_NEEDS_POLICY = {"weight": "fair", "priority": "priority", "best_priority": "priority"}


class TenantRegistry:
    """Finds the account of a key.

    Args:
        api_keys: Keys of the operator, without limits; several of them are tenants "key-1", "key-2", …
        path: The file of tenants.
        scheduling_policy: Of the engine; not every policy can honour weights or priorities.
        clock: Seconds that never go back.

    Raises:
        ConfigError: The file cannot be used.
    """

    def __init__(
        self,
        *,
        api_keys: Sequence[str] = (),
        path: Path | None = None,
        scheduling_policy: str = "fcfs",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self._policy = scheduling_policy
        self._clock = clock
        # Which bucket of a hash table is looked at shows in time. Keyed by a secret of this process, the place of a
        # digest is random for whoever sends keys, so a lookup takes no longer with a thousand tenants than with one.
        self._secret = secrets.token_bytes(32)
        self._operators = self._entries_of_api_keys(api_keys, is_alone=path is None)
        self._accounts: dict[str, TenantAccount] = {}
        self._entries: dict[bytes, _Entry] = dict(self._operators)
        if path is not None:
            self.adopt(read_tenants(path))

    @classmethod
    def of(cls, config: ServerConfig, engine: EngineConfig) -> TenantRegistry:
        """The registry that the options ask for.

        Raises:
            ConfigError: The file cannot be used, or the engine has a list of tenants of its own.
        """
        if config.tenants is not None and engine.tenant_weights is not None:
            raise ConfigError("tenants and tenant_weights both say who the tenants are; give one of them")
        return cls(api_keys=config.api_keys, path=config.tenants, scheduling_policy=engine.scheduling_policy)

    @property
    def needs_key(self) -> bool:
        """Whether requests must bring a key."""
        return bool(self._operators) or self.path is not None

    @property
    def accounts(self) -> list[TenantAccount]:
        """Of all tenants, those of the operator's keys first."""
        operators = dict.fromkeys(entry.account for entry in self._operators.values())
        return [*operators, *self._accounts.values()]

    @property
    def tenants(self) -> list[Tenant]:
        """Those of the file."""
        return [account.tenant for account in self._accounts.values()]

    def find(self, key: bytes) -> TenantAccount | None:
        """The account of a key; None if nobody has it. The time it takes tells nothing of the keys there are."""
        digest = digest_of(key)
        entry = self._entries.get(self._place(digest))
        return entry.account if entry is not None and hmac.compare_digest(entry.digest, digest) else None

    def adopt(self, tenants: Sequence[Tenant]) -> None:
        """From now on these are the tenants of the file: all of them, or, if one cannot be honoured, none.

        Who stays keeps its counters; who is gone is forgotten, once its requests have ended.

        Raises:
            ConfigError: A field needs another scheduling policy, or a key is one of the operator's.
        """
        self._check(tenants)
        accounts = {tenant.name: self._account(tenant) for tenant in tenants}
        entries = dict(self._operators)
        for account in accounts.values():
            entries.update(self._entries_of(account, map(bytes.fromhex, (key.sha256 for key in account.tenant.keys))))
        self._accounts, self._entries = accounts, entries

    def models_not_served(self, names: Sequence[str]) -> list[str]:
        """Names that tenants may use and nobody serves: slips of the pen, or models of another server."""
        allowed = {model for account in self._accounts.values() for model in account.tenant.models or ()}
        return sorted(allowed - set(names))

    def _check(self, tenants: Sequence[Tenant]) -> None:
        for tenant in tenants:
            for field, policy in _NEEDS_POLICY.items():
                if getattr(tenant, field) is not None and self._policy != policy:
                    raise ConfigError(
                        f"{self.path}: tenants.{tenant.name}.{field} has no effect under scheduling_policy="
                        f"{self._policy!r}; take it out, or use {policy!r}"
                    )
            for key in tenant.keys:
                if self._place(bytes.fromhex(key.sha256)) in self._operators:
                    raise ConfigError(
                        f"{self.path}: {key.key_id} of tenant {tenant.name!r} is an API key of the operator too; give "
                        "the tenant another one"
                    )

    def _account(self, tenant: Tenant) -> TenantAccount:
        account = self._accounts.get(tenant.name)
        if account is None:
            return TenantAccount(tenant, clock=self._clock)
        account.adopt(tenant)
        return account

    def _entries_of_api_keys(self, keys: Sequence[str], *, is_alone: bool) -> dict[bytes, _Entry]:
        """One key is nobody in particular. Several are tenants, who do not see each other's cached prefixes."""
        entries: dict[bytes, _Entry] = {}
        for number, key in enumerate(keys, start=1):
            if len(keys) == 1:
                tenant = operator(prefix_cache="open" if is_alone else "private")
            else:
                tenant = operator(f"key-{number}", prefix_cache="private")
            account = TenantAccount(tenant, clock=self._clock)
            entries = self._entries_of(account, [digest_of(key.encode())]) | entries
        return entries

    def _entries_of(self, account: TenantAccount, digests: Iterable[bytes]) -> dict[bytes, _Entry]:
        return {self._place(digest): _Entry(digest, account) for digest in digests}

    def _place(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._secret, digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class _Entry:
    """A key and whose it is."""

    digest: bytes
    account: TenantAccount
