"""What is worth moving: plain arithmetic, on either side of the break-even."""

from __future__ import annotations

import pytest

from aios_kvcache.block_manager import BlockManager
from aios_kvcache.tier_costs import TierCosts, TransferSeconds
from aios_kvcache.tiers import PageTiers
from aios_model.errors import ConfigError

TRANSFERS = TransferSeconds(page_out=1.0, page_in=2.0, disk_write=9.0, disk_read=5.0)


def costs(mode, seconds_per_token):
    costs = TierCosts(TRANSFERS, mode=mode, block_size=4)
    costs.note_prefill(10, 10 * seconds_per_token)
    return costs


def test_auto_compares_moving_with_computing():
    cheap, dear = costs("auto", 0.7), costs("auto", 1.3)  # four tokens: 2.8 s and 5.2 s
    assert [each.worth_keeping() for each in (cheap, dear)] == [False, True]  # out and in: 3 s
    assert [each.worth_demoting() for each in (cheap, dear)] == [False, True]  # from disk: 5 s
    assert [each.worth_saving(num_pages=2, num_tokens=8) for each in (cheap, dear)] == [False, True]
    # Two pages from memory and one from disk: 9 s.
    assert [each.worth_fetching(num_host_pages=2, num_disk_pages=1, num_tokens=12) for each in (cheap, dear)] == [
        False,
        True,
    ]


def test_until_a_prompt_was_computed_pages_are_moved():
    unknown = TierCosts(TRANSFERS, block_size=4)
    assert unknown.worth_keeping()
    assert unknown.worth_saving(num_pages=100, num_tokens=1)


@pytest.mark.parametrize(("mode", "saves"), [("swap", True), ("recompute", False)])
def test_other_modes_decide_without_measuring(mode, saves):
    for seconds in (0.001, 1000.0):
        assert costs(mode, seconds).worth_saving(num_pages=2, num_tokens=8) is saves
    assert costs(mode, 0.001).worth_keeping() is saves  # evicted pages: recompute compares, swap always moves
    assert costs(mode, 1000.0).worth_keeping()


def test_the_average_follows_the_newest_steps():
    costs = TierCosts(TRANSFERS)
    costs.note_prefill(10, 10.0)
    for _ in range(50):
        costs.note_prefill(100, 300.0)
    assert costs.seconds_per_token == pytest.approx(3.0, abs=1e-3)


def test_the_slowest_rank_counts():
    other = TransferSeconds(page_out=3.0, page_in=1.0)
    slowest = TransferSeconds.slowest([TRANSFERS, other])
    assert slowest == TransferSeconds(page_out=3.0, page_in=2.0, disk_write=9.0, disk_read=5.0)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="'never'"):
        TierCosts(mode="never")


def test_a_saved_page_that_is_not_worth_fetching_is_computed_again():
    """Saved while nothing was known of computing, which turned out to be fast."""
    tiers = PageTiers(num_host_pages=4, costs=TierCosts(TRANSFERS, block_size=4))
    manager = BlockManager(num_blocks=4, block_size=4, tiers=tiers)
    tokens = [1, 2, 3, 4, 5, 6]
    manager.open("a", tokens)
    manager.reserve("a", start=0, end=6)
    assert manager.save("a", tokens, 5)
    manager.free("a")
    tiers.costs.note_prefill(1, 1e-6)
    assert manager.open("a", tokens) == 0
    assert manager.reserve("a", start=0, end=6) == []
    manager.check_invariants()
    assert [swap.kind for swap in tiers.take_swaps()[1]] == ["out", "out"]
    assert manager.save("a", tokens, 5) is False
    manager.free("a")
    assert not list(tiers.host)
