"""What events say is what the books say: after every event, under random calls, with tiers and without."""

from __future__ import annotations

import json
from collections import Counter

import pool_driver
import pytest
import tiers_driver

from aios_kvcache.block_manager import BlockManager
from aios_kvcache.page_events import (
    EVENT_TYPES,
    Copied,
    Evicted,
    Fetched,
    Found,
    PageEventStream,
    Published,
    Released,
    Taken,
)
from aios_kvcache.page_recorder import PageRecorder
from aios_kvcache.page_states import PageHistoryError, PageStates
from aios_kvcache.page_trace import PageTrace, PageTraceError
from aios_kvcache.tiers import PageTiers
from aios_model.errors import AiosError, ConfigError


def books(states: PageStates):
    """All that a state says; in which order the holders of a page came does not matter."""
    return [sorted(owners) for owners in states.owners], states.contents, states.stored


class Mirror:
    """Rebuilds the pages from events alone. Each event must leave the pages it names as the books have them."""

    def __init__(self, manager: BlockManager) -> None:
        self.states, self.manager = manager.page_states(), manager
        self.kinds: Counter[str] = Counter()
        self.found = Counter()
        manager.events.add(self)

    def note(self, event) -> None:
        self.states.apply(event)
        self.kinds[type(event).__name__.lower()] += 1
        if isinstance(event, Found):
            self.found.update(queried=event.num_queried, found=event.num_found, stored=event.num_stored)
        for page in pages_of(event):
            block = self.manager._pool.blocks[page]
            assert self.states.ref_count(page) == block.ref_count, f"{event}: {block}"
            assert self.states.contents[page] == (block.content.content_id if block.content else 0), f"{event}: {block}"

    def check(self) -> None:
        assert books(self.states) == books(self.manager.page_states()), "events left something out"
        stats = self.manager.stats
        num_stored = stats.host_hits + stats.disk_hits
        assert self.found == Counter(queried=stats.queries, found=stats.hits - num_stored, stored=num_stored)
        assert self.kinds["evicted"] == stats.evictions


def pages_of(event) -> tuple[int, ...]:
    """The pages of the pool that an event changes."""
    if isinstance(event, Copied):
        return event.source, event.target
    if isinstance(event, Published | Evicted):
        return (event.page,)
    return getattr(event, "pages", ())


def mirrored(module):
    """The driver of a test-suite, with a mirror that is compared after every call."""

    class Driver(module.ModelDriver):
        def __init__(self, **options):
            super().__init__(**options)
            self.mirror = Mirror(self.manager)

        def check(self):
            super().check()
            self.mirror.check()

    return Driver


@pytest.fixture
def loudly(monkeypatch):
    """Whoever listens may fail the test."""
    monkeypatch.setattr(PageEventStream, "emit", lambda self, event: [each.note(event) for each in self._watchers])


@pytest.mark.usefixtures("loudly")
@pytest.mark.parametrize("hash_name", ["hash", "two values"])
@pytest.mark.parametrize("num_blocks", [1, 5, 12, 40])
def test_after_thousands_of_random_calls_events_give_the_state_of_every_page(num_blocks, hash_name):
    driver = mirrored(pool_driver)(num_blocks=num_blocks, hash_function=pool_driver.HASH_FUNCTIONS[hash_name])
    pool_driver.drive(driver, seed=100 + num_blocks, num_operations=1000)
    if num_blocks == 12 and hash_name == "hash":
        tiers = {"stored", "fetched", "demoted", "dropped"}
        assert set(driver.mirror.kinds) == set(EVENT_TYPES) - tiers


@pytest.mark.usefixtures("loudly")
@pytest.mark.parametrize("sizes", [(3, 1, 0), (8, 4, 3), (12, 6, 20)])
def test_events_give_the_state_of_the_tiers_too(sizes):
    num_blocks, num_host, num_disk = sizes
    driver = mirrored(tiers_driver)(num_blocks=num_blocks, num_host=num_host, num_disk=num_disk)
    tiers_driver.drive(driver, seed=sum(sizes), num_operations=600)
    if num_disk:
        assert {"stored", "fetched", "demoted", "dropped", "evicted", "found"} <= set(driver.mirror.kinds)


