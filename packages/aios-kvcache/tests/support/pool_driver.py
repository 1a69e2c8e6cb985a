"""Random calls of a block manager against a model that knows what every slot must hold.

The model gives each slot a value that stands for its keys and values: the salt and all tokens up to the slot's own,
for that is what they depend on. Whatever the block manager shares, copies and evicts, each sequence must find its own
values in its own slots.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from aios_kvcache.block_manager import BlockManager

BLOCK_SIZE = 3
VOCABULARY = 2
SALTS = ("", "tenant")
HASH_FUNCTIONS = {"hash": hash, "constant": lambda _: 0, "two values": lambda key: hash(key[:2]) % 2}


@dataclass
class Modelled:
    salt: str
    tokens: list[int]
    computed: int


class ModelDriver:
    """Calls a block manager and checks each answer against plain dictionaries."""

    def __init__(self, *, num_blocks: int, hash_function=hash) -> None:
        self.manager = BlockManager(num_blocks=num_blocks, block_size=BLOCK_SIZE, hash_function=hash_function)
        self.collisions = hash_function is not hash
        self.running: dict[str, Modelled] = {}
        self.memory: dict[tuple[int, int], object] = {}
        self.published: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.released: dict[int, int] = {}
        self.clock = 0
        self.num_forked: dict[str, tuple[int, int]] = {}  # tokens found and asked for, until the first pages are taken
        self.queries = self.hits = self.evictions = self.num_opened = self.num_refused = 0

    # -- calls

    def admit(self, tokens: list[int], salt: str, chunk: int) -> None:
        self.num_opened += 1
        name = f"s{self.num_opened}"
        before = self._free_order()
        cached = self.manager.open(name, tokens, salt=salt)
        expected = self._expected_hits(tokens, salt)
        assert cached <= expected if self.collisions else cached == expected
        self.running[name] = Modelled(salt, list(tokens), cached)
        self.check_memory()
        if self._compute(name, min(len(tokens), cached + chunk)):
            self.queries += len(tokens)
            self.hits += cached
        else:
            self.num_refused += 1
            del self.running[name]
            self.manager.free(name)
            assert self._free_order() == before, "a failed admission changed the order of eviction"
        self.check()

    def advance(self, name: str, new_tokens: list[int], *, publish: bool) -> None:
        sequence = self.running[name]
        if sequence.computed == len(sequence.tokens):
            sequence.tokens.extend(new_tokens)
        end = min(len(sequence.tokens), sequence.computed + len(new_tokens))
        self._compute(name, end, publish=publish)
        self.check()

    def fork(self, name: str, num_tokens: int | None = None, *, num_queried: int = 0) -> None:
        """A child with the first tokens of what its parent computed; None for all, as of its pages."""
        self.num_opened += 1
        child, parent = f"s{self.num_opened}", self.running[name]
        self.manager.fork(name, child, num_tokens=num_tokens, num_queried=num_queried)
        num_tokens = parent.computed if num_tokens is None else num_tokens
        self.running[child] = Modelled(parent.salt, parent.tokens[: max(num_tokens, 1)], num_tokens)
        self.num_forked[child] = num_tokens, num_queried
        self.check()

    def truncate(self, name: str, num_tokens: int) -> None:
        sequence = self.running[name]
        sequence.computed = min(sequence.computed, num_tokens)
        del sequence.tokens[max(sequence.computed, 1) :]
        self.manager.truncate(name, sequence.computed)
        self.check()

    def free(self, name: str) -> None:
        del self.running[name]
        self.manager.free(name)
        self.check()

    def reset(self) -> None:
        in_use = self.manager.num_free_blocks < self.manager.num_blocks
        assert self.manager.reset_prefix_cache() is not in_use
        if not in_use:
            self.published.clear()
        self.check()

    # -- checks

    def check(self) -> None:
        self.manager.check_invariants()
        self._check_evictions()
        self.check_memory()
        stats = self.manager.stats
        assert (stats.queries, stats.hits, stats.evictions) == (self.queries, self.hits, self.evictions)
        held = self._held()
        assert self.manager.num_free_blocks == self.manager.num_blocks - len(held)
        assert self.manager.num_cached_blocks == len(self.published)
        known = {("", ()), ("tenant", ()), *self.published.values()}
        for salt, prefix in self.published.values():
            assert (salt, prefix[:-BLOCK_SIZE]) in known, "a page outlived the page before it, and can never be found"
        self.clock += 1
        for page in self.published:
            if page in held:
                self.released.pop(page, None)
            else:
                self.released.setdefault(page, self.clock)

    def check_memory(self) -> None:
        for name, sequence in self.running.items():
            table = self.manager.block_table(name)
            for position in range(sequence.computed):
                slot = table[position // BLOCK_SIZE], position % BLOCK_SIZE
                expected = sequence.salt, tuple(sequence.tokens[: position + 1])
                assert self.memory.get(slot) == expected, f"{name} reads another's keys at position {position}"

    def _compute(self, name: str, end: int, *, publish: bool = True) -> bool:
        sequence = self.running[name]
        table, free = self.manager.block_table(name), self.manager.num_free_blocks
        copies = self.manager.reserve(name, start=sequence.computed, end=end)
        if copies is None:
            assert (self.manager.block_table(name), self.manager.num_free_blocks) == (table, free)
            assert self._pages_needed(name, table, sequence.computed, end) > free, "refused in spite of room"
            return False
        num_found, num_queried = self.num_forked.pop(name, (0, 0))
        self.queries += num_queried
        self.hits += num_found if num_queried else 0
        for copy in copies:
            for offset in range(BLOCK_SIZE):
                self.memory[copy.destination, offset] = self.memory.get((copy.source, offset))
        self._check_evictions()
        table = self.manager.block_table(name)
        for position in range(sequence.computed, end):
            page = table[position // BLOCK_SIZE]
            assert page not in self.published, f"{name} would write into the published page {page}"
            self.memory[page, position % BLOCK_SIZE] = sequence.salt, tuple(sequence.tokens[: position + 1])
        sequence.computed = end
        if publish:
            self.manager.publish(name, sequence.tokens, end)
            for index, page in enumerate(self.manager.block_table(name)[: end // BLOCK_SIZE]):
                if self.manager._pool.blocks[page].content is not None:
                    prefix = tuple(sequence.tokens[: (index + 1) * BLOCK_SIZE])
                    assert self.published.setdefault(page, (sequence.salt, prefix)) == (sequence.salt, prefix)
                else:
                    assert self.collisions, "a full and computed page was not published"
        return True

    def _pages_needed(self, name: str, table: list[int], start: int, end: int) -> int:
        others = [page for other in self.running if other != name for page in self.manager.block_table(other)]
        written = table[start // BLOCK_SIZE : -(-end // BLOCK_SIZE)]
        return -(-end // BLOCK_SIZE) - len(table) + sum(p in others or p in self.published for p in written)

    def _expected_hits(self, tokens: list[int], salt: str) -> int:
        known = set(self.published.values())
        hits = 0
        while hits + BLOCK_SIZE < len(tokens) and (salt, tuple(tokens[: hits + BLOCK_SIZE])) in known:
            hits += BLOCK_SIZE
        return hits

    def _check_evictions(self) -> None:
        """Published pages may vanish only for room: when no private page is free, and the oldest first."""
        evicted = [page for page in self.published if self.manager._pool.blocks[page].content is None]
        for page in evicted:
            del self.published[page]
        self.evictions += len(evicted)
        if evicted:
            free = set(self._free_order())
            assert free <= set(self.published), "a cached page was evicted though a private page was free"
            newest = max(self.released.pop(page) for page in evicted)
            assert all(self.released.get(page, newest) >= newest for page in free), "a newer page was evicted first"

    def _held(self) -> set[int]:
        return {page for name in self.running for page in self.manager.block_table(name)}

    def _free_order(self) -> list[int]:
        return [block.block_id for block in self.manager._pool.free_queue]


def drive(driver: ModelDriver, *, seed: int, num_operations: int) -> None:
    """Draws operations with the weights of a busy server."""
    draw = random.Random(seed)
    for _ in range(num_operations):
        names = list(driver.running)
        kind = draw.choices(("admit", "advance", "fork", "truncate", "free", "reset"), (3, 6, 1, 1, 2.5, 0.3))[0]
        if kind == "admit" or (not names and kind != "reset"):
            tokens = [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 14))]
            tail = [0] * draw.choice((0, 0, 0, BLOCK_SIZE * driver.manager.num_blocks))  # some can never fit
            driver.admit(tokens + tail, draw.choice(SALTS), draw.randint(1, 14) + len(tail))
        elif kind == "advance":
            tokens = [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 4))]
            driver.advance(draw.choice(names), tokens, publish=draw.random() < 0.8)
        elif kind == "reset":
            driver.reset()
        elif kind == "truncate":
            name = draw.choice(names)
            driver.truncate(name, draw.randint(0, driver.running[name].computed))
        elif kind == "fork":
            name = draw.choice(names)
            num_tokens = draw.choice((None, draw.randint(0, driver.running[name].computed)))
            driver.fork(name, num_tokens, num_queried=0 if num_tokens is None else draw.choice((0, 5)))
        else:
            getattr(driver, kind)(draw.choice(names))
    for name in list(driver.running):
        driver.free(name)
    assert driver.manager.num_free_blocks == driver.manager.num_blocks
