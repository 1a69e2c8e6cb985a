"""Visit: one HTTP request of a tenant, from the door to the last byte of its answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aios_model.errors import InvalidRequestError
from aios_serve.tenants.account import TenantAccount
from aios_serve.tenants.tenant import Tenant, operator
from aios_serve.tenants.throttling import never_fits

if TYPE_CHECKING:
    from starlette.types import Scope

    from aios_serve.tenants.token_bucket import TokenBucket

_KEY = "aios_visit"


class Visit:
    """What a route asks about the tenant whose request it answers, and what it tells about the work.

    Args:
        account: The tenant's. The terms are those at the time of the visit, whatever is read from the file later.
    """

    def __init__(self, account: TenantAccount) -> None:
        self.tenant: Tenant = account.tenant
        self.account = account
        self._arrival = account.clock()
        self._requests: TokenBucket | None = None
        self._tokens: TokenBucket | None = None
        self._num_held = 0
        self._num_prompt_tokens = 0
        self._num_seats = 0
        self._has_started = False
        self._has_output = False
        self._cached_tokens: dict[int, int] = {}
        self.has_failed = False

    @property
    def weight(self) -> float:
        """Its share under the policy "fair"."""
        return 1.0 if self.tenant.weight is None else self.tenant.weight

    def enter(self) -> None:
        """Pass the door; see `TenantAccount.enter`."""
        self.account.enter()
        self._num_seats = 1
        self._requests = self.account.requests

    def context(self, max_model_len: int) -> int:
        """Longest prompt plus answer, in tokens."""
        return min(max_model_len, self.tenant.max_context or max_model_len)

    @property
    def whose_context(self) -> str:
        """Whose the maximum context is, for errors."""
        return "This model's" if self.tenant.max_context is None else f"This model's or tenant {self.tenant.name!r}'s"

    def room(self, room: int, *, num_prompt_tokens: int, num_choices: int) -> int:
        """What each answer may have that was not told how long to be: `room`, or what the tokens of a minute leave."""
        limit = self.tenant.tokens_per_minute
        return room if limit is None else max(1, min(room, (limit - num_prompt_tokens) // num_choices))

    def allowed(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of the served names that it may use."""
        models = self.tenant.models
        return tuple(name for name in names if models is None or name in models)

    def priority(self, asked: int | None) -> int:
        """The priority of its request.

        Raises:
            InvalidRequestError: a better one was asked for than it may have.
        """
        own = self.tenant.priority or 0
        best = own if self.tenant.best_priority is None else self.tenant.best_priority
        if asked is None:
            return own
        if asked < best:
            raise InvalidRequestError(
                f"priority={asked} is better than the best that tenant {self.tenant.name!r} may ask for, {best}; "
                "lower is more important",
                param="priority",
            )
        return asked

    def salt(self, asked: str | None) -> str:
        """What its prefixes are cached under: its own scope, within which the client may draw narrower borders."""
        scope = self.tenant.cache_scope
        if not scope:
            return asked or ""
        return f"{scope}/{asked}" if asked else scope

    def reserve(self, *, num_prompt_tokens: int, max_tokens: int, num_choices: int) -> None:
        """Take the seats and hold back the tokens that a checked request may need.

        Args:
            num_prompt_tokens: Of all prompts.
            max_tokens: That each choice may have.
            num_choices: Over all prompts.

        Raises:
            ApiError: 400 if it never fits, 429 if it does not fit now; nothing is held then.
        """
        tenant, account = self.tenant, self.account
        most, per_minute = tenant.max_concurrent, tenant.tokens_per_minute
        num_tokens = num_prompt_tokens + max_tokens * num_choices
        if most is not None and num_choices > most:
            raise never_fits(tenant, "max_concurrent", f"{num_choices} choices run at once", param="n")
        if per_minute is not None and num_tokens > per_minute:
            asked = f"{num_prompt_tokens} tokens of prompt and {num_choices} times {max_tokens} to generate"
            param = "max_tokens" if num_prompt_tokens + num_choices <= per_minute else None
            raise never_fits(tenant, "tokens_per_minute", asked, param=param or "prompt")
        account.take_seats(num_choices - 1)
        self._num_seats += num_choices - 1
        self._tokens = account.hold_tokens(num_tokens)
        self._num_held = num_tokens
        self._num_prompt_tokens = num_prompt_tokens

    def note_start(self) -> None:
        """The engine is given the prompts: they are used, whatever comes of it."""
        self._has_started = True
        self._spend(self._num_prompt_tokens)

    def note_tokens(self, num_tokens: int, *, prompt_index: int, num_cached_tokens: int) -> None:
        """A choice gained tokens. `num_cached_tokens` of its prompt came from the cache."""
        account = self.account
        account.num_generation_tokens += num_tokens
        if prompt_index not in self._cached_tokens:
            self._cached_tokens[prompt_index] = num_cached_tokens
            account.num_cached_tokens += num_cached_tokens
        if not self._has_output:
            self._has_output = True
            account.num_prompt_tokens += self._num_prompt_tokens
            account.note_first_token(account.clock() - self._arrival)
        self._spend(num_tokens)

    def note_failure(self) -> None:
        """The work failed, perhaps too late for a status that says so."""
        self.has_failed = True

    def leave(self, outcome: str) -> None:
        """The answer is out, or nobody waits for it. What was held and not used is there for others again."""
        self.account.outcomes[outcome] += 1
        self.account.num_running -= self._num_seats
        if self._tokens is not None:
            self._tokens.release(self._num_held)
        if outcome == "unavailable":
            self._undo()

    def _undo(self) -> None:
        """Nothing was done for it, so it is as if it had not come."""
        if self._requests is not None:
            self._requests.put_back(1)
        if self._has_started and self._tokens is not None:
            self._tokens.put_back(self._num_prompt_tokens)

    def _spend(self, num_tokens: int) -> None:
        num_tokens = min(num_tokens, self._num_held)
        self._num_held -= num_tokens
        if self._tokens is not None:
            self._tokens.spend(num_tokens)


def begin_visit(scope: Scope, visit: Visit) -> None:
    """Let routes find the visit."""
    scope.setdefault("state", {})[_KEY] = visit


def known_visit(scope: Scope) -> Visit | None:
    """The visit that `begin_visit` began; None where no keys are asked for."""
    return scope.get("state", {}).get(_KEY)


def visit_of(scope: Scope) -> Visit:
    """Whose request it is. Where no keys are asked for, nobody's in particular, without limits."""
    return known_visit(scope) or Visit(TenantAccount(operator(), clock=time.monotonic))
