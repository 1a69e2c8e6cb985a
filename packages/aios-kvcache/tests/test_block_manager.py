"""The block manager, one behaviour at a time. Random sequences of calls are in test_block_manager_properties.py."""

from __future__ import annotations

import pytest

from aios_kvcache import BlockCopy, BlockManager, DuplicateSequenceError, SequenceError, UnknownSequenceError
from aios_model.errors import AiosError, ConfigError

PROMPT = list(range(100, 111))  # two full pages of 4 and three tokens


def manager(num_blocks: int = 8, **options) -> BlockManager:
    return BlockManager(num_blocks=num_blocks, block_size=4, **options)


def run(blocks: BlockManager, name: str, tokens: list[int], *, salt: str = "") -> int:
    """Opens a sequence, computes and publishes all of its tokens; returns how many were cached."""
    cached = blocks.open(name, tokens, salt=salt)
    assert blocks.reserve(name, start=cached, end=len(tokens)) == []
    blocks.publish(name, tokens, len(tokens))
    blocks.check_invariants()
    return cached


def test_pages_are_counted_from_one_and_the_null_page_is_never_handed_out():
    blocks = manager(3)
    blocks.open("a", [1])
    assert blocks.reserve("a", start=0, end=12) == []
    assert blocks.block_table("a") == [1, 2, 3]
    assert (blocks.num_free_blocks, blocks.usage) == (0, 1.0)


def test_a_sequence_finds_the_prefix_of_a_running_one_and_leaves_one_token_to_compute():
    blocks = manager()
    assert run(blocks, "a", PROMPT) == 0
    assert run(blocks, "b", PROMPT) == 8
    assert blocks.block_table("a")[:2] == blocks.block_table("b")[:2]
    assert blocks.open("c", PROMPT[:8]) == 4  # all eight are cached, but the logits of the last are wanted
    assert blocks.open("d", [*PROMPT[:4], 0, 0, 0, 0, 0]) == 4


def test_a_freed_sequence_stays_findable_until_its_room_is_needed():
    blocks = manager(4)
    run(blocks, "a", PROMPT)
    blocks.free("a")
    assert (blocks.num_free_blocks, blocks.num_cached_blocks) == (4, 2)
    assert run(blocks, "b", PROMPT) == 8
    blocks.free("b")
    blocks.open("c", [0])
    assert blocks.reserve("c", start=0, end=16) == []
    assert (blocks.num_cached_blocks, blocks.stats.evictions) == (0, 2)


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    blocks = manager(4)
    run(blocks, "a", PROMPT)
    blocks.free("a")
    blocks.open("b", [0])
    assert blocks.reserve("b", start=0, end=12) == []
    assert blocks.open("c", PROMPT) == 4
    blocks.check_invariants()


def test_the_least_recently_used_prefix_is_evicted_first():
    blocks = manager(6)
    first, second = [1] * 9, [2] * 9
    for name, tokens in {"a": first, "b": second}.items():
        run(blocks, name, tokens)
        blocks.free(name)
    run(blocks, "c", first)  # used again: now the second one is older
    blocks.free("c")
    blocks.open("d", [0])
    assert blocks.reserve("d", start=0, end=16) == []
    assert blocks.open("e", first) == 8
    assert blocks.open("f", second) == 0


def test_a_page_is_published_only_when_it_is_full_and_computed():
    blocks = manager()
    blocks.open("a", PROMPT)
    blocks.reserve("a", start=0, end=11)
    assert blocks.open("b", PROMPT) == 0
    blocks.publish("a", PROMPT, 7)
    assert blocks.open("c", PROMPT) == 4
    blocks.publish("a", PROMPT, 11)
    assert blocks.open("d", PROMPT) == 8
    assert blocks.num_cached_blocks == 2


def test_two_sequences_that_compute_the_same_prefix_in_one_step_end_up_sharing_it():
    blocks = manager()
    for name in "ab":
        assert blocks.open(name, PROMPT) == 0
        assert blocks.reserve(name, start=0, end=11) == []
    assert blocks.num_free_blocks == 2
    for name in "ab":
        blocks.publish(name, PROMPT, 11)
        blocks.check_invariants()
    assert blocks.num_free_blocks == 4
    assert blocks.block_table("a")[:2] == blocks.block_table("b")[:2]
    assert blocks.block_table("a")[2] != blocks.block_table("b")[2]


