"""A group of one."""

from __future__ import annotations

import pytest
import torch

from aios_parallel.communicator import SoloCommunicator, Traffic


def test_a_group_of_one_exchanges_nothing() -> None:
    alone = SoloCommunicator()
    x = torch.randn(3, 2)
    assert torch.equal(alone.all_reduce(x.clone()), x)
    assert torch.equal(alone.all_gather(x), x[None])
    assert torch.equal(alone.broadcast(x.clone()), x)
    assert alone.traffic == Traffic()
    with pytest.raises(ValueError, match="group of one"):
        alone.send(x, to=1)
