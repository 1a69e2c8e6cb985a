"""Keys of tenants: random, shown once, known afterwards by their digest alone.

A key is 256 random bits, so SHA-256 is the right hash for it. Slow hashes (argon2, scrypt) protect passwords, which
people choose and others can guess; nobody guesses 256 bits, however fast the hash, and every request would wait for a
slow one.
"""

from __future__ import annotations

import hashlib
import secrets

PREFIX = "sk-aios-"
_NUM_BYTES = 32


def new_key() -> str:
    """A new key: 256 bits from the system's source, behind a prefix by which scanners for leaked secrets find it."""
    return PREFIX + secrets.token_urlsafe(_NUM_BYTES)


def digest_of(key: bytes) -> bytes:
    """The 32 bytes by which a key is known."""
    return hashlib.sha256(key).digest()
