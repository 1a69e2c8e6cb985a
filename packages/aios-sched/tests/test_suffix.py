"""The suffix automaton against brute force, and the drafts that come of it."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter

import pytest

from aios_model.errors import ConfigError
from aios_model.sampling.params import SamplingParams
from aios_model.sampling.rows import SamplingRow
from aios_sched.speculative.base import DraftContext
from aios_sched.speculative.suffix import SuffixProposer
from aios_sched.speculative.suffix_automaton import NO_MATCH, SuffixAutomaton
from aios_sched.speculative.suffix_store import Cursor, RecentTexts


def occurrences(texts):
    return Counter(
        tuple(text[start:end])
        for text in texts
        for start in range(len(text))
        for end in range(start + 1, len(text) + 1)
    )


def random_texts(seed):
    draw = random.Random(seed)
    width = draw.choice([1, 2, 3, 5])
    return [[draw.randrange(width) for _ in range(draw.randrange(1, 16))] for _ in range(draw.randrange(1, 4))]


def automaton_of(texts, **options):
    automaton = SuffixAutomaton(**options)
    for text in texts:
        automaton.end_text()
        for token in text:
            automaton.extend(token)
    return automaton


def find(automaton, tokens):
    match = NO_MATCH
    for token in tokens:
        match = automaton.advance(match, token)
    return match


@pytest.mark.parametrize("seed", range(60))
def test_every_substring_is_found_and_counted(seed):
    texts = random_texts(seed)
    automaton = automaton_of(texts, max_counted_links=10**6)
    counts = occurrences(texts)
    for tokens, count in counts.items():
        match = find(automaton, tokens)
        assert match.length == len(tokens)
        assert automaton.count(match.state) == count
        following = Counter({key[-1]: n for key, n in counts.items() if key[:-1] == tokens})
        step = automaton.likeliest(match.state)
        if not following:
            assert step is None
        else:
            assert step.num_times == following[step.token_id] == max(following.values())
            assert step.num_total == sum(following.values())


@pytest.mark.parametrize("seed", range(60))
def test_matches_are_the_longest_there_are(seed):
    texts = random_texts(seed)
    automaton, counts = automaton_of(texts), occurrences(texts)
    last = texts[-1]
    repeats = [length for length in range(1, len(last) + 1) if counts[tuple(last[-length:])] > 1]
    assert automaton.longest_repeat().length == max(repeats, default=0)
    other = random_texts(seed + 1000)[0]
    match = NO_MATCH
    for end in range(1, len(other) + 1):
        match = automaton.advance(match, other[end - 1])
        suffixes = [length for length in range(1, end + 1) if tuple(other[end - length : end]) in counts]
        assert match.length == max(suffixes, default=0)


def test_of_equally_frequent_continuations_the_newest_is_taken():
    automaton = automaton_of([[1, 2, 3, 1, 2, 4, 9, 1, 2]])
    assert automaton.likeliest(find(automaton, [1, 2]).state).token_id == 4


def test_memory_is_counted_as_it_is():
    draw = random.Random(0)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        automaton = automaton_of([[min(int(draw.paretovariate(0.8)), 49_000) for _ in range(5000)]])
        measured = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.7 * measured < automaton.num_bytes < 1.5 * measured
    assert measured / automaton.num_tokens < 400


# -- the store -------------------------------------------------------------------------------------


def test_store_stays_within_its_bounds_and_forgets_the_oldest():
    store = RecentTexts(max_tokens=400, max_tokens_per_salt=200)
    for number in range(60):
        store.add("abc"[number % 3], [1000 * number + place for place in range(30)])
        while store.enter(7):
            assert store.num_tokens <= 400 + 7
    pair = store.generations("c")
    assert sum(automaton.num_tokens for automaton in pair) <= 200
    newest, oldest = [59_000, 59_001, 59_002], [2_000, 2_001, 2_002]
    assert max(find(automaton, newest).length for automaton in pair) == 3
    assert max(find(automaton, oldest).length for automaton in pair) == 0


def test_cursor_follows_a_growing_text_and_notices_new_texts():
    store, cursor = RecentTexts(max_tokens=1000, max_tokens_per_salt=1000), Cursor()
    store.add("", [1, 2, 3, 4, 5])
    store.enter(100)
    text = [8, 1, 2]
    assert cursor.find(store.generations("")[0], text).length == 2
    text += [3, 4]
    assert cursor.find(store.generations("")[0], text).length == 4
    store.add("", [8, 1, 2, 3, 4, 7])
    store.enter(100)
    assert cursor.find(store.generations("")[0], text).length == 5
    text += [100]
    assert cursor.find(store.generations("")[0], text) == NO_MATCH


# -- the proposer ----------------------------------------------------------------------------------


def context(tokens, *, request_id="r", num_prompt_tokens=0, max_drafts=8, salt=""):
    sampling = SamplingRow(
        request_id=request_id,
        params=SamplingParams(),
        seed=0,
        position=len(tokens),
        prompt_token_ids=tokens[:num_prompt_tokens],
        output_token_ids=tokens[num_prompt_tokens:],
    )
    return DraftContext(
        request_id=request_id,
        token_ids=tokens,
        num_prompt_tokens=num_prompt_tokens,
        max_drafts=max_drafts,
        sampling=sampling,
        salt=salt,
    )


def drafts(proposer, tokens, **options):
    return proposer.propose([context(tokens, **options)])[0]


def test_drafts_are_what_followed_the_longest_match():
    text = [5, 6, 7, 8, 9, 10, 11, 12, 99, 6, 7, 1, 2, 3, 5, 6, 7, 8]
    assert drafts(SuffixProposer(), text, max_drafts=3) == [9, 10, 11]


def test_frequent_continuation_is_preferred_to_a_newer_one():
    text = [1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 4, 0, 1, 2]
    assert drafts(SuffixProposer(), [*text[:-4], 9, 1, 2], max_drafts=1) == [3]


def test_drafts_go_round_in_a_text_that_does():
    assert drafts(SuffixProposer(), [1, 2, 3, 1, 2, 3, 1, 2], max_drafts=7) == [3, 1, 2, 3, 1, 2, 3]


def test_longer_matches_give_more_drafts():
    text = list(range(100, 160))
    short = drafts(SuffixProposer(min_probability=0.24), [*text, 7, 100, 101], max_drafts=32)
    long = drafts(SuffixProposer(min_probability=0.24), [*text, 7, *range(100, 108)], max_drafts=32)
    assert short == list(range(102, 108))  # 2 tokens matched, and 2 * (1 / 0.24 - 1) = 6.3 drafts
    assert long == list(range(108, 133))


def test_nothing_is_drafted_where_nothing_repeats():
    assert drafts(SuffixProposer(), list(range(50))) == []
    assert drafts(SuffixProposer(), [1]) == []


def test_text_read_token_by_token_gives_the_drafts_of_one_read_at_once():
    draw = random.Random(4)
    grown, text = SuffixProposer(), []
    for _ in range(300):
        text.append(draw.randrange(4))
        mine = drafts(grown, text, max_drafts=4)
        assert mine == drafts(SuffixProposer(), list(text), max_drafts=4)


def test_output_of_an_ended_request_helps_those_of_the_same_salt_alone():
    proposer, answer = SuffixProposer(), list(range(200, 230))
    drafts(proposer, [1, 2, 3, *answer], num_prompt_tokens=3, salt="a")
    proposer.forget("r")
    for salt, expected in (("a", [203, 204]), ("b", []), ("", [])):
        tokens = [9, 200, 201, 202]
        assert drafts(proposer, tokens, request_id=f"of {salt}", max_drafts=2, salt=salt) == expected
    assert drafts(proposer, [1, 2], request_id="prompts are not kept", salt="a") == []


def test_request_that_lost_its_pages_is_stored_once():
    proposer, tokens = SuffixProposer(), [1, *range(200, 210)]
    drafts(proposer, tokens, num_prompt_tokens=1)
    proposer.forget("r")
    tokens += [210, 211]
    drafts(proposer, tokens, num_prompt_tokens=1)
    proposer.forget("r")
    proposer.forget("unknown")
    drafts(proposer, [0], request_id="other")
    (automaton,) = proposer._store.generations("")
    assert automaton.num_tokens == 12
    assert automaton.count(find(automaton, [205]).state) == 1


def test_long_prompt_is_read_over_several_calls_and_others_do_not_wait():
    proposer = SuffixProposer(max_new_tokens=100)
    long, short = [*range(5, 500), 5, 6, 7], [1, 2, 3, 1, 2]
    contexts = [context(long, request_id="long"), context(short, request_id="short")]
    rounds = [proposer.propose(contexts) for _ in range(6)]
    assert [long for long, _ in rounds[:4]] == [[]] * 4
    assert rounds[5][0][:2] == [8, 9]
    assert all(short[:1] == [3] for _, short in rounds)


def test_memory_of_a_request_is_bounded():
    proposer, draw = SuffixProposer(max_request_tokens=1000, max_store_tokens=0), random.Random(0)
    text, largest = [], 0
    for _ in range(300):
        text += [draw.randrange(1000) for _ in range(20)]
        drafts(proposer, text)
        largest = max(largest, proposer._texts["r"].automaton.num_tokens)
    assert 900 < largest <= 1020
    proposer.forget("r")
    assert proposer.num_bytes == 0


@pytest.mark.parametrize(
    ("name", "value"), [("min_match", 0), ("min_probability", 0.0), ("min_probability", 1.5), ("max_new_tokens", 0)]
)
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        SuffixProposer(**{name: value})
