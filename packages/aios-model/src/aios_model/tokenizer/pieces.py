"""The bytes each token id stands for.

The text of a sequence is its pieces joined and read as UTF-8. `tokenizers` computes the same thing for a whole sequence
at once; byte by byte it can also be done as the tokens arrive, in constant time per token. (Its own `DecodeStream`
decodes a window again at every step: 0.8 µs a token on plain text, but 500 µs on the 5,000th byte of invalid UTF-8.)

Where the bytes are not valid UTF-8, every maximal invalid part becomes one U+FFFD, as Python, Rust and the WHATWG do.
`tokenizers` does so for byte-level vocabularies; for sentencepiece ones it gives up on the whole run of byte tokens,
which would mean holding back text that is already certain.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from aios_model.errors import InvalidRequestError, UnsupportedModelError

if TYPE_CHECKING:
    import tokenizers


class TokenPieces(dict[int, bytes]):
    """Token id to bytes, computed at the first look-up and kept.

    Ids outside the vocabulary are empty: models pad their output width beyond it.

    Attributes:
        num_stripped_spaces: Spaces that the tokenizer takes off the start of a text.

    Raises:
        UnsupportedModelError: The tokenizer's decoder is of a kind that no decoder-only model uses (WordPiece, CTC).
    """

    num_stripped_spaces: int

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._backend = backend
        self._byte_level = False
        self._byte_fallback = False
        self._replacements: list[tuple[str, str]] = []
        self._dropped_at_start = ""
        self._separator = b""
        self.num_stripped_spaces = 0
        self._read_decoder()

    def __missing__(self, token_id: int) -> bytes:
        token = self.token(token_id)
        if token is None:
            return b""
        piece = self._separator + self._to_bytes(token)
        self[token_id] = piece
        return piece

    def first(self, token_id: int) -> bytes:
        """The piece of a token that opens a text, before `num_stripped_spaces` apply."""
        if self._separator:
            return self[token_id].removeprefix(self._separator)
        if self._dropped_at_start:
            return self._to_bytes((self.token(token_id) or "").replace(self._dropped_at_start, ""))
        return self[token_id]

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, None outside the vocabulary."""
        try:
            return self._backend.id_to_token(token_id)
        except (OverflowError, TypeError) as error:
            raise InvalidRequestError(f"{token_id!r} is not a token id", param="tokens") from error

    def _to_bytes(self, token: str) -> bytes:
        if self._byte_level:
            # A token with a character outside the byte alphabet is an added one, written as itself.
            try:
                return bytes([_BYTES_BY_CHARACTER[character] for character in token])
            except KeyError:
                return token.encode()
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in self._replacements:
            token = token.replace(old, new)
        return token.encode()

    def _read_decoder(self) -> None:
        steps = list(_flatten(self._backend.decoder))
        if not steps:
            self._separator = b" "  # `tokenizers` joins with spaces where there is no decoder
        fused = False
        for step in steps:
            match step:
                case {"type": "ByteLevel"}:
                    self._byte_level = True
                case {"type": "ByteFallback"}:
                    self._byte_fallback = True
                case {"type": "Fuse"}:
                    fused = True
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not fused:
                    self._replacements.append((old, new))
                case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if fused:
                    self.num_stripped_spaces += start
                case {"type": "Metaspace", "replacement": str(mark), "prepend_scheme": str(scheme)}:
                    self._replacements.append((mark, " "))
                    self._dropped_at_start = mark if scheme != "never" else ""
                case _:
                    raise UnsupportedModelError(
                        f"the tokenizer's decoder step {json.dumps(step)} is not one of ByteLevel, ByteFallback, Fuse, "
                        "Replace, Strip at the start, Metaspace"
                    )


_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's `bytes_to_unicode`)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in sorted(printable)} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_BYTES_BY_CHARACTER = {character: byte for byte, character in byte_alphabet().items()}


def _flatten(decoder: Any) -> list[dict[str, Any]]:
    """The steps of a decoder in order, from the JSON it pickles to: the library gives no other way to ask."""
    if decoder is None:
        return []
    spec = json.loads(decoder.__getstate__())
    pending, steps = [spec], []
    while pending:
        step = pending.pop(0)
        if step["type"] == "Sequence":
            pending = step["decoders"] + pending
        else:
            steps.append(step)
    return steps