def leaving_out(kind):
    """Tells of everything but every second event of one kind."""
    counter = Counter()

    def emit(self, event):
        name = type(event).__name__.lower()
        counter[name] += 1
        if name != kind or counter[name] % 2:
            for each in self._watchers:
                each.note(event)

    return emit


@pytest.mark.parametrize("kind", sorted(set(EVENT_TYPES) - {"fetched"}))  # that one leaves the books as they are
def test_an_event_left_out_is_noticed(kind, monkeypatch):
    monkeypatch.setattr(PageEventStream, "emit", leaving_out(kind))

    def run_all():
        for seed in range(5):
            for num_blocks in (2, 10):
                pool = mirrored(pool_driver)(num_blocks=num_blocks)
                pool_driver.drive(pool, seed=seed, num_operations=300)
            tiers = mirrored(tiers_driver)(num_blocks=8, num_host=4, num_disk=3)
            tiers_driver.drive(tiers, seed=seed, num_operations=300)

    with pytest.raises((AssertionError, PageHistoryError)):
        run_all()


def test_fetched_pages_are_told_with_the_place_they_come_from():
    manager = BlockManager(num_blocks=2, block_size=2, tiers=PageTiers(num_host_pages=4))
    for name, tokens in (("a", [1, 2, 3]), ("b", [4, 5, 6])):
        manager.open(name, tokens)
        manager.reserve(name, start=0, end=3)
        manager.publish(name, tokens, 3)
        manager.free(name)
    recorder = PageRecorder(manager)
    manager.open("again", [1, 2, 3])
    manager.reserve("again", start=2, end=3)
    events = [record.event for record in recorder.since(0)]
    assert Fetched(page=1, content=1, tier="host", slot=0) in events
    assert Found(sequence="again", num_queried=3, num_found=0, num_stored=2) in events


# -- recording -----------------------------------------------------------------------------------------------------


def test_a_recorder_knows_the_state_after_each_event_it_remembers():
    driver = tiers_driver.ModelDriver(num_blocks=8, num_host=4, num_disk=3)
    mirror, history = Mirror(driver.manager), []
    recorder = PageRecorder(driver.manager, max_events=300, clock=lambda: len(history) / 2)
    driver.manager.events.add(Told(lambda event: history.append(mirror.states.copy())))
    tiers_driver.drive(driver, seed=3, num_operations=400)
    trace = recorder.trace()
    assert recorder.num_events == len(history) > 600
    assert (trace.number, len(trace.records)) == (len(history) - 300, 300)
    for number in range(trace.number, len(history) + 1, 7):
        assert books(trace.at(number)) == books(history[number - 1])
        assert books(trace.at_time((number - 1) / 2)) == books(history[number - 1])
    assert books(recorder.snapshot().states) == books(driver.manager.page_states())
    with pytest.raises(PageTraceError, match=f"has {trace.number} to {len(history)}"):
        trace.at(trace.number - 1)
    with pytest.raises(PageTraceError, match="before the start"):
        trace.at_time(trace.time - 0.5)


class Told:
    """Somebody who listens."""

    def __init__(self, note):
        self.note = note


def test_a_snapshot_and_what_came_since_give_the_present_state():
    driver = pool_driver.ModelDriver(num_blocks=12)
    recorder = PageRecorder(driver.manager, max_events=200)
    for seed in range(30):
        snapshot = recorder.snapshot()
        pool_driver.drive(driver, seed=seed, num_operations=20)
        records = recorder.since(snapshot.number)
        assert [record.number for record in records] == list(range(snapshot.number + 1, recorder.num_events + 1))
        for record in records:
            snapshot.states.apply(record.event)
        assert books(snapshot.states) == books(driver.manager.page_states())
    assert recorder.since(0) is None
    assert recorder.since(recorder.num_events) == []


