"""Random calls against a model of three memories, and planted bugs that it must find.

The model carries out what the books plan, move by move: the pool, the host tier and the disk tier are dictionaries that
hold, for each token of a page, what its keys and values depend on: the salt and all tokens up to it. Steps fail at
random, having made all their moves, some or none; disk slots are lost at random. Whatever happens, each sequence must
find its own values, and each tier must hold what the books say.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aios_kvcache.block import PageContent
from aios_kvcache.block_manager import BlockManager
from aios_kvcache.errors import UnknownSequenceError
from aios_kvcache.swap import Swap
from aios_kvcache.tier_level import Level
from aios_kvcache.tiers import PageTiers

SIZE = 3
SALTS = ("", "tenant")
HASHES = {"hash": hash, "two values": lambda key: hash(key[:2]) % 2, "constant": lambda _: 0}


class Runner:
    """Makes moves, each once, in their order."""

    def __init__(self):
        self.pool, self.host, self.disk = {}, {}, {}
        self.num_done = 0
        self.lost = set()
        self.unreadable = set()

    def move(self, first: int, swaps: tuple[Swap, ...], *, stop: int | None = None) -> None:
        assert first <= self.num_done, "moves were skipped"
        for serial, swap in list(enumerate(swaps, start=first))[:stop]:
            if serial < self.num_done:
                continue
            if swap.kind == "out":
                self.host[swap.target] = list(self.pool[swap.source])
            elif swap.kind == "in":
                self.pool[swap.target] = list(self.host[swap.source])
            elif swap.kind == "demote":
                self.disk[swap.target] = list(self.host[swap.source])
                self.unreadable.discard(swap.target)
            elif swap.source in self.unreadable:
                self.lost.add(serial)
                self.pool[swap.target] = ["zeros"] * SIZE
            else:
                self.pool[swap.target] = list(self.disk[swap.source])
            self.num_done = serial + 1


class Modelled:
    def __init__(self, salt, tokens):
        self.salt, self.tokens, self.computed = salt, tokens, 0


class ModelDriver:
    def __init__(self, *, num_blocks, num_host, num_disk, hash_name="hash", caching=True):
        self.tiers = PageTiers(num_host_pages=num_host, num_disk_pages=num_disk)
        self.manager = BlockManager(
            num_blocks=num_blocks,
            block_size=SIZE,
            hash_function=HASHES[hash_name],
            enable_prefix_caching=caching,
            tiers=self.tiers,
        )
        self.runner = Runner()
        self.running: dict[str, Modelled] = {}
        self.preempted: dict[str, Modelled] = {}
        self.prefix_of: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.stored_at: dict[int, int] = {}
        self.clock = self.num_opened = self.num_resumed_tokens = self.num_failed = 0
        self._watch_contents()

    def _watch_contents(self):
        new_content = self.manager._pool.cache.new_content

        def watched(parent, tokens, salt, *, page_hash=0):
            content = new_content(parent, tokens, salt, page_hash=page_hash)
            before = self.prefix_of[parent.content_id][1] if parent else ()
            self.prefix_of[content.content_id] = salt, before + tokens
            return content

        self.manager._pool.cache.new_content = watched

    # -- calls

    def admit(self, tokens, salt):
        self.num_opened += 1
        self._start(f"s{self.num_opened}", Modelled(salt, list(tokens)))

    def resume(self, name):
        sequence = self.preempted.pop(name)
        if not self._start(name, sequence):
            self.preempted[name] = sequence

    def _start(self, name, sequence) -> bool:
        found = self.manager.open(name, sequence.tokens, salt=sequence.salt)
        assert found < len(sequence.tokens)
        if self.manager.reserve(name, start=found, end=len(sequence.tokens)) is None:
            self.manager.free(name)
            self.check()
            return False
        sequence.computed = found
        self.num_resumed_tokens += found if name in self.preempted else 0
        self.running[name] = sequence
        self._step([name])
        return True

    def advance(self, name, new_tokens):
        sequence = self.running[name]
        sequence.tokens.extend(new_tokens)
        if self.manager.reserve(name, start=sequence.computed, end=len(sequence.tokens)) is None:
            del sequence.tokens[len(sequence.tokens) - len(new_tokens) :]
        self._step([name])

    def preempt(self, name):
        sequence = self.running.pop(name)
        saved = self.manager.save(name, sequence.tokens, sequence.computed)
        self.manager.free(name)
        sequence.computed = 0
        sequence.tokens.append(1)  # there is always one token that is not computed
        self.preempted[name] = sequence
        assert saved or not self.tiers._saved.get(name)
        self.check()

    def end(self, name):
        if self.running.pop(name, None):
            self.manager.free(name)
        else:
            del self.preempted[name]
        self.manager.forget_saved(name)
        self.check()

    def reset(self):
        assert self.manager.reset_prefix_cache() is not bool(self.running)
        self.check()

    def lose(self, share, draw):
        self.runner.unreadable |= {slot for slot in self.runner.disk if draw.random() < share}

    def fail(self, draw):
        """A step fails, having made some of its moves; they come again with the next one."""
        first, swaps = self.tiers.take_swaps()
        self.runner.move(first, swaps, stop=draw.randint(0, len(swaps)))
        self.tiers.rollback(first, swaps, has_copies=False)
        self.num_failed += bool(swaps)
        self.check()

    # -- a step

    def _step(self, names):
        first, swaps = self.tiers.take_swaps()
        self.runner.move(first, swaps)
        for name in names:
            self._compute(name)
        lost = [serial for serial in range(first, first + len(swaps)) if serial in self.runner.lost]
        broken = self.manager.settle_swaps(first, swaps, lost)
        for name in names:
            if name not in broken:
                self.manager.publish(name, self.running[name].tokens, self.running[name].computed)
        for name in broken:  # what the scheduler does: start over
            self.manager.free(name)
            sequence = self.running.pop(name)
            sequence.computed = 0
            self.preempted[name] = sequence
        self.check()

    def _compute(self, name):
        sequence, table = self.running[name], self.manager.block_table(name)
        for position in range(sequence.computed, len(sequence.tokens)):
            page = self.runner.pool.setdefault(table[position // SIZE], [None] * SIZE)
            page[position % SIZE] = sequence.salt, tuple(sequence.tokens[: position + 1])
        sequence.computed = len(sequence.tokens)

    # -- checks

    def check(self):
        self.manager.check_invariants()
        if self.tiers._swaps:  # planned, not made: what lies where is known when they are
            return
        for name, sequence in self.running.items():
            table = self.manager.block_table(name)
            for position in range(sequence.computed):
                value = self.runner.pool[table[position // SIZE]][position % SIZE]
                assert value == (sequence.salt, tuple(sequence.tokens[: position + 1])), f"{name} reads another's keys"
        for level, memory in ((self.tiers.host, self.runner.host), (self.tiers.disk, self.runner.disk)):
            for page in level:
                salt, prefix = self.prefix_of[page.content.content_id]
                count = len(page.content.tokens)
                expected = [(salt, prefix[: len(prefix) - count + index + 1]) for index in range(count)]
                assert memory[page.slot][:count] == expected, f"{page} holds something else"


def drive(driver, *, seed, num_operations):
    draw = random.Random(seed)
    for _ in range(num_operations):
        running, preempted = sorted(driver.running), sorted(driver.preempted)
        kind = draw.choices(
            ("admit", "advance", "preempt", "resume", "end", "fail", "lose", "reset"), (3, 4, 2.5, 4, 1, 0.7, 1.5, 0.05)
        )[0]
        if kind == "admit":
            driver.admit([draw.randrange(2) for _ in range(draw.randint(1, 12))], draw.choice(SALTS))
        elif kind == "advance" and running:
            driver.advance(draw.choice(running), [draw.randrange(2) for _ in range(draw.randint(1, 3))])
        elif kind == "preempt" and running:
            driver.preempt(draw.choice(running))
        elif kind == "resume" and preempted:
            driver.resume(draw.choice(preempted))
        elif kind == "end" and running + preempted:
            driver.end(draw.choice(running + preempted))
        elif kind == "fail":
            driver.fail(draw)
        elif kind == "lose":
            driver.lose(0.5, draw)
        elif kind == "reset":
            driver.reset()
    for name in [*driver.running, *driver.preempted]:
        driver.end(name)
    assert driver.manager.num_free_blocks == driver.manager.num_blocks


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
    def broken(self, first_swap, swaps, *, has_copies):
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
