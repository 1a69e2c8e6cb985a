"""The work that engines are compared on, by name.

decode-1          one sequence: prompt of 32 tokens, 128 more decoded
decode-16         sixteen sequences: prompts of 128 tokens, 128 more decoded each
decode-1@4096     behind a prompt of 4096 tokens, 64 more decoded
prefill-512       a prompt of 512 tokens up to its first token
memory-32         peak memory of `decode-32`, without repeats; `memory` is memory-1 and memory-32
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from aios_model.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_WORK = "decode-1,decode-1@4096,decode-16,decode-32,prefill-512,prefill-4096,memory"

_NAME = re.compile(r"(decode|memory|own-memory)-(\d{1,3})(?:@(\d{1,6}))?|prefill-(\d{1,6})")
_SHORT_PROMPT, _PROMPT, _LONG = 32, 128, 1024
_DECODED, _DECODED_BEHIND_LONG = 128, 64
_MEMORY = ("memory-1", "own-memory-1", "memory-32", "own-memory-32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One thing to measure.

    Attributes:
        name: As given on the command line.
        kind: What the figure is: tokens per second of decoding or of prefill, or bytes of memory.
        num_sequences: Sequences at once.
        prompt_tokens: Length of each prompt.
        new_tokens: Tokens that each sequence must produce; the first one belongs to the prefill.
    """

    name: str
    kind: Literal["decode", "prefill", "memory", "own-memory"]
    num_sequences: int
    prompt_tokens: int
    new_tokens: int

    @property
    def unit(self) -> str:
        """Of the figure."""
        return "tok/s" if self.more_is_better else "MB"

    @property
    def more_is_better(self) -> bool:
        """False for memory."""
        return self.kind in ("decode", "prefill")

    def figure(self, result: Mapping[str, Any]) -> float:
        """What a runner's result says, in `unit`."""
        if self.kind == "memory":
            return result["peak_rss"] / 1e6
        if self.kind == "own-memory":
            return (result["peak_rss"] - result["rss_after_imports"]) / 1e6
        if self.kind == "prefill":
            return self.num_sequences * self.prompt_tokens / result["prefill_seconds"]
        return result["decode_tokens"] / result["decode_seconds"]

    def prompts(self, *, seed: int, vocab_size: int) -> list[list[int]]:
        """Random token ids, the same for every engine; the first hundred ids, where control tokens are, left out."""
        draw = random.Random(f"{seed} {self.num_sequences} {self.prompt_tokens}")
        low = min(100, vocab_size - 1)
        return [[draw.randrange(low, vocab_size) for _ in range(self.prompt_tokens)] for _ in range(self.num_sequences)]


def parse_works(names: str) -> list[Work]:
    """Read a list of names with commas between; what is named twice is measured once.

    Raises:
        ConfigError: a name is not one of those above.
    """
    listed = [name.strip() for name in names.split(",") if name.strip()]
    expanded = [each for name in listed for each in (_MEMORY if name == "memory" else [name])]
    if not expanded:
        raise ConfigError(f"work={names!r} names no work; try {DEFAULT_WORK}")
    return [_parse(name) for name in dict.fromkeys(expanded)]


def _parse(name: str) -> Work:
    match = _NAME.fullmatch(name)
    numbers = [int(group) for group in (match.groups()[1:] if match else ()) if group]
    if match is None or 0 in numbers:
        raise ConfigError(
            f"work={name!r} is unknown; write decode-N, decode-N@PROMPT, prefill-N, memory-N, own-memory-N or memory, "
            "N at least 1"
        )
    if match[4]:
        return Work(name=name, kind="prefill", num_sequences=1, prompt_tokens=int(match[4]), new_tokens=1)
    num_sequences = int(match[2])
    prompt = int(match[3] or (_SHORT_PROMPT if name == "decode-1" else _PROMPT))
    return Work(
        name=name,
        kind=match[1],  # type: ignore[arg-type]
        num_sequences=num_sequences,
        prompt_tokens=prompt,
        new_tokens=1 + (_DECODED_BEHIND_LONG if prompt >= _LONG else _DECODED),
    )
