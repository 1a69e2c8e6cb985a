"""Text for calibration and evaluation: a file, or one of ours, cut into windows of tokens.

A file is plain text, or JSON Lines (`.jsonl`) with a document per line: `{"text": …}`, or `{"messages": [{"role": …,
"content": …}, …]}`, which goes through the model's chat template. Two texts of our own come with the package, so that
nothing needs to be fetched: prose, code and conversations, different ones to calibrate and to evaluate with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from aios_model.errors import AiosError, ConfigError
from aios_model.tokenizer.tokenizer import Tokenizer

BundledText = Literal["calibration", "evaluation"]

# No tokenizer makes fewer tokens of a text than this many bytes each; what lies behind is not read.
_MOST_BYTES_PER_TOKEN = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWindows:
    """Text as the model sees it.

    Attributes:
        tokens_WS: int64 [windows, tokens per window].
        name: Where the text came from, for messages and reports.
    """

    tokens_WS: Tensor
    name: str

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens: equal windows calibrate equally."""
        shape = repr(tuple(self.tokens_WS.shape)).encode()
        return hashlib.sha256(shape + self.tokens_WS.numpy().tobytes()).hexdigest()[:16]


def read_windows(
    tokenizer: Tokenizer, path: Path | None, *, bundled: BundledText, length: int, limit: int
) -> TokenWindows:
    """Reads text until it fills `limit` windows or ends; what is left over at its end is dropped.

    Args:
        tokenizer: The model's.
        path: A text or `.jsonl` file in UTF-8; None for our own text.
        bundled: Which of our own.
        length: Tokens per window.
        limit: Most windows to read.

    Raises:
        ConfigError: The file cannot be read, or does not fill one window.
    """
    if length < 1 or limit < 1:
        raise ConfigError(f"a window has {length} tokens and {limit} are wanted; both must be 1 or more")
    name = f"the bundled {bundled} text" if path is None else str(path)
    token_ids: list[int] = []
    for document in _documents(path, bundled, num_bytes=length * limit * _MOST_BYTES_PER_TOKEN):
        token_ids += _encode(tokenizer, document, name)
        if len(token_ids) >= length * limit:
            break
    num_windows = min(limit, len(token_ids) // length)
    if num_windows == 0:
        raise ConfigError(
            f"{name} has {len(token_ids)} tokens, a window needs {length}; give a longer text or a shorter window"
        )
    tokens_WS = torch.tensor(token_ids[: num_windows * length], dtype=torch.int64).view(num_windows, length)
    return TokenWindows(tokens_WS=tokens_WS, name=name)


_Document = str | list[dict[str, Any]]


def _documents(path: Path | None, bundled: BundledText, *, num_bytes: int) -> Iterator[_Document]:
    if path is None:
        resource = files("aios_quant.calibrate").joinpath("texts", f"{bundled}.jsonl")
        yield from _json_lines(resource.read_text(encoding="utf-8").splitlines(), f"{bundled}.jsonl")
        return
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                yield from _json_lines(file, str(path))
            else:
                yield file.read(num_bytes)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text in UTF-8: {error}") from error


def _json_lines(lines: Sequence[str] | Any, name: str) -> Iterator[_Document]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{name}, line {number} is not JSON: {error}") from error
        document = entry.get("text", entry.get("messages")) if isinstance(entry, dict) else None
        if not isinstance(document, str | list):
            raise ConfigError(f"{name}, line {number} has neither a `text` nor `messages`")
        yield document


def _encode(tokenizer: Tokenizer, document: _Document, name: str) -> list[int]:
    try:
        if isinstance(document, str):
            return tokenizer.encode(document)
        if tokenizer.has_chat_template:
            return tokenizer.encode_chat(document, add_generation_prompt=False)
        return tokenizer.encode("\n\n".join(str(message.get("content", "")) for message in document))
    except (AiosError, AttributeError) as error:
        raise ConfigError(f"{name} holds text that the model's tokenizer refuses: {error}") from error
