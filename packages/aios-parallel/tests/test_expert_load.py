"""Whose experts have how much to do."""

from __future__ import annotations

import pytest

from aios_parallel.expert_load import ExpertLoad


def test_load_falls_on_ranks_and_the_busiest_sets_the_pace() -> None:
    load = ExpertLoad({0: (4, 0, 0, 0), 2: (0, 0, 2, 2)})
    assert load.by_rank(2) == [4, 4]
    assert load.imbalance(2) == pytest.approx(2.0)  # even in sum, yet one rank idles in each layer
    assert load.by_rank(1) == [8]
    assert load.imbalance(1) == 1.0
    assert ExpertLoad({}).imbalance(4) == 1.0


def test_stages_know_their_own_layers() -> None:
    first, second = ExpertLoad({0: (1, 2)}), ExpertLoad({1: (3, 4)})
    assert ExpertLoad.merged([first, first, second]).tokens == {0: (1, 2), 1: (3, 4)}


def test_a_decoder_counts_what_it_routes(tiny) -> None:
    from aios_parallel.expert_load import ExpertCounter

    config = tiny("config_of")("qwen3-moe")
    runner = tiny("single_runner")(config)
    counter = ExpertCounter(runner._decoder)
    engine = tiny("build_engine")(runner)
    request = tiny("requests")()[0]
    engine.add(request)
    engine.step()
    tokens = counter.load().tokens
    assert set(tokens) == {0, 2}  # layer 1 is dense
    assert {sum(each) for each in tokens.values()} == {2 * len(request.prompt_token_ids)}
