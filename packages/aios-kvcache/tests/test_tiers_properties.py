"""Random calls against a model of three memories, and planted bugs that it must find."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiers_driver import HASHES, SALTS, ModelDriver, drive

from aios_kvcache.block import PageContent
from aios_kvcache.block_manager import BlockManager
from aios_kvcache.errors import UnknownSequenceError
from aios_kvcache.tier_level import Level
from aios_kvcache.tiers import PageTiers


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "private"])
@pytest.mark.parametrize("hash_name", HASHES)
@pytest.mark.parametrize("sizes", [(6, 1, 0), (8, 4, 0), (9, 3, 4), (12, 8, 30)], ids=str)
def test_thousands_of_random_operations_keep_every_page_intact(sizes, hash_name, caching):
    num_blocks, num_host, num_disk = sizes
    driver = ModelDriver(
        num_blocks=num_blocks, num_host=num_host, num_disk=num_disk, hash_name=hash_name, caching=caching
    )
    drive(driver, seed=num_blocks, num_operations=1500)
    stats = driver.tiers.stats
    assert min(stats.num_stored, stats.num_fetched, stats.num_saves, driver.num_failed) > 0
    if num_disk and hash_name == "hash":
        assert min(stats.num_demoted, stats.num_lost, driver.manager.stats.disk_hits) > 0


class TiersMachine(RuleBasedStateMachine):
    choice = st.integers(0, 1000)

    @initialize(
        num_blocks=st.integers(2, 10),
        num_host=st.integers(1, 6),
        num_disk=st.integers(0, 6),
        hash_name=st.sampled_from(sorted(HASHES)),
        caching=st.booleans(),
    )
    def start(self, **options):
        self.driver = ModelDriver(**options)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14), salt=st.sampled_from(SALTS))
    def admit(self, tokens, salt):
        self.driver.admit(tokens, salt)

    @precondition(lambda self: self.driver.running)
    @rule(choice=choice, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def advance(self, choice, tokens):
        self.driver.advance(self.pick(self.driver.running, choice), tokens)

    @precondition(lambda self: self.driver.running)
    @rule(choice=choice)
    def preempt(self, choice):
        self.driver.preempt(self.pick(self.driver.running, choice))

    @precondition(lambda self: self.driver.preempted)
    @rule(choice=choice)
    def resume(self, choice):
        self.driver.resume(self.pick(self.driver.preempted, choice))

    @precondition(lambda self: self.driver.running or self.driver.preempted)
    @rule(choice=choice)
    def end(self, choice):
        self.driver.end(self.pick([*self.driver.running, *self.driver.preempted], choice))

    @rule(seed=choice)
    def fail(self, seed):
        self.driver.fail(random.Random(seed))

    @rule(seed=choice)
    def lose(self, seed):
        self.driver.lose(0.5, random.Random(seed))

    @rule()
    def reset(self):
        self.driver.reset()

    @invariant()
    def holds(self):
        if hasattr(self, "driver"):
            self.driver.check()

    @staticmethod
    def pick(names, choice):
        return sorted(names)[choice % len(names)]


TiersMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, database=None)
TestTiersMachine = TiersMachine.TestCase


def _trusts_the_hash(monkeypatch):
    monkeypatch.setattr(PageContent, "holds", lambda *_: True)


def _ignores_the_salt(monkeypatch):
    def broken(self, parent, tokens, _):
        return self.tokens == tokens and self.parent_id == (parent.content_id if parent else 0)

    monkeypatch.setattr(PageContent, "holds", broken)


def _fetches_before_it_stores(monkeypatch):
    take_swaps = PageTiers.take_swaps

    def broken(self):
        first, swaps = take_swaps(self)
        return first, tuple(sorted(swaps, key=lambda swap: swap.kind == "out"))

    monkeypatch.setattr(PageTiers, "take_swaps", broken)


def _repeats_moves_after_a_failure(monkeypatch):
    def broken(self, first_swap, swaps):
        self._swaps[:0] = swaps

    monkeypatch.setattr(PageTiers, "rollback", broken)


def _gives_up_pages_about_to_be_fetched(monkeypatch):
    monkeypatch.setattr(PageTiers, "pin", lambda self, pages: None)
    monkeypatch.setattr(PageTiers, "unpin", lambda self, pages: None)


def _saves_pages_that_have_not_arrived(monkeypatch):
    settle = PageTiers.settle

    def broken(self, first_swap, swaps, lost):
        settle(self, first_swap, swaps, lost)
        return set()

    monkeypatch.setattr(PageTiers, "settle", broken)


def _gives_a_slot_away_twice(monkeypatch):
    monkeypatch.setattr(Level, "take_slot", lambda self: self._free[-1] if self._free else 0)


def _forgets_to_empty_slots(monkeypatch):
    monkeypatch.setattr(Level, "remove", lambda self, page: self._free.append(page.slot))


def _keeps_unreadable_pages(monkeypatch):
    monkeypatch.setattr(PageTiers, "_forget_slot", lambda self, swap, serial: None)
    monkeypatch.setattr(BlockManager, "settle_swaps", lambda self, first, swaps, lost: [])


BUGS = [
    _trusts_the_hash,
    _ignores_the_salt,
    _fetches_before_it_stores,
    _repeats_moves_after_a_failure,
    _gives_up_pages_about_to_be_fetched,
    _saves_pages_that_have_not_arrived,
    _gives_a_slot_away_twice,
    _forgets_to_empty_slots,
    _keeps_unreadable_pages,
]


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__.strip("_"))
def test_the_model_catches_tiers_that(plant, monkeypatch):
    plant(monkeypatch)

    def run_all():
        for hash_name in ("hash", "two values"):
            for seed in range(6):
                driver = ModelDriver(num_blocks=9, num_host=2 + seed, num_disk=3, hash_name=hash_name)
                drive(driver, seed=seed, num_operations=400)

    with pytest.raises((AssertionError, KeyError, IndexError, UnknownSequenceError)):
        run_all()


def test_the_least_recently_evicted_page_leaves_first():
    tiers = PageTiers(num_host_pages=2, num_disk_pages=1)
    contents = [PageContent(index, 0, (index,), "", index) for index in range(1, 5)]
    for content in contents[:2]:
        tiers.store(content, content.content_id)
    tiers.store(contents[0], 1)  # evicted again: it is there, and now the newest
    tiers.store(contents[2], 3)
    assert [page.content.content_id for page in tiers.host] == [1, 3]
    assert [page.content.content_id for page in tiers.disk] == [2]
    tiers.store(contents[3], 4)
    assert [page.content.content_id for page in tiers.host] == [3, 4]
    assert [page.content.content_id for page in tiers.disk] == [1]
    assert tiers.stats.num_forgotten == 1
    assert [swap.kind for swap in tiers.take_swaps()[1]] == ["out", "out", "demote", "out", "demote", "out"]
