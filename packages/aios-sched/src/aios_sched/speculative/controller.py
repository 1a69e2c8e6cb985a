"""How many drafts are worth their time? As many as give the most tokens per second, judging by what was measured.

What is known: how likely drafts are right (`acceptance.py`), what a step costs by its tokens and what proposing costs
by its depth (`cost_curve.py`). Of all drafts that could be checked in the next step the likeliest are taken, as many as
raise (requests + expected right drafts) / (seconds of the step + seconds of the proposer), and none if that is no gain.

Estimates may be wrong, so three things bound what that can cost:

    the ledger    what drafts have cost and saved, as measured. In debt, nothing is drafted, and the debt fades with
                  `loss_share` of all time: no workload is slower than without drafts by more than that, and a constant
    probing       a request that gets no drafts is given one now and then, so that it is noticed when its text changes;
                  probes together cost at most `probe_share` of all time, whatever comes of them
    plain steps   now and then a step runs without drafts, so that it stays known what they save: the less that is, the
                  more often

Deciding takes time, too: a decision not to draft is kept for some steps.

Plain Python; given the same times, it decides the same.
"""

from __future__ import annotations

from collections import deque

from aios_model.errors import ConfigError
from aios_sched.speculative.acceptance import Acceptance
from aios_sched.speculative.cost_curve import CostCurve
from aios_sched.speculative.decision import Decision, DraftPlan

_LEAST_PROBABILITY = 0.04
"""Drafts less likely than that are not looked at: nowhere is a token of a step so cheap."""
_LEAST_GAIN = 1.02
"""Smaller gains are within the noise of the measurements."""
_FIRST_STEPS = 2
"""Steps without drafts before the first with: what would be compared with what?"""
_PLAIN_EVERY = (16, 256)
"""Steps with drafts after which one runs without, where drafts hardly pay and where they halve the time or better."""
_MOST_CREDIT = 8.0
"""Plain steps whose time may be lost again after it was gained, when a text stops being easy."""
_UNKNOWN_PROPOSER = 0.25
"""What proposing is believed to cost, in plain steps, before it was seen."""
_MORE_PROBES = 1.25
"""What the probes of a step may cost in all, relative to the first of them."""
_MOST_PROBING = 2.0
"""Plain steps whose time may be saved up for one probe."""
_RESTING_STEPS = 6
"""Steps for which nothing is decided after a decision not to draft: deciding takes 0.1 ms, some steps 2."""
_TOKEN_SLOPE, _DEPTH_SLOPE = 0.003, 0.3
"""Beliefs about `CostCurve`: low, since what is believed cheap is tried and found out."""


