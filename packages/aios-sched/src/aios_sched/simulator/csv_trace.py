"""A trace of one's own: a CSV file with one request per line, read while it is simulated."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aios_model.errors import AiosError
from aios_sched.simulator.trace import TraceRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens")
OPTIONAL = ("session", "tenant", "priority", "prefix_id", "prefix_tokens")

_LARGEST = 2**31


class TraceFileError(AiosError, ValueError):
    """A trace cannot be read; the message names file, line and column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CSVTrace:
    """Requests from a file whose first line names the columns.

    `arrival_s` (seconds, ascending), `prompt_tokens` (the prefix included) and `output_tokens` must be there;
    `session`, `tenant`, `priority`, `prefix_id` and `prefix_tokens` may be. Prompts of one `prefix_id` begin with the
    same `prefix_tokens` tokens; requests of one `session` continue each other behind that.

    Attributes:
        path: The file.
        limit: Read no more than so many requests; None reads all.
    """

    path: Path
    limit: int | None = None

    def __post_init__(self) -> None:
        """Reads the first lines, so that mistakes in the header are found before anything is simulated."""
        next(self.arrivals(), None)

    def arrivals(self) -> Iterator[TraceRequest]:
        """The requests, line by line.

        Raises:
            TraceFileError: The file cannot be read, or a line says something impossible.
        """
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                yield from self._rows(csv.DictReader(file, strict=True))
        except (OSError, UnicodeError) as error:
            raise TraceFileError(f"{self.path} cannot be read: {error}") from error

    def follow_up(self, request: TraceRequest, *, finished_s: float) -> TraceRequest | None:
        """The file says when requests arrive."""
        return None

    def _rows(self, reader: csv.DictReader[str]) -> Iterator[TraceRequest]:
        numbers: dict[str, int] = {}
        latest, count = 0.0, 0
        try:
            self._check_header(reader.fieldnames)
            for row in reader:
                if self.limit is not None and count >= self.limit:
                    return
                request = self._request(row, reader.line_num, count, numbers)
                if request.arrival_s < latest:
                    raise self._error(
                        reader.line_num, f"arrival_s {request.arrival_s:g} is before {latest:g} above it; sort the file"
                    )
                latest, count = request.arrival_s, count + 1
                yield request
        except csv.Error as error:
            raise self._error(reader.reader.line_num, str(error)) from error  # the line it is still reading
        if not count:
            raise TraceFileError(f"{self.path} holds no requests below its header")

    def _check_header(self, names: object) -> None:
        found = list(names) if isinstance(names, list) else []
        missing = [name for name in REQUIRED if name not in found]
        unknown = [name for name in found if name not in REQUIRED + OPTIONAL]
        if missing:
            raise self._error(1, f"column {missing[0]!r} is missing; the first line must name {', '.join(REQUIRED)}")
        if unknown or len(set(found)) < len(found):
            culprit = unknown[0] if unknown else next(name for name in found if found.count(name) > 1)
            raise self._error(
                1, f"column {culprit!r} is unknown or doubled; there may be {', '.join(REQUIRED + OPTIONAL)}, each once"
            )

    def _request(self, row: Mapping[str, str | None], line: int, count: int, numbers: dict[str, int]) -> TraceRequest:
        if None in row or None in row.values():
            raise self._error(line, "it has more or fewer fields than the header")
        session, prefix_id = row.get("session") or "", row.get("prefix_id") or ""
        num_prompt = self._number(row, "prompt_tokens", line, int, low=1)
        num_prefix = self._number(row, "prefix_tokens", line, int, low=0, default=0)
        if bool(num_prefix) != bool(prefix_id):
            raise self._error(line, "prefix_id and prefix_tokens belong together: give both or neither")
        if num_prefix >= num_prompt:
            raise self._error(line, f"prefix_tokens {num_prefix} must be below prompt_tokens {num_prompt}")
        # A stream per session, told from those of requests without one by its sign.
        stream = -1 - numbers.setdefault(f"session {session}", len(numbers)) if session else count
        return TraceRequest(
            arrival_s=self._number(row, "arrival_s", line, float, low=0),
            num_prompt_tokens=num_prompt,
            num_output_tokens=self._number(row, "output_tokens", line, int, low=1),
            stream=stream,
            prefix=numbers.setdefault(f"prefix {prefix_id}", len(numbers)) if prefix_id else 0,
            num_prefix_tokens=num_prefix,
            session=session,
            tenant=row.get("tenant") or "",
            priority=self._number(row, "priority", line, int, low=-(2**31), default=0),
        )

    def _number(
        self,
        row: Mapping[str, str | None],
        name: str,
        line: int,
        kind: Callable[[str], Any],
        *,
        low: int,
        default: int | None = None,
    ) -> Any:
        text = (row.get(name) or "").strip()
        if not text and default is not None:
            return default
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= _LARGEST:
            wanted = "a whole number" if kind is int else "a number"
            raise self._error(line, f"{name} is {text!r}; it must be {wanted} of at least {low}")
        return value

    def _error(self, line: int, message: str) -> TraceFileError:
        return TraceFileError(f"{self.path}, line {line}: {message}")
