"""When requests arrive that know nothing of each other: evenly at random, or in bursts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from aios_model.errors import ConfigError
from aios_sched.simulator.lengths import SHAREGPT_OUTPUTS, SHAREGPT_PROMPTS, LogNormalLengths
from aios_sched.simulator.trace import TraceRequest

Gaps = Callable[[Random], Iterator[float]]
"""Given a source of randomness: the times of arrival, ascending, without end, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndependentRequests:
    """Requests that arrive at given times, each with a length of its own and nothing in common but a prefix.

    Attributes:
        times: When they arrive: `poisson(…)`, `bursts(…)`.
        num_requests: How many.
        seed: The same seed gives the same trace.
        prompts: Lengths of the prompts, the shared prefix not included.
        outputs: Lengths of the answers.
        max_model_len: Prompts and answers are cut so that both together fit.
        num_prefix_tokens: A prefix that all prompts begin with, such as a system prompt.
    """

    times: Gaps
    num_requests: int
    seed: int = 0
    prompts: LogNormalLengths = SHAREGPT_PROMPTS
    outputs: LogNormalLengths = SHAREGPT_OUTPUTS
    max_model_len: int = 4096
    num_prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if self.num_requests < 1:
            raise ConfigError(f"num_requests={self.num_requests} cannot be simulated: give at least 1")
        if not 0 <= self.num_prefix_tokens <= self.max_model_len - 2:
            raise ConfigError(
                f"a shared prefix of {self.num_prefix_tokens} tokens leaves no room in a context of "
                f"{self.max_model_len}; give at most {self.max_model_len - 2}"
            )

    def arrivals(self) -> Iterator[TraceRequest]:
        """All of them, drawn one by one."""
        # Two sources: the lengths stay what they are when only the rate is changed.
        times, lengths = self.times(Random(f"{self.seed} times")), Random(f"{self.seed} lengths")
        room = self.max_model_len - self.num_prefix_tokens
        for number in range(self.num_requests):
            num_own = min(self.prompts.draw(lengths), room - 1)
            yield TraceRequest(
                arrival_s=next(times),
                num_prompt_tokens=self.num_prefix_tokens + num_own,
                num_output_tokens=min(self.outputs.draw(lengths), room - num_own),
                stream=number,
                num_prefix_tokens=self.num_prefix_tokens,
            )

    def follow_up(self, request: TraceRequest, *, finished_s: float) -> TraceRequest | None:
        """Nobody asks again."""
        return None


def poisson(rate: float) -> Gaps:
    """Arrivals independent of each other, `rate` a second on average; `math.inf` lets all arrive at once.

    Raises:
        ConfigError: The rate is not positive.
    """
    _check_rate(rate)

    def times(random: Random) -> Iterator[float]:
        now = 0.0
        while True:
            now += random.expovariate(rate) if rate < math.inf else 0.0
            yield now

    return times


def bursts(rate: float, *, factor: float = 4.0, on_seconds: float = 10.0) -> Gaps:
    """Poisson arrivals that come and go: `factor` times the mean rate while on, none while off.

    Both phases last an exponentially distributed time (an interrupted Poisson process), those that are on `on_seconds`
    on average, so that the mean rate is `rate`.

    Raises:
        ConfigError: A value is out of range.
    """
    _check_rate(rate)
    if not (rate < math.inf and 1 < factor < math.inf and 0 < on_seconds < math.inf):
        raise ConfigError(f"bursts of {factor} times {rate}/s for {on_seconds} s: give a factor above 1, finite values")
    off_seconds = on_seconds * (factor - 1)

    def times(random: Random) -> Iterator[float]:
        start = 0.0
        while True:
            end = start + random.expovariate(1 / on_seconds)
            now = start + random.expovariate(rate * factor)
            while now < end:
                yield now
                now += random.expovariate(rate * factor)
            start = end + random.expovariate(1 / off_seconds)

    return times


def _check_rate(rate: float) -> None:
    if not rate > 0:
        raise ConfigError(f"a rate of {rate} requests a second cannot be simulated: give more than 0")
