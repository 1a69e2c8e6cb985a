"""The bar that `InferenceEngine.generate(progress=True)` shows."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.progress import Progress, TaskID

    from aios_serve.outputs import RequestOutput


_REFRESH_SECONDS = 0.1


class GenerationBar:
    """Finished requests and tokens per second; shows nothing without a `bar`."""

    def __init__(self, bar: Progress | None, task: TaskID | None) -> None:
        self._bar = bar
        self._task = task
        self._started = self._shown_at = time.perf_counter()

    def update(self, outputs: Sequence[RequestOutput], *, last: bool) -> None:
        """Show how far `outputs` are, if it is time to, or the `last` one."""
        now = time.perf_counter()
        if self._bar is None or self._task is None or (now - self._shown_at < _REFRESH_SECONDS and not last):
            return
        self._shown_at = now
        num_finished = sum(output.finished for output in outputs)
        num_tokens = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
        rate = num_tokens / max(now - self._started, 1e-9)
        self._bar.update(self._task, completed=num_finished, rate=f"{rate:.0f} tok/s")


@contextmanager
def generation_progress(total: int, *, shown: bool) -> Iterator[GenerationBar]:
    """A bar over `total` requests on stderr, while the block runs."""
    if not shown:
        yield GenerationBar(None, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield GenerationBar(bar, bar.add_task("Generating", total=total, rate=""))