class AdaptiveController:
    """Decides the number of drafts per request and step; see `base.DraftController`.

    Args:
        max_drafts: Never more per request.
        loss_share: Share of all time that drafts may cost beyond what they save.
        probe_share: Share of all time for probes, of that.
        trace_length: Decisions to remember.

    Attributes:
        trace: The latest decisions, oldest first; steps of rest have none.

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(
        self, *, max_drafts: int, loss_share: float = 0.0125, probe_share: float = 0.0075, trace_length: int = 4096
    ) -> None:
        if max_drafts < 1 or trace_length < 1:
            raise ConfigError(f"max_drafts and trace_length must be positive, not {max_drafts} and {trace_length}")
        if not 0.0 <= probe_share <= loss_share <= 1.0:
            raise ConfigError(f"0 <= probe_share <= loss_share <= 1 must hold, not {probe_share} and {loss_share}")
        self._max_drafts = max_drafts
        self._loss_share = loss_share
        self._probe_share = probe_share
        self._common = Acceptance()
        self._requests: dict[str, Acceptance] = {}  # in the order of their last draft
        self._step_costs = CostCurve(slope=_TOKEN_SLOPE)
        self._proposer_costs = CostCurve(slope=_DEPTH_SLOPE)
        self._asked: dict[str, int] = {}
        self._asked_before: dict[str, int] = {}
        self._plan: DraftPlan | None = None
        self._num_steps = 0
        self._num_steps_with_drafts = 0
        self._balance: float | None = None
        self._probe_seconds = 0.0
        self._token_seconds = 0.0
        self._num_accepted = 0
        self._drafted: set[str] = set()  # requests that had drafts
        self._settled: set[str] = set()  # those that had some before the step
        self._speedup = 1.0  # expected of the latest plan
        self._rest = 0  # steps for which nothing is decided
        self._num_planned_for = 0  # requests that ran when the latest plan was made
        self.trace: deque[Decision] = deque(maxlen=trace_length)

    def num_drafts(self, request_id: str, *, num_requests: int) -> int:
        """See `base.DraftController`."""
        if self._rest and num_requests == self._num_planned_for and request_id in self._requests:
            self._asked[request_id] = 0
            return 0
        self._rest = 0
        if self._plan is None:
            self._plan = self._make_plan(num_requests)
            self._num_planned_for = num_requests
        acceptance = self._requests.get(request_id)
        if acceptance is None:
            acceptance = self._requests[request_id] = Acceptance(self._common)
        count = self._plan.num_drafts.get(request_id)
        if count is None:
            count = len(acceptance.survival(self._max_drafts, least=self._plan.least_probability))
        self._asked[request_id] = count
        return count

    def note(self, request_id: str, *, num_drafted: int, num_accepted: int) -> None:
        """See `base.DraftController`."""
        acceptance = self._requests.pop(request_id, None)
        if acceptance is None:
            self._common.note(num_drafted=num_drafted, num_accepted=num_accepted)
        else:
            acceptance.note(num_drafted=num_drafted, num_accepted=num_accepted)
            self._requests[request_id] = acceptance
            self._drafted.add(request_id)
        self._num_accepted += num_accepted
        if self._balance is not None:
            self._balance += num_accepted * self._token_seconds

    def note_step(
        self, *, num_requests: int, num_tokens: int, num_drafts: int, seconds: float, proposer_seconds: float
    ) -> None:
        """See `base.DraftController`."""
        self._num_steps += 1
        if self._rest:
            self._rest -= 1
            self._save_up(seconds)
            return
        self._num_steps_with_drafts = self._num_steps_with_drafts + 1 if num_drafts else 0
        if num_tokens - num_drafts == num_requests:  # chunks of prompts cost something else
            self._step_costs.note(num_tokens, seconds)
        self._note_proposer(num_requests, proposer_seconds)
        if num_requests and self._step_costs.is_known:
            self._account(num_requests, num_tokens, num_drafts, seconds, proposer_seconds)
            if self._plan is not None and self._plan.kind == "plain" and self._num_steps > _FIRST_STEPS:
                self._rest = 0 if num_drafts else _RESTING_STEPS
        self._asked_before, self._asked, self._plan = self._asked, {}, None
        self._settled = self._drafted.copy()

    def forget(self, request_id: str) -> None:
        """See `base.DraftController`."""
        self._requests.pop(request_id, None)
        self._drafted.discard(request_id)
        self._asked.pop(request_id, None)
        self._asked_before.pop(request_id, None)

    def _note_proposer(self, num_requests: int, seconds: float) -> None:
        """Learns what proposing costs, but not from requests that never had drafts: a draft model reads their prompts.

        That is done once. The ledger pays for it, but it says nothing about the drafts to come.
        """
        drafted = [name for name, count in self._asked.items() if count]
        if not drafted or not self._step_costs.is_known:
            return
        depth = max(self._asked[name] for name in drafted)
        is_usual = seconds < self._proposing(depth, self._step_costs.seconds(max(num_requests, 1)))
        if is_usual or self._settled.issuperset(drafted):
            self._proposer_costs.note(depth, seconds)

    # -- what it has cost ------------------------------------------------------------------------

    def _account(self, num_requests: int, num_tokens: int, num_drafts: int, seconds: float, proposing: float) -> None:
        costs = self._step_costs
        plain = costs.hopeful(num_requests)
        extra = proposing
        if num_drafts and num_tokens - num_drafts == num_requests:
            # As measured, but for what no number of tokens explains.
            most = 2.0 * costs.seconds(num_tokens)
            extra += min(seconds, most) - plain
        elif num_drafts:
            extra += costs.seconds(num_requests + num_drafts) - plain
        balance = plain if self._balance is None else self._balance
        balance += self._loss_share * (seconds + proposing) - extra
        self._balance = min(balance, _MOST_CREDIT * plain)
        self._token_seconds = plain / num_requests
        if self._plan is not None and self._plan.probe_seconds:
            self._probe_seconds -= self._plan.probe_seconds if num_drafts else proposing
        probe_seconds = self._probe_seconds + self._probe_share * (seconds + proposing)
        self._probe_seconds = min(probe_seconds, _MOST_PROBING * plain)
        self._record(num_requests, num_drafts, seconds, proposing, plain)

    def _save_up(self, seconds: float) -> None:
        """A step passed without a thought of drafts: what they may cost has grown by their share of it."""
        assert self._balance is not None, "nobody rests before the first account"
        plain = self._token_seconds * self._num_planned_for
        self._balance = min(self._balance + self._loss_share * seconds, _MOST_CREDIT * plain)
        self._probe_seconds = min(self._probe_seconds + self._probe_share * seconds, _MOST_PROBING * plain)

    def _record(self, num_requests: int, num_drafts: int, seconds: float, proposing: float, plain: float) -> None:
        assert self._balance is not None
        decision = Decision(
            step=self._num_steps,
            kind="plain" if self._plan is None else self._plan.kind,
            num_requests=num_requests,
            num_wanted=sum(self._asked.values()),
            num_drafts=num_drafts,
            num_accepted=self._num_accepted,
            acceptance=self._common.first,
            seconds=seconds,
            proposer_seconds=proposing,
            plain_seconds=plain,
            balance_seconds=self._balance,
        )
        self._num_accepted = 0
        self.trace.append(decision)

    # -- what to do next -------------------------------------------------------------------------

    def _make_plan(self, num_requests: int) -> DraftPlan:
        if self._num_steps < _FIRST_STEPS or not self._step_costs.is_known:
            return DraftPlan(kind="plain", num_drafts={})
        least, most = _PLAIN_EVERY
        if self._num_steps_with_drafts >= min(least * self._speedup**4, most):
            return DraftPlan(kind="refresh", num_drafts=dict.fromkeys(self._requests, 0))
        asked = {name: self._requests[name] for name in self._asked_before if name in self._requests}
        plan = self._best_plan(num_requests, asked)
        return plan if plan.probe_seconds else self._with_probes(plan, num_requests, set(asked))

    def _best_plan(self, num_requests: int, asked: dict[str, Acceptance]) -> DraftPlan:
        """The likeliest drafts of all requests, as many as give the most tokens per second.

        In debt, only what probing may cost: if they are right, they pay it back.
        """
        is_free = self._balance is None or self._balance >= 0.0
        candidates = self._candidates(list(asked.items()) or [("", self._common)] * num_requests)
        plain = self._step_costs.hopeful(num_requests)
        depth, gain, cost = 0, 0.0, 0.0
        best_rate, best_count, best_cost = _LEAST_GAIN * num_requests / plain, 0, 0.0
        for count, (probability, place, _) in enumerate(candidates[: self._most_drafts(num_requests)], start=1):
            gain += probability
            depth = max(depth, place)
            cost = self._step_costs.hopeful(num_requests + count) - plain + self._proposing(depth, plain)
            if not is_free and cost > self._probe_seconds:
                break
            if (rate := (num_requests + gain) / (plain + cost)) > best_rate:
                best_rate, best_count, best_cost = rate, count, cost
        self._speedup = best_rate / (num_requests / plain)
        num_drafts = dict.fromkeys(asked, 0)
        for _, _, name in candidates[:best_count]:
            if name in asked:
                num_drafts[name] += 1
        if not best_count:
            return DraftPlan(kind="plain", num_drafts=num_drafts)
        least = candidates[best_count - 1][0]
        if is_free:
            return DraftPlan(kind="drafts", num_drafts=num_drafts, least_probability=least)
        return DraftPlan(
            kind="probe", num_drafts=num_drafts, least_probability=least, probe_seconds=max(best_cost, 0.0)
        )

    def _candidates(self, asked: list[tuple[str, Acceptance]]) -> list[tuple[float, int, str]]:
        """Drafts by their probability: (probability, place in its row, request), likeliest first."""
        most = min(self._max_drafts, 2 * self._proposer_costs.largest_size + 1)
        candidates = [
            (probability, place, name)
            for name, acceptance in asked
            for place, probability in enumerate(acceptance.survival(most, least=_LEAST_PROBABILITY), 1)
        ]
        candidates.sort(key=lambda candidate: -candidate[0])  # stable: of equals the first place first
        return candidates

    def _most_drafts(self, num_requests: int) -> int:
        """Steps grow by a quarter or four tokens beyond what was seen: a guess that is wrong is not wrong by much."""
        largest = max(self._step_costs.largest_size, num_requests)
        return largest + max(4, largest // 4) - num_requests

    def _with_probes(self, plan: DraftPlan, num_requests: int, asked: set[str]) -> DraftPlan:
        """Adds a draft for requests that have gone without for longest, as many as there is time for."""
        count = sum(plan.num_drafts.values())
        costs, plain = self._step_costs, self._step_costs.seconds(num_requests)
        planned = costs.seconds(num_requests + count)
        proposing = 0.0 if count else self._proposing(1, plain)
        probed: list[str] = []
        seconds, most = 0.0, self._most_drafts(num_requests) - count
        # In the order of their last draft, a new request standing where it came.
        for name in self._requests:
            if name not in asked or plan.num_drafts.get(name):
                continue
            more = costs.seconds(num_requests + count + len(probed) + 1) - planned + proposing
            # Where the proposer is what costs, one more request costs little, and says as much as the first.
            if more > max(self._probe_seconds, _MORE_PROBES * seconds) or not most:
                break
            most -= 1
            probed.append(name)
            seconds = more
        if not probed:
            return plan
        for name in probed:  # asked for and not delivered, it is the turn of others
            self._requests[name] = self._requests.pop(name)
        num_drafts = plan.num_drafts | dict.fromkeys(probed, 1)
        kind = "drafts" if count else "probe"
        return DraftPlan(
            kind=kind, num_drafts=num_drafts, least_probability=plan.least_probability, probe_seconds=max(seconds, 1e-9)
        )

    def _proposing(self, depth: int, plain_seconds: float) -> float:
        if self._proposer_costs.is_known:
            return self._proposer_costs.hopeful(depth)
        return _UNKNOWN_PROPOSER * plain_seconds
