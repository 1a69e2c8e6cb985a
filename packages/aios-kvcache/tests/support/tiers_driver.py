"""Random calls of a block manager with tiers against a model of three memories.

The model carries out what the books plan, move by move: the pool, the host tier and the disk tier are dictionaries that
hold, for each token of a page, what its keys and values depend on: the salt and all tokens up to it. Steps fail at
random, having made all their moves, some or none; disk slots are lost at random. Whatever happens, each sequence must
find its own values, and each tier must hold what the books say.
"""

from __future__ import annotations

import random

from aios_kvcache.block_manager import BlockManager
from aios_kvcache.swap import Swap
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
        self.tiers.rollback(first, swaps)
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