def test_salts_do_not_share_and_do_not_notice_each_other():
    blocks = manager()
    assert run(blocks, "a", PROMPT, salt="tenant 1") == 0
    assert run(blocks, "b", PROMPT, salt="tenant 2") == 0
    assert run(blocks, "c", PROMPT, salt="tenant 1") == 8


def test_every_lookup_is_right_under_a_constant_hash_function():
    blocks = manager(hash_function=lambda _: 7)
    run(blocks, "a", PROMPT)
    assert blocks.num_cached_blocks == 1  # the second page collides with the first, and stays private
    assert blocks.open("other tokens", [0] * 9) == 0
    assert blocks.open("other salt", PROMPT, salt="s") == 0
    assert blocks.open("same", PROMPT) == 4
    # Same tokens one page later: only the parent differs.
    assert blocks.open("other place", [*PROMPT[:4], *PROMPT[:4], 0]) == 4


def test_a_page_behind_an_evicted_and_recomputed_parent_is_not_found_by_its_hash_alone():
    parents = {(1, 1, 1, 1): 5, (2, 2, 2, 2): 5}  # two prefixes with one hash
    blocks = manager(num_blocks=3, hash_function=lambda key: parents.get(key[1]) or hash(key))
    run(blocks, "a", [1] * 4 + [3] * 4)
    blocks.truncate("a", 8)
    # Give up the parent while its child stays published, which needs a copy of the parent's page.
    assert blocks.reserve("a", start=0, end=4) is not None
    blocks.open("b", [0])
    assert blocks.reserve("b", start=0, end=4) == []
    blocks.free("b")
    assert run(blocks, "c", [2] * 4) == 0
    blocks.free("c")
    assert blocks.open("d", [2] * 4 + [3] * 4 + [0]) == 4  # the child of [1]*4 has the right hash, but another parent


def test_reserve_is_all_or_nothing():
    blocks = manager(4)
    run(blocks, "a", PROMPT)
    blocks.open("b", [0])
    table, free = blocks.block_table("a"), blocks.num_free_blocks
    assert blocks.reserve("b", start=0, end=5) is None
    assert blocks.reserve("a", start=11, end=17 + 4) is None
    assert (blocks.block_table("a"), blocks.block_table("b"), blocks.num_free_blocks) == (table, [], free)
    assert blocks.reserve("b", start=0, end=4) == []


def test_a_failed_admission_leaves_no_trace():
    blocks = manager(4)
    run(blocks, "a", PROMPT)
    blocks.free("a")
    run(blocks, "b", [7] * 5)
    blocks.free("b")
    order = [block.block_id for block in blocks._pool.free_queue]
    assert blocks.open("c", [*PROMPT, *range(20)]) == 8
    assert blocks.reserve("c", start=8, end=31) is None
    blocks.free("c")
    assert [block.block_id for block in blocks._pool.free_queue] == order
    assert (blocks.stats.queries, blocks.stats.hits) == (16, 0)


def test_a_freed_neighbour_between_opening_and_giving_up_does_no_harm():
    blocks = manager(4)
    run(blocks, "a", PROMPT)
    blocks.open("b", PROMPT)
    blocks.free("a")  # its pages are now held by b alone, so b must put them back itself
    blocks.free("b")
    blocks.check_invariants()
    assert blocks.num_free_blocks == 4


def test_statistics_count_tokens_of_admitted_sequences_once():
    blocks = manager()
    run(blocks, "a", PROMPT)
    run(blocks, "b", PROMPT)
    assert blocks.reserve("b", start=11, end=12) == []
    assert (blocks.stats.queries, blocks.stats.hits) == (22, 8)


def test_a_fork_copies_the_last_page_before_it_writes():
    blocks = manager()
    run(blocks, "a", PROMPT)
    blocks.fork("a", "b")
    assert blocks.block_table("a") == blocks.block_table("b") == [1, 2, 3]
    assert blocks.reserve("b", start=11, end=12) == [BlockCopy(3, 4)]
    assert blocks.block_table("b") == [1, 2, 4]
    assert blocks.reserve("a", start=11, end=12) == []  # alone again
    blocks.check_invariants()


def test_a_fork_at_a_page_border_copies_nothing():
    blocks = manager()
    run(blocks, "a", PROMPT[:8])
    blocks.fork("a", "b")
    assert blocks.reserve("b", start=8, end=9) == []
    assert blocks.reserve("a", start=8, end=9) == []
    assert blocks.block_table("a")[:2] == blocks.block_table("b")[:2]


