"""What stays with a request that is sent a second time: the id of its answer, and the seed if the client gave none.

An application that is asked directly decides both itself. Where something in front of it may have to ask another one
again (`aios_serve.ray_app`), that something decides them once and hands them on in the ASGI scope, which no client can
write to.
"""

from __future__ import annotations

import hashlib
import random
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Scope

_KEY = "aios_request_identity"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestIdentity:
    """The id and the seed of one request.

    Attributes:
        id: 32 hexadecimal digits, the part of the answer's id after "chatcmpl-" or "cmpl-".
        seed: 0 to 2**63 - 1; for requests that bring none of their own.
    """

    id: str
    seed: int

    @classmethod
    def draw(cls, source: random.Random) -> RequestIdentity:
        """A new identity, its seed from `source`."""
        return cls(id=uuid.uuid4().hex, seed=source.getrandbits(63))

    def state(self) -> dict[str, RequestIdentity]:
        """The `state` of an ASGI scope that hands this identity on."""
        return {_KEY: self}


def identity_of(scope: Scope) -> RequestIdentity | None:
    """The identity decided further in front; None if the application is asked directly."""
    return scope.get("state", {}).get(_KEY)


def default_seed(scope: Scope) -> int | None:
    """The seed decided further in front; None leaves it to the engine."""
    identity = identity_of(scope)
    return None if identity is None else identity.seed


def prompt_seed(seed: int, index: int) -> int:
    """The seed of one of several prompts: `seed` for the first, for others one that no neighbouring seed leads to."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"prompt {index} of {seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
