"""From a configuration to those who guess."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aios_sched.speculative.controller import AdaptiveController
from aios_sched.speculative.fixed import FixedController
from aios_sched.speculative.ngram import NgramProposer
from aios_sched.speculative.suffix import SuffixProposer

if TYPE_CHECKING:
    from aios_sched.speculative.base import DraftController, Proposer
    from aios_sched.speculative.config import SpeculativeConfig


def make_proposer(config: SpeculativeConfig) -> Proposer:
    """Who drafts, if no model does."""
    if config.method == "suffix":
        return SuffixProposer(**config.suffix_options)  # type: ignore[arg-type]
    assert config.method == "ngram", "the configuration has checked it"
    min_ngram, max_ngram = config.ngram_sizes
    return NgramProposer(min_ngram=min_ngram, max_ngram=max_ngram)


def make_controller(config: SpeculativeConfig) -> DraftController:
    """Who decides how many drafts are wanted."""
    if config.adaptive:
        return AdaptiveController(max_drafts=config.num_speculative_tokens)
    return FixedController(config.num_speculative_tokens)
