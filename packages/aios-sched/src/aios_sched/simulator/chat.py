"""Conversations: a system prompt that many share, and turns that each send all that was said before."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from aios_model.errors import ConfigError
from aios_sched.simulator.lengths import LogNormalLengths
from aios_sched.simulator.trace import TraceRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aios_sched.simulator.arrivals import Gaps


CHAT_QUESTIONS = LogNormalLengths(mean=60, sigma=1.0, low=2, high=1024)
CHAT_OUTPUTS = LogNormalLengths(mean=240, sigma=0.8, low=1, high=1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSessions:
    """Users who come, ask, read the answer, think, and ask again.

    A turn is sent a while after the one before was answered, so a slow system is asked less: a closed loop.

    Attributes:
        times: When conversations begin.
        num_requests: Turns altogether, roughly: conversations are begun until so many turns are expected.
        seed: The same seed gives the same conversations; when later turns are sent depends on the answers.
        questions: Lengths of what a user says in a turn.
        outputs: Lengths of the answers.
        mean_turns: Turns of a conversation on average; geometrically distributed, at least one.
        mean_think_s: Seconds between an answer and the next question on average; exponentially distributed.
        num_system_prompts: Different system prompts, drawn evenly.
        num_system_tokens: Length of each.
        max_model_len: A conversation that would not fit with its next turn ends.
    """

    times: Gaps
    num_requests: int
    seed: int = 0
    questions: LogNormalLengths = CHAT_QUESTIONS
    outputs: LogNormalLengths = CHAT_OUTPUTS
    mean_turns: float = 5.0
    mean_think_s: float = 20.0
    num_system_prompts: int = 4
    num_system_tokens: int = 400
    max_model_len: int = 4096

    def __post_init__(self) -> None:
        if self.num_requests < 1 or self.num_system_prompts < 1:
            raise ConfigError("a chat needs at least one request and one system prompt")
        if self.mean_turns < 1 or self.mean_think_s < 0:
            raise ConfigError(
                f"{self.mean_turns} turns with {self.mean_think_s} s between them: give at least 1 turn and 0 s"
            )
        if not 0 <= self.num_system_tokens <= self.max_model_len - 2:
            raise ConfigError(
                f"a system prompt of {self.num_system_tokens} tokens leaves no room in a context of "
                f"{self.max_model_len}; give at most {self.max_model_len - 2}"
            )

    def arrivals(self) -> Iterator[TraceRequest]:
        """The first turn of each conversation."""
        times, users = self.times(Random(f"{self.seed} times")), Random(f"{self.seed} users")
        for stream in range(max(1, round(self.num_requests / self.mean_turns))):
            num_prompt, num_output = self._turn(stream, 0, self.num_system_tokens)
            yield TraceRequest(
                arrival_s=next(times),
                num_prompt_tokens=num_prompt,
                num_output_tokens=num_output,
                stream=stream,
                prefix=users.randrange(self.num_system_prompts),
                num_prefix_tokens=self.num_system_tokens,
                session=f"chat-{stream}",
            )

    def follow_up(self, request: TraceRequest, *, finished_s: float) -> TraceRequest | None:
        """The next turn: the whole history, the answer included, and a new question."""
        random = Random(f"{self.seed} {request.stream} after {request.turn}")
        if random.random() >= 1 - 1 / self.mean_turns:
            return None
        num_history = request.num_prompt_tokens + request.num_output_tokens
        if num_history + 2 > self.max_model_len:
            return None
        think_s = random.expovariate(1 / self.mean_think_s) if self.mean_think_s else 0.0
        num_prompt, num_output = self._turn(request.stream, request.turn + 1, num_history)
        return TraceRequest(
            arrival_s=finished_s + think_s,
            num_prompt_tokens=num_prompt,
            num_output_tokens=num_output,
            stream=request.stream,
            prefix=request.prefix,
            num_prefix_tokens=request.num_prefix_tokens,
            session=request.session,
            turn=request.turn + 1,
        )

    def _turn(self, stream: int, turn: int, num_history: int) -> tuple[int, int]:
        """Prompt and answer of a turn, in tokens: the same whenever it is sent."""
        random = Random(f"{self.seed} {stream} turn {turn}")
        num_prompt = min(num_history + self.questions.draw(random), self.max_model_len - 1)
        return num_prompt, min(self.outputs.draw(random), self.max_model_len - num_prompt)
