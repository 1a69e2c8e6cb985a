"""Random calls against a model that knows what every slot must hold, and planted bugs that it must find."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pool_driver import HASH_FUNCTIONS, SALTS, VOCABULARY, ModelDriver, drive

from aios_kvcache.block import FreeQueue, PageContent
from aios_kvcache.block_manager import BlockManager
from aios_kvcache.block_pool import BlockPool
from aios_kvcache.prefix_cache import PrefixCache


@pytest.mark.parametrize("hash_name", HASH_FUNCTIONS)
@pytest.mark.parametrize("num_blocks", [1, 5, 12, 40])
def test_thousands_of_random_operations_keep_every_sequence_intact(num_blocks, hash_name):
    driver = ModelDriver(num_blocks=num_blocks, hash_function=HASH_FUNCTIONS[hash_name])
    drive(driver, seed=num_blocks, num_operations=1500)
    assert driver.queries > 0
    assert driver.num_refused > 0
    if num_blocks in (5, 12) and hash_name == "hash":
        assert driver.hits > 0
        assert driver.evictions > 0


class BlockManagerMachine(RuleBasedStateMachine):
    tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=14)
    choice = st.integers(0, 1000)

    @initialize(num_blocks=st.integers(1, 12), hash_name=st.sampled_from(sorted(HASH_FUNCTIONS)))
    def start(self, num_blocks, hash_name):
        self.driver = ModelDriver(num_blocks=num_blocks, hash_function=HASH_FUNCTIONS[hash_name])

    @rule(tokens=tokens, salt=st.sampled_from(SALTS), chunk=st.integers(1, 14))
    def admit(self, tokens, salt, chunk):
        self.driver.admit(tokens, salt, chunk)

    @precondition(lambda self: self.driver.running)
    @rule(choice=choice, tokens=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4), publish=st.booleans())
    def advance(self, choice, tokens, publish):
        self.driver.advance(self.pick(choice), tokens, publish=publish)

    @precondition(lambda self: self.driver.running)
    @rule(choice=choice)
    def fork(self, choice):
        self.driver.fork(self.pick(choice))

    @precondition(lambda self: self.driver.running)
    @rule(choice=choice, num_tokens=st.integers(0, 20))
    def truncate(self, choice, num_tokens):
        self.driver.truncate(self.pick(choice), num_tokens)

    @precondition(lambda self: self.driver.running)
    @rule(choice=choice)
    def free(self, choice):
        self.driver.free(self.pick(choice))

    @rule()
    def reset(self):
        self.driver.reset()

    @invariant()
    def holds(self):
        if hasattr(self, "driver"):
            self.driver.check()

    def pick(self, choice):
        return sorted(self.driver.running)[choice % len(self.driver.running)]


BlockManagerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, database=None)
TestBlockManagerMachine = BlockManagerMachine.TestCase


def _forgets_to_count_down(monkeypatch):
    release = BlockPool.release

    def broken(self, block_ids, *, undo=False):
        release(self, block_ids[1:] if len(block_ids) > 2 else block_ids, undo=undo)

    monkeypatch.setattr(BlockPool, "release", broken)


def _forgets_to_count_up(monkeypatch):
    def broken(self, block):
        if block.ref_count == 0:
            self.free_queue.remove(block)
            block.ref_count = 1

    monkeypatch.setattr(BlockPool, "hold", broken)


def _writes_into_shared_pages(monkeypatch):
    reserve = BlockManager.reserve

    def broken(self, sequence_id, *, start, end):
        table = self._sequences[sequence_id].table
        return reserve(self, sequence_id, start=max(start, min(len(table) * self.block_size, end)), end=end)

    monkeypatch.setattr(BlockManager, "reserve", broken)


def _copies_the_wrong_way(monkeypatch):
    copy_on_write = BlockManager._copy_on_write

    def broken(self, sequence, index):
        copy = copy_on_write(self, sequence, index)
        return type(copy)(copy.destination, copy.source)

    monkeypatch.setattr(BlockManager, "_copy_on_write", broken)


def _trusts_the_hash(monkeypatch):
    monkeypatch.setattr(PageContent, "holds", lambda *_: True)


def _compares_tokens_but_not_the_parent(monkeypatch):
    monkeypatch.setattr(PageContent, "holds", lambda self, _, tokens, salt: (self.tokens, self.salt) == (tokens, salt))


def _ignores_the_salt(monkeypatch):
    def broken(self, parent, tokens, _):
        return self.tokens == tokens and self.parent_id == (parent.content_id if parent else 0)

    monkeypatch.setattr(PageContent, "holds", broken)


def _keeps_evicted_pages_findable(monkeypatch):
    monkeypatch.setattr(PrefixCache, "remove", lambda self, block: setattr(block, "content", None))


def _evicts_the_newest(monkeypatch):
    monkeypatch.setattr(FreeQueue, "push_back", FreeQueue.push_front)


def _frees_the_beginning_first(monkeypatch):
    release = BlockPool.release
    monkeypatch.setattr(BlockPool, "release", lambda self, ids, undo=False: release(self, ids[::-1], undo=undo))


def _forgets_where_a_page_stood(monkeypatch):
    monkeypatch.setattr(FreeQueue, "put_back", FreeQueue.push_back)


def _undoes_what_is_no_longer_the_last_step(monkeypatch):
    free = BlockManager.free

    def broken(self, sequence_id):
        just_opened = self._just_opened
        free(self, sequence_id)
        self._just_opened = just_opened

    monkeypatch.setattr(BlockManager, "free", broken)
    reserve = BlockManager.reserve

    def forgetful(self, sequence_id, *, start, end):
        just_opened = self._just_opened
        copies = reserve(self, sequence_id, start=start, end=end)
        self._just_opened = just_opened
        return copies

    monkeypatch.setattr(BlockManager, "reserve", forgetful)


def _publishes_before_computing(monkeypatch):
    publish = BlockManager.publish

    def broken(self, sequence_id, token_ids, num_computed_tokens):
        room = min(len(token_ids), len(self._sequences[sequence_id].table) * self.block_size)
        publish(self, sequence_id, token_ids, room if room else num_computed_tokens)

    monkeypatch.setattr(BlockManager, "publish", broken)


def _counts_refused_admissions(monkeypatch):
    open_sequence = BlockManager.open

    def broken(self, sequence_id, token_ids, *, salt=""):
        cached = open_sequence(self, sequence_id, token_ids, salt=salt)
        self._count_admission(self._sequences[sequence_id])
        return cached

    monkeypatch.setattr(BlockManager, "open", broken)


BUGS = [
    _forgets_to_count_down,
    _forgets_to_count_up,
    _writes_into_shared_pages,
    _copies_the_wrong_way,
    _trusts_the_hash,
    _compares_tokens_but_not_the_parent,
    _ignores_the_salt,
    _keeps_evicted_pages_findable,
    _evicts_the_newest,
    _frees_the_beginning_first,
    _forgets_where_a_page_stood,
    _undoes_what_is_no_longer_the_last_step,
    _publishes_before_computing,
    _counts_refused_admissions,
]


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__.strip("_"))
def test_the_model_catches_a_manager_that(plant, monkeypatch):
    plant(monkeypatch)

    def run_all():
        for hash_name in ("hash", "two values"):
            for seed in range(5):
                driver = ModelDriver(num_blocks=10 + 5 * seed, hash_function=HASH_FUNCTIONS[hash_name])
                drive(driver, seed=seed, num_operations=400)

    with pytest.raises((AssertionError, KeyError)):
        run_all()