def test_a_recorder_begins_with_what_is_there_and_ends_when_it_is_closed():
    manager = BlockManager(num_blocks=4, block_size=2)
    manager.open("early", [1, 2, 3])
    manager.reserve("early", start=0, end=3)
    manager.publish("early", [1, 2, 3], 3)
    with PageRecorder(manager) as recorder:
        manager.open("late", [1, 2, 4])
        snapshot = recorder.snapshot()
    manager.free("early")
    assert snapshot.states.owners[1] == ("early", "late")
    assert [snapshot.states.status(page) for page in (1, 2, 3)] == ["shared", "private", "free"]
    assert recorder.num_events == 1
    assert not manager.events.is_watched
    with pytest.raises(ConfigError, match="at least 1"):
        PageRecorder(manager, max_events=0)


def test_a_watcher_that_fails_is_told_no_more_and_the_books_go_on(caplog):
    def fail(event):
        raise RuntimeError("cannot draw this")

    manager, told = BlockManager(num_blocks=4, block_size=2), []
    for note in (fail, told.append):
        manager.events.add(Told(note))
    manager.open("a", [1, 2, 3])
    assert manager.reserve("a", start=0, end=3) == []
    manager.free("a")
    manager.check_invariants()
    assert [type(event) for event in told] == [Taken, Found, Released]
    assert caplog.text.count("RuntimeError: cannot draw this") == 1


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_trace_is_read_as_it_was_written(tmp_path):
    driver = tiers_driver.ModelDriver(num_blocks=8, num_host=4, num_disk=3)
    recorder = PageRecorder(driver.manager, max_events=400)
    tiers_driver.drive(driver, seed=5, num_operations=300)
    driver.admit([0, 1, 0, 1, 0], "")
    trace = recorder.trace()
    trace.write(tmp_path / "pages.jsonl")
    again = PageTrace.read(tmp_path / "pages.jsonl")
    assert (again.records, again.number, again.time, again.end) == (trace.records, trace.number, trace.time, trace.end)
    assert (again.num_blocks, again.block_size) == (8, tiers_driver.SIZE)
    assert books(again.start) == books(trace.start)
    assert any(trace.start.owners)
    assert books(again.at(recorder.num_events)) == books(driver.manager.page_states())


BROKEN = {
    "nothing": ("", "line 1 is no part"),
    "other JSON": ("[1, 2]\n", "the first line must say"),
    "another format": ('{"format": "csv"}\n', "the first line must say"),
    "a later version": ('{"format": "aios-page-trace", "version": 2}\n', "version 2 is unknown; this reads version 1"),
    "an unknown event": ('{head}\n{"n": 1, "t": 0.0, "event": "lent"}\n', "line 2 .* 'lent' is unknown"),
    "a page too many": (
        '{head}\n{"n": 1, "t": 0.0, "event": "taken", "sequence": "a", "pages": [9]}\n',
        "line 2 .* IndexError",
    ),
    "a missing key": ('{head}\n{"n": 1, "t": 0.0, "event": "taken", "sequence": "a"}\n', "line 2 .* 'pages'"),
    "half a line": ('{head}\n{"n": 1, "t": 0.', "line 2 .* JSONDecodeError"),
    "a gap": (
        '{head}\n{"n": 1, "t": 0.0, "event": "released", "sequence": "a", "pages": [1]}\n',
        "line 2 .* names page 1, which it does not hold: events before it are missing",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_trace_is_named_with_its_line(case, tmp_path):
    head = {"format": "aios-page-trace", "version": 1, "num_blocks": 2, "block_size": 16, "number": 0, "time": 0.0}
    head |= {"end": 1.0, "owners": {}, "contents": {}, "stored": {}}
    text, message = BROKEN[case]
    path = tmp_path / "pages.jsonl"
    path.write_text(text.replace("{head}", json.dumps(head)))
    with pytest.raises(PageTraceError, match=message):
        PageTrace.read(path)


def test_a_trace_that_cannot_be_read_or_written_says_so(tmp_path):
    trace = PageRecorder(BlockManager(num_blocks=1)).trace()
    with pytest.raises(AiosError, match="cannot be written"):
        trace.write(tmp_path / "none" / "pages.jsonl")
    with pytest.raises(PageTraceError, match="cannot be read"):
        PageTrace.read(tmp_path / "none.jsonl")
