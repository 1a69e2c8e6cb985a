"""Limits of the scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aios_model.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of the scheduler.

    Attributes:
        max_num_seqs: Seats: requests that run at once.
        max_num_batched_tokens: The token budget of a step. It must hold one token of every seat, so that no decode ever
            waits for another; without chunked prefill it must hold the longest prompt.
        max_model_len: Longest prompt plus output, in tokens.
        enable_chunked_prefill: Cut prompts that exceed what is left of the budget. Off, a prompt runs whole in one
            step, and waits until a step has room for it.
        max_num_queued: Requests that may wait beyond those a free seat is there for; None means any number.
        watermark: Share of the pages that admission leaves free for the requests that run, which will need more as they
            grow; without it, a new request would be admitted only to be preempted a few steps later.
        expected_output: What admission expects those that run to generate yet: "estimated" from requests that finished,
            "maximal" what they may at most (nobody is ever preempted, few run at once), or "none".
        max_steps_in_flight: Steps that run side by side, one per stage of a pipeline: each takes its share of the
            requests that are being answered.
        schedule_ahead: Plan a request's next token while the step that samples the one before it still computes; for
            executors that take a step while one is on its way, and know `PENDING_TOKEN`.

    Raises:
        ConfigError: a limit is out of range, or contradicts another.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    enable_chunked_prefill: bool = True
    max_num_queued: int | None = None
    watermark: float = 0.01
    expected_output: Literal["estimated", "maximal", "none"] = "estimated"
    max_steps_in_flight: int = 1
    schedule_ahead: bool = False

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_steps_in_flight"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} cannot be used: it must be at least 1")
        if self.max_num_queued is not None and self.max_num_queued < 0:
            raise ConfigError(f"max_num_queued={self.max_num_queued} cannot be used: give 0 or more, or None")
        choices = ("estimated", "maximal", "none")
        if self.expected_output not in choices:
            raise ConfigError(f"expected_output={self.expected_output!r} cannot be used: choose {', '.join(choices)}")
        if not 0 <= self.watermark < 1:
            raise ConfigError(f"watermark={self.watermark} cannot be used: it is a share, at least 0 and below 1")
        if self.schedule_ahead and self.max_steps_in_flight > 1:
            raise ConfigError(
                f"schedule_ahead cannot be used with max_steps_in_flight={self.max_steps_in_flight}: the stages of a "
                "pipeline are kept busy with different requests; leave out one of the two"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs={self.max_num_seqs}: a "
                "step must hold one token of every running request; raise the first or lower the second"
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_model_len={self.max_model_len}: "
                "without chunked prefill a prompt runs whole in one step; raise it, or enable chunked prefill"
            )
