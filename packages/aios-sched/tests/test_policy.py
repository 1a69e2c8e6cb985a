from __future__ import annotations

import pytest

from aios_sched.policy.fcfs import FCFSQueue
from aios_sched.request import RequestStatus


def order(queue):
    found = []
    while (request := queue.peek()) is not None:
        found.append(request.request_id)
        queue.remove(request)
    return found


@pytest.fixture
def queue_of_three(lab):
    queue, requests = FCFSQueue(), [lab.make_request(name, [1]) for name in "abc"]
    for request in requests:
        queue.push(request)
    return queue, requests


def test_first_come_first_served(queue_of_three):
    queue, _ = queue_of_three
    assert len(queue) == 3
    assert order(queue) == ["a", "b", "c"]
    assert len(queue) == 0


def test_preempted_request_goes_first(queue_of_three, lab):
    queue, _ = queue_of_three
    request = lab.make_request("preempted", [1])
    request.status = RequestStatus.PREEMPTED
    queue.push(request)
    assert order(queue) == ["preempted", "a", "b", "c"]


def test_request_can_leave_from_the_middle(queue_of_three):
    queue, requests = queue_of_three
    queue.remove(requests[1])
    assert order(queue) == ["a", "c"]
