"""How often an engine is restarted, and how long a silence may last."""

from __future__ import annotations

from aios_serve.pulse import Pulse
from aios_serve.restart_budget import RestartBudget


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_waits_double_up_to_the_longest():
    budget = RestartBudget(8, clock=Clock())
    assert [budget.take() for _ in range(9)] == [1, 2, 4, 8, 16, 30, 30, 30, None]
    assert "8 times within 10 minutes" in budget.spent()


def test_restarts_of_long_ago_are_forgiven():
    clock = Clock()
    budget = RestartBudget(2, clock=clock)
    assert budget.take() == 1
    clock.now += 590
    assert budget.take() == 2
    assert budget.take() is None
    clock.now += 11  # the first one is out of the window
    assert budget.take() == 2
    assert budget.take() is None
    clock.now += 1000
    assert budget.take() == 1


def test_no_restarts_at_all():
    budget = RestartBudget(0)
    assert budget.take() is None
    assert "turned off" in budget.spent()


def test_a_silence_is_stuck_after_the_timeout_or_four_times_the_longest_one():
    clock = Clock()
    pulse = Pulse(10.0, clock=clock)
    clock.now += 10
    assert pulse.is_fresh()
    clock.now += 0.5
    assert not pulse.is_fresh()
    assert pulse.silence == 10.5
    pulse.beat()  # teaches nothing
    assert pulse.deadline == 10
    clock.now += 5
    pulse.beat()
    assert pulse.deadline == 20
    clock.now += 20
    assert pulse.is_fresh()
    pulse.beat()
    clock.now += 80
    assert pulse.is_fresh()
    pulse.beat()
    assert pulse.deadline == 100  # and no more than ten times the timeout
    clock.now += 101
    assert not pulse.is_fresh()
    pulse.forgive()
    assert pulse.is_fresh()
