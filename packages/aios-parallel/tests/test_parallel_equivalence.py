"""The tokens of one device, however the model is cut: in float64, where no rounding decides.

Every run preempts, and finds prefixes in the cache; the test would say so if it did not.
"""

from __future__ import annotations

from functools import cache

import pytest

from aios_parallel.mesh import Mesh
from aios_sched.drafting import Drafting
from aios_sched.speculative.fixed import FixedController


@pytest.fixture(scope="module")
def expected():
    return cache(lambda family, tiny: tiny("tokens_of")(single_engine(family, tiny), tiny("requests")()))


def single_engine(family, tiny):
    return tiny("build_engine")(tiny("single_runner")(tiny("config_of")(family)))


MESHES = [(2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2), (3, 3), (6, 2)]


def check(tiny, expected, family, mesh, **options) -> None:
    runner = tiny("ThreadedRunner")(tiny("config_of")(family), mesh, **options)
    engine = tiny("build_engine")(runner)
    assert tiny("tokens_of")(engine, tiny("requests")()) == expected(family, tiny)
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.prefix_cache_hits > 0
    assert stats.kv_cache_usage == 0


@pytest.mark.parametrize("family", ["llama", "llama-biases", "qwen2", "qwen3", "qwen3-moe"])
@pytest.mark.parametrize(("tensor", "pipeline"), MESHES, ids=str)
def test_tokens_are_those_of_one_device(tiny, expected, family, tensor, pipeline) -> None:
    check(tiny, expected, family, Mesh(tensor=tensor, pipeline=pipeline))


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (3, 2), (5, 1)], ids=str)
def test_dealt_out_experts_give_the_tokens_of_one_device(tiny, expected, tensor, pipeline) -> None:
    check(tiny, expected, "qwen3-moe", Mesh(tensor=tensor, pipeline=pipeline), expert_parallel=True)


@pytest.mark.parametrize(("tensor", "pipeline"), [(3, 1), (1, 2), (2, 3)], ids=str)
def test_cut_embedding_gives_the_tokens_of_one_device(tiny, expected, tensor, pipeline) -> None:
    check(tiny, expected, "llama-biases", Mesh(tensor=tensor, pipeline=pipeline), shard_embedding=True)


@pytest.mark.parametrize("lossy", [False, True], ids=["sound", "lossy"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (3, 1), (1, 2), (2, 2)], ids=str)
def test_pages_that_ranks_swap_give_the_tokens_of_one_device(tiny, expected, tensor, pipeline, lossy, tmp_path) -> None:
    """Each rank keeps its part of a page; one of them may lose it, and then all compute it again."""
    tiers = tiny("tier_plan")(tmp_path)
    runner = tiny("ThreadedRunner")(tiny("config_of")("llama"), Mesh(tensor=tensor, pipeline=pipeline), tiers=tiers)
    if lossy:
        disk = runner.movers[-1]._disk
        read = disk.read
        disk.read = lambda slot, into: slot % 2 == 0 and read(slot, into)
    engine = tiny("build_engine")(runner, tiers=tiers)
    for _ in range(2):  # the second time prefixes are found in the tiers
        assert tiny("tokens_of")(engine, tiny("requests")()) == expected("llama", tiny)
    stats = engine.stats()
    assert min(stats.num_swap_preemptions, stats.tier_cache_hits, stats.num_pages_fetched) > 0
    assert (stats.num_pages_lost > 0) == lossy
    assert stats.num_failed_steps == 0
    engine._executor.shutdown()


class ErringOracle:
    """Drafts what will come, but for every fifth token."""

    def __init__(self, expected: dict[str, list[int]]) -> None:
        self.expected, self.count = expected, 0

    def propose(self, contexts):
        return [self.guess(context) for context in contexts]

    def guess(self, context):
        num_known = len(context.token_ids) - context.num_prompt_tokens
        drafts = self.expected[context.request_id][num_known : num_known + context.max_drafts]
        self.count += len(drafts)
        return [token if (self.count + place) % 5 else token + 1 for place, token in enumerate(drafts)]

    def forget(self, request_id):
        pass

    def close(self):
        pass


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (3, 1), (1, 2), (2, 2)], ids=str)
def test_ranks_check_drafts_and_give_the_tokens_of_one_device(tiny, expected, tensor, pipeline) -> None:
    wanted = expected("llama", tiny)
    runner = tiny("ThreadedRunner")(tiny("config_of")("llama"), Mesh(tensor=tensor, pipeline=pipeline))
    drafting = Drafting(ErringOracle(wanted), FixedController(3), vocab_size=runner.vocab_size)
    engine = tiny("build_engine")(runner, drafting=drafting)
    assert tiny("tokens_of")(engine, tiny("requests")()) == wanted
    stats = engine.stats()
    assert min(stats.num_accepted_tokens, stats.num_draft_tokens - stats.num_accepted_tokens) > 5
    assert stats.num_preemptions > 0


def test_ranks_exchange_what_the_plan_says(tiny) -> None:
    config = tiny("config_of")("llama")
    runner = tiny("ThreadedRunner")(config, Mesh(tensor=2))
    engine = tiny("build_engine")(runner)
    engine.add(tiny("requests")()[0])
    engine.step()
    # Two sums of the chunk's 14 hidden states for each layer; half the scores of the one token that was drawn.
    sums, scores = 2 * 3 * 14 * config.hidden_size * 8, 160 * 8
    assert [group.traffic.calls for group in runner.groups] == [7, 7]
    assert [group.traffic.num_bytes for group in runner.groups] == [sums + scores] * 2
