"""What the adaptive controller decides: for the next step, and for the record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One step, for a plot.

    Attributes:
        step: Counts up.
        kind: "plain" without drafts, "drafts" because they pay, "probe" with one that is to find out whether they
            would, "refresh" without any, to measure that.
        num_requests: Rows in it.
        num_wanted: Drafts that were asked for.
        num_drafts: Drafts that were checked.
        num_accepted: Drafts that were right, since the decision before.
        acceptance: Estimated probability that a request's first draft is right, over all requests.
        seconds: Of the step.
        proposer_seconds: Of proposing for it.
        plain_seconds: What it would have taken without drafts, as far as is known.
        balance_seconds: The ledger behind it: what drafts may still cost.
    """

    step: int
    kind: Literal["plain", "drafts", "probe", "refresh"]
    num_requests: int
    num_wanted: int
    num_drafts: int
    num_accepted: int
    acceptance: float
    seconds: float
    proposer_seconds: float
    plain_seconds: float
    balance_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPlan:
    """What requests get in the next step.

    Attributes:
        kind: See `Decision`.
        num_drafts: Drafts of each request.
        least_probability: Requests that are not in it get what is as likely as this.
        probe_seconds: What is spent to find out more.
    """

    kind: Literal["plain", "drafts", "probe", "refresh"]
    num_drafts: dict[str, int]
    least_probability: float = 2.0
    probe_seconds: float = 0.0