def test_forks_that_generate_the_same_page_share_it():
    blocks = manager()
    run(blocks, "a", PROMPT)
    blocks.fork("a", "b")
    tokens = [*PROMPT, 1]
    for name in "ab":
        assert blocks.reserve(name, start=11, end=12) is not None
    for name in "ab":
        blocks.publish(name, tokens, 12)
    assert blocks.block_table("a") == blocks.block_table("b")
    assert blocks.num_free_blocks == 5
    blocks.check_invariants()


def test_a_published_page_is_never_overwritten_even_by_the_sequence_that_filled_it():
    blocks = manager()
    run(blocks, "a", PROMPT)
    blocks.truncate("a", 6)
    copies = blocks.reserve("a", start=6, end=9)
    assert copies is not None
    assert [copy.source for copy in copies] == [2]
    blocks.publish("a", [*PROMPT[:6], 0, 0, 0], 9)
    blocks.check_invariants()
    assert blocks.open("old", PROMPT) == 8
    assert blocks.open("new", [*PROMPT[:6], 0, 0, 0]) == 8


def test_truncating_gives_pages_back_and_keeps_the_rest():
    blocks = manager()
    run(blocks, "a", PROMPT)
    blocks.truncate("a", 8)
    assert (len(blocks.block_table("a")), blocks.num_free_blocks) == (2, 6)
    blocks.truncate("a", 0)
    assert (len(blocks.block_table("a")), blocks.num_free_blocks) == (0, 8)
    blocks.check_invariants()


def test_the_prefix_cache_is_reset_only_while_nothing_is_in_use():
    blocks = manager()
    run(blocks, "a", PROMPT)
    assert not blocks.reset_prefix_cache()
    blocks.free("a")
    assert blocks.reset_prefix_cache()
    blocks.check_invariants()
    assert (blocks.num_cached_blocks, blocks.open("b", PROMPT)) == (0, 0)


def test_without_prefix_caching_nothing_is_published():
    blocks = manager(enable_prefix_caching=False)
    run(blocks, "a", PROMPT)
    assert run(blocks, "b", PROMPT) == 0
    assert blocks.num_cached_blocks == 0


def test_a_pool_of_exactly_the_needed_size_serves_a_cached_prompt_again():
    blocks = manager(2)
    run(blocks, "a", PROMPT[:8])
    blocks.free("a")
    assert run(blocks, "b", PROMPT[:8]) == 4


def test_whether_a_sequence_can_ever_fit_does_not_depend_on_what_is_running():
    blocks = manager(2)
    run(blocks, "a", PROMPT[:8])
    assert blocks.can_fit(8)
    assert not blocks.can_fit(9)


def test_a_block_table_that_was_handed_out_does_not_change():
    blocks = manager()
    run(blocks, "a", PROMPT)
    table = blocks.block_table("a")
    blocks.truncate("a", 0)
    assert table == [1, 2, 3]


def test_misuse_is_an_exception_that_names_the_sequence():
    blocks = manager()
    run(blocks, "a", PROMPT)
    with pytest.raises(DuplicateSequenceError, match="'a'"):
        blocks.open("a", PROMPT)
    with pytest.raises(DuplicateSequenceError, match="'a'"):
        blocks.fork("a", "a")
    with pytest.raises(SequenceError, match="no range"):
        blocks.reserve("a", start=3, end=2)
    with pytest.raises(SequenceError, match="cannot be truncated to 13"):
        blocks.truncate("a", 13)
    with pytest.raises(SequenceError, match="cannot be truncated to -4"):
        blocks.truncate("a", -4)
    with pytest.raises(SequenceError, match="12 tokens cannot be computed"):
        blocks.publish("a", PROMPT, 12)
    blocks.truncate("a", 6)
    with pytest.raises(SequenceError, match="reserve"):
        blocks.publish("a", [0] * 11, 8)
    blocks.free("a")
    calls = [
        lambda: blocks.free("a"),
        lambda: blocks.block_table("a"),
        lambda: blocks.reserve("a", start=0, end=1),
        lambda: blocks.publish("a", [], 0),
        lambda: blocks.truncate("a", 0),
        lambda: blocks.fork("a", "b"),
    ]
    for call in calls:
        with pytest.raises(UnknownSequenceError, match="'a'"):
            call()
    blocks.check_invariants()
    with pytest.raises(ConfigError, match="positive"):
        manager(0)
    assert issubclass(SequenceError, AiosError)
    assert issubclass(SequenceError, ValueError)
