"""From the words of the command line to a trace."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from aios_model.errors import ConfigError
from aios_sched.simulator.arrivals import IndependentRequests, bursts, poisson
from aios_sched.simulator.chat import CHAT_OUTPUTS, CHAT_QUESTIONS, ChatSessions
from aios_sched.simulator.csv_trace import CSVTrace
from aios_sched.simulator.lengths import SHAREGPT_OUTPUTS, SHAREGPT_PROMPTS, LogNormalLengths

if TYPE_CHECKING:
    from aios_sched.simulator.arrivals import Gaps
    from aios_sched.simulator.trace import Trace

KINDS = ("poisson", "bursts", "chat")

_DEFAULT_REQUESTS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """What may be said about a trace; None leaves it to the kind of trace.

    Attributes:
        requests: How many.
        rate: Of arrivals a second, of conversations for a chat: a number or `inf`.
        seed: Of what is drawn.
        burst_factor: Times the mean rate in a burst.
        burst_seconds: Mean length of a burst.
        turns: Mean number of turns.
        think_seconds: Mean time between answer and question.
        system_prompts: Different ones.
        prefix_tokens: Shared by prompts.
        prompt_tokens: Mean length.
        prompt_spread: Sigma of its logarithm.
        output_tokens: Mean length.
        output_spread: Sigma of its logarithm.
        max_model_len: Of prompt and output together.
    """

    requests: int | None = None
    rate: str = "4"
    seed: int = 0
    burst_factor: float = 4.0
    burst_seconds: float = 10.0
    turns: float = 5.0
    think_seconds: float = 20.0
    system_prompts: int = 4
    prefix_tokens: int | None = None
    prompt_tokens: float | None = None
    prompt_spread: float | None = None
    output_tokens: float | None = None
    output_spread: float | None = None
    max_model_len: int = 4096

    def arrivals(self, kind: str) -> Gaps:
        """When requests arrive.

        Raises:
            ConfigError: The rate is no number.
        """
        try:
            rate = float(self.rate)
        except ValueError:
            rate = math.nan
        if kind == "bursts":
            return bursts(rate, factor=self.burst_factor, on_seconds=self.burst_seconds)
        return poisson(rate)


def make_trace(kind: str, options: TraceOptions) -> Trace:
    """A trace by its kind, or from a CSV file.

    Raises:
        ConfigError: There is no such kind or file, an option is out of range, or it has no effect on this kind.
        TraceFileError: The file is not what it should be.
    """
    if kind not in KINDS:
        path = Path(kind)
        if not path.suffix and not path.exists():
            raise ConfigError(f"trace {kind!r} is neither a file nor one of {', '.join(KINDS)}")
        _refuse_others(kind, options, {"requests", "max_model_len"})
        return CSVTrace(path=path, limit=options.requests)
    common = {"requests", "rate", "seed", "prefix_tokens", "max_model_len"}
    common |= {"prompt_tokens", "prompt_spread", "output_tokens", "output_spread"}
    count = _DEFAULT_REQUESTS if options.requests is None else options.requests
    if kind == "chat":
        _refuse_others(kind, options, common | {"turns", "think_seconds", "system_prompts"})
        return ChatSessions(
            times=options.arrivals(kind),
            num_requests=count,
            seed=options.seed,
            questions=_lengths(CHAT_QUESTIONS, options.prompt_tokens, options.prompt_spread),
            outputs=_lengths(CHAT_OUTPUTS, options.output_tokens, options.output_spread),
            mean_turns=options.turns,
            mean_think_s=options.think_seconds,
            num_system_prompts=options.system_prompts,
            num_system_tokens=400 if options.prefix_tokens is None else options.prefix_tokens,
            max_model_len=options.max_model_len,
        )
    _refuse_others(kind, options, common | ({"burst_factor", "burst_seconds"} if kind == "bursts" else set()))
    return IndependentRequests(
        times=options.arrivals(kind),
        num_requests=count,
        seed=options.seed,
        prompts=_lengths(SHAREGPT_PROMPTS, options.prompt_tokens, options.prompt_spread),
        outputs=_lengths(SHAREGPT_OUTPUTS, options.output_tokens, options.output_spread),
        max_model_len=options.max_model_len,
        num_prefix_tokens=options.prefix_tokens or 0,
    )


def _lengths(default: LogNormalLengths, mean: float | None, sigma: float | None) -> LogNormalLengths:
    """Lengths as asked for; whoever asks for a mean of their own gets no other bounds than the context's."""
    if mean is None and sigma is None:
        return default
    return LogNormalLengths(
        mean=default.mean if mean is None else mean, sigma=default.sigma if sigma is None else sigma
    )


def _refuse_others(kind: str, options: TraceOptions, allowed: set[str]) -> None:
    for field in fields(options):
        if field.name not in allowed and getattr(options, field.name) != field.default:
            raise ConfigError(f"--{field.name.replace('_', '-')} has no effect on the trace {kind!r}; leave it out")
