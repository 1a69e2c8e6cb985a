"""What admission expects of requests, and that it is only an expectation."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aios_model.errors import ConfigError
from aios_sched.output_estimate import OutputEstimator, peak_tokens


def finished(lab, length, tenant="default"):
    request = lab.make_request("r", [1], tenant=tenant, max_tokens=10_000)
    request.max_tokens = 10_000
    request.output_token_ids = [1] * length
    return request


def fresh(lab, tenant="default", max_tokens=10_000, done=0):
    request = finished(lab, done, tenant)
    request.max_tokens = max_tokens
    return request


@pytest.mark.parametrize("quantile", [0.5, 0.8])
def test_estimate_settles_at_the_quantile(lab, quantile):
    rng = random.Random(1)
    estimator = OutputEstimator(quantile=quantile, rate=0.05)
    lengths = [max(1, int(rng.expovariate(1 / 200))) for _ in range(3000)]
    seen = []
    for length in lengths:
        estimator.observe(finished(lab, length))
        seen.append(estimator.remaining(fresh(lab)))
    exact = sorted(lengths)[int(quantile * len(lengths))]
    assert sum(seen[500:]) / len(seen[500:]) == pytest.approx(exact, rel=0.15)


def test_tenants_are_told_apart_and_a_new_one_is_like_all(lab):
    estimator = OutputEstimator()
    assert estimator.remaining(fresh(lab)) == 0
    for _ in range(200):
        estimator.observe(finished(lab, 10, "short"))
        estimator.observe(finished(lab, 1000, "long"))
    assert estimator.remaining(fresh(lab, "short")) == pytest.approx(10, abs=2)
    assert estimator.remaining(fresh(lab, "long")) == pytest.approx(1000, rel=0.15)
    assert 10 <= estimator.remaining(fresh(lab, "new")) <= 1100


def test_old_habits_are_forgotten(lab):
    estimator = OutputEstimator()
    for length in [10] * 100 + [1000] * 100:
        estimator.observe(finished(lab, length))
    assert estimator.remaining(fresh(lab)) == pytest.approx(1000, rel=0.15)


def test_what_remains_is_never_more_than_allowed_nor_nothing(lab):
    estimator = OutputEstimator()
    estimator.observe(finished(lab, 100))
    assert estimator.remaining(fresh(lab, max_tokens=30)) == 30
    assert estimator.remaining(fresh(lab, done=60)) == 40
    assert estimator.remaining(fresh(lab, done=500)) == 25  # it has outlived the estimate
    assert estimator.remaining(fresh(lab, done=499, max_tokens=500)) == 1


def test_tenants_without_end_are_not_all_remembered(lab):
    estimator = OutputEstimator()
    for number in range(3000):
        estimator.observe(finished(lab, 5, f"t{number}"))
    assert len(estimator._by_tenant) <= 1024


@given(lengths=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=8))
def test_peak_is_that_of_growing_step_by_step(lengths):
    held = [sum(now + step for now, rest in lengths if rest >= step) for step in range(52)]
    assert max(tokens for _, tokens in peak_tokens(lengths)) == max(held)


# -- in the scheduler --------------------------------------------------------------------------------------------------


def serve(lab, expected_output, *, num_blocks=24, seed=3):
    """Requests that may generate 40 tokens and generate about 10; returns (preemptions, mean number running)."""
    rng = random.Random(seed)
    scheduler = lab.make_scheduler(num_blocks=num_blocks, max_num_seqs=16, expected_output=expected_output)
    runner = lab.PageStoreRunner(4)
    stops = {f"r{number}": rng.randint(5, 15) for number in range(120)}
    for name in stops:
        scheduler.add(lab.make_request(name, [rng.randrange(1, 50) for _ in range(8)], max_tokens=40))
    num_running = []
    while (step := scheduler.schedule()) is not None:
        num_running.append(scheduler.num_running)
        outputs = scheduler.update(step, runner.execute(step))
        for output in outputs:
            stops[output.request_id] -= 1
            if not stops[output.request_id]:
                request = scheduler._requests[output.request_id]
                scheduler._planner.learn(request)
                scheduler.abort([output.request_id], finish_reason="stop")
        scheduler.block_manager.check_invariants()
    assert not scheduler.has_unfinished
    return scheduler.num_preemptions, sum(num_running) / len(num_running)


def test_estimate_runs_more_than_reservation_and_preempts_less_than_hope(lab):
    hope, estimate, reservation = (serve(lab, name) for name in ("none", "estimated", "maximal"))
    assert reservation[0] == 0
    assert estimate[1] > 1.5 * reservation[1]
    assert estimate[0] < 0.5 * hope[0]


@pytest.mark.parametrize("expected_output", ["none", "estimated", "maximal"])
def test_the_smallest_pool_finishes_everything_whatever_is_expected(lab, expected_output):
    serve(lab, expected_output, num_blocks=12)


def test_expectation_of_an_unknown_kind_is_refused(lab):
    with pytest.raises(ConfigError, match="expected_output='all'"):
        lab.make_scheduler(expected_output="all")
