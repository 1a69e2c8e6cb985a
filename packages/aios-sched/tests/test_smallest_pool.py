"""The smallest pool that is legal finishes whatever it admits; one page fewer is refused at the start."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios_kvcache.block_manager import BlockManager
from aios_kvcache.errors import PoolTooSmallError
from aios_kvcache.sizing import plan_pool
from aios_kvcache.tier_costs import PREEMPTION_MODES, TierCosts, TransferSeconds
from aios_kvcache.tiers import PageTiers
from aios_model.config import LayerSpec, ModelConfig
from aios_sched.config import SchedulerConfig
from aios_sched.scheduler import Scheduler

POLICIES = ("fcfs", "priority", "fair", "prefix")
MODEL = ModelConfig(
    architecture="llama",
    vocab_size=50,
    hidden_size=8,
    intermediate_size=8,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    rms_norm_eps=1e-6,
    max_position_embeddings=64,
    layers=(LayerSpec(num_key_value_heads=1, head_dim=8, window=None, scale=1.0),),
)


def plan(num_blocks, *, block_size, max_model_len):
    return plan_pool(
        MODEL,
        dtype_bytes=2,
        block_size=block_size,
        max_num_seqs=4,
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        available_bytes=1 << 30,
    )


class Load:
    """Requests that together need many times the pool, each of them legal, the longest as long as a context."""

    def __init__(self, lab, seed, *, policy, tiers):
        self.lab, self.random = lab, random.Random(seed)
        self.block_size = self.random.choice([1, 2, 3, 4, 8])
        self.max_model_len = self.random.randint(2, 40)
        self.num_blocks = -(-self.max_model_len // self.block_size)
        plan(self.num_blocks, block_size=self.block_size, max_model_len=self.max_model_len)
        self.block_manager = BlockManager(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            enable_prefix_caching=self.random.random() < 0.7,
            tiers=self._tiers() if tiers else None,
        )
        waiting = lab.make_policy(policy, block_manager=self.block_manager)
        self.scheduler = Scheduler(self._limits(), self.block_manager, waiting)
        losses = self.random if self.random.random() < 0.5 else None
        self.runner = lab.PageStoreRunner(self.block_size, losses=losses)
        priorities = [-3, 0, 5] if policy == "priority" else [0]
        self.requests = [self._request(number, priorities) for number in range(self.random.randint(2, 12))]

    def run(self):
        """Adds them, some in the middle, and takes steps until all are done, or too many have been taken."""
        waiting, steps = list(self.requests), 0
        limit = 50 + 8 * sum(len(request.prompt_token_ids) + self.max_model_len for request in self.requests)
        while waiting or self.scheduler.has_unfinished:
            while waiting and (not self.scheduler.has_unfinished or self.random.random() < 0.5):
                self.scheduler.add(waiting.pop())
            step = self.scheduler.schedule()
            assert step is not None, "requests are open, but none can run"
            self.scheduler.update(step, self.runner.execute(step))
            self.block_manager.check_invariants()
            steps += 1
            assert steps < limit, "it runs in circles"
        return self

    def _limits(self):
        seats, chunked = self.random.choice([1, 2, 3, 5, 8]), self.random.random() < 0.7
        low = seats if chunked else max(seats, self.max_model_len)
        return SchedulerConfig(
            max_num_seqs=seats,
            max_num_batched_tokens=low + self.random.choice([0, 1, 7, 30]),
            max_model_len=self.max_model_len,
            enable_chunked_prefill=chunked,
            watermark=self.random.choice([0, 0.01, 0.5]),
            expected_output=self.random.choice(["estimated", "none"]),
        )

    def _tiers(self):
        transfers = TransferSeconds(page_out=1.0, page_in=1.0, disk_read=1.0)
        costs = TierCosts(transfers, mode=self.random.choice(PREEMPTION_MODES), block_size=self.block_size)
        num_host_pages, num_disk_pages = self.random.choice([1, 2, self.num_blocks]), self.random.choice([0, 3, 50])
        return PageTiers(num_host_pages=num_host_pages, num_disk_pages=num_disk_pages, costs=costs)

    def _request(self, number, priorities):
        prompt = [self.random.randrange(1, 4) for _ in range(self.random.randint(1, self.max_model_len - 1))]
        room = self.max_model_len - len(prompt)
        return self.lab.make_request(
            f"r{number}",
            prompt,
            max_tokens=self.random.choice([None, room, self.random.randint(1, room)]),
            ignore_eos=self.random.random() < 0.8,
            priority=self.random.choice(priorities),
            tenant=self.random.choice("abc"),
            seed=number,
        )


@pytest.mark.parametrize("tiers", [False, True], ids=["no tiers", "tiers"])
@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32))
def test_the_smallest_legal_pool_finishes_every_admitted_request(lab, policy, tiers, seed):
    load = Load(lab, seed, policy=policy, tiers=tiers).run()
    for request in load.requests:
        tokens, reason, _ = lab.generate_alone(request, max_model_len=load.max_model_len)
        assert (request.output_token_ids, request.finish_reason) == (tokens, reason)
    assert load.block_manager.num_free_blocks == load.num_blocks


def test_the_loads_are_heavy_enough_to_prove_something(lab):
    """Otherwise the test above could be green because nobody ever lacks a page."""
    loads = [
        Load(lab, seed, policy=policy, tiers=tiers).run()
        for seed in range(30)
        for policy in POLICIES
        for tiers in (False, True)
    ]
    assert sum(load.scheduler.num_preemptions for load in loads) > 50
    assert sum(load.block_manager.stats.evictions for load in loads) > 100
    assert sum(len(request.token_ids) == load.max_model_len for load in loads for request in load.requests) > 200
    stats = [load.block_manager.tiers.stats for load in loads if load.block_manager.tiers]
    assert sum(each.num_fetched for each in stats) > 50


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(block_size=st.integers(1, 32), max_model_len=st.integers(2, 64))
def test_one_page_fewer_is_refused_with_the_arithmetic(block_size, max_model_len):
    smallest = -(-max_model_len // block_size)
    legal = plan(smallest, block_size=block_size, max_model_len=max_model_len)
    assert (legal.num_blocks, legal.max_model_len) == (smallest, max_model_len)
    if smallest > 1:
        fitting = (smallest - 1) * block_size
        with pytest.raises(PoolTooSmallError) as refusal:
            plan(smallest - 1, block_size=block_size, max_model_len=max_model_len)
        assert f"one sequence of {max_model_len} tokens" in str(refusal.value)
        assert f"{smallest - 1} pages of {block_size} tokens" in str(refusal.value)
        assert f"largest context that fits is {fitting} tokens" in str(refusal.value)
