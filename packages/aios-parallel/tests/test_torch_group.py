"""gloo, between real processes, against plain sums; and nccl where there is a GPU."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from connections import gloo, gloo_in_default_group
from rank_processes import RankProcesses
from summands import inputs, singles, sum_in_order
from torch.distributed import HashStore

from aios_parallel.errors import CollectiveTimeoutError, ParallelError
from aios_parallel.torch_group import TorchCommunicator

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LARGE = 512 << 10  # bytes from which on the additions are divided among three ranks and more


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankProcesses]:
    path = tmp_path_factory.mktemp("gloo") / "store"
    processes = RankProcesses(gloo, request.param, path=str(path), timeout=20.0)
    yield processes
    processes.end()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_rank_gets_the_sum_in_the_order_of_ranks(ranks: RankProcesses, dtype: torch.dtype) -> None:
    border = LARGE // dtype.itemsize
    for shape in [(), (1,), (3, 5), (border - 1,), (border,), (border + 1,), (2, border // 2 + 37)]:
        summands = inputs(ranks, *shape, dtype=dtype)
        for got in ranks.all("all_reduce", singles(summands)):
            assert torch.equal(got, sum_in_order(summands)), shape


def test_a_sum_does_not_depend_on_where_its_element_lies(ranks: RankProcesses) -> None:
    large = inputs(ranks, LARGE // 2)
    whole = ranks.all("all_reduce", singles(large))[0]
    for _ in range(3):
        start = int(torch.randint(len(whole) - 40, ()))
        alone = ranks.all("all_reduce", [(x[start : start + 40].clone(),) for x in large])[0]
        assert torch.equal(alone, whole[start : start + 40])


def test_an_empty_tensor_is_no_problem(ranks: RankProcesses) -> None:
    empty = [(torch.empty(0, 3),)] * ranks.size
    assert all(x.shape == (0, 3) for x in ranks.all("all_reduce", empty))
    assert all(x.shape == (ranks.size, 0, 3) for x in ranks.all("all_gather", empty))


@pytest.mark.parametrize("shape", [(), (7, 11), (5, 60_001)], ids=str)
def test_tensors_are_gathered_and_broadcast(ranks: RankProcesses, shape: tuple[int, ...]) -> None:
    values = inputs(ranks, *shape, dtype=torch.bfloat16)
    assert all(torch.equal(got, torch.stack(values)) for got in ranks.all("all_gather", singles(values)))
    for root in range(ranks.size):
        got = ranks.all("gather", singles(values), to=root)
        assert torch.equal(got.pop(root), torch.stack(values))
        assert got == [None] * (ranks.size - 1)
        assert all(torch.equal(x, values[root]) for x in ranks.all("broadcast", singles(values), source=root))
    ranks.all("barrier")


@pytest.mark.parametrize("numel", [16, 300_000])
def test_micro_batches_walk_through_a_pipeline(ranks: RankProcesses, numel: int) -> None:
    totals = ranks.all("relay", [(10, numel)] * ranks.size)
    assert totals == [numel * sum(step + rank + 1 for step in range(10)) for rank in range(ranks.size)]


def test_calls_bytes_and_seconds_are_counted(ranks: RankProcesses) -> None:
    before = ranks.all("read", [("traffic",)] * ranks.size)
    ranks.all("all_reduce", singles(inputs(ranks, 100)))
    ranks.all("broadcast", singles(inputs(ranks, 100)), source=0)
    for rank, ([old], [new]) in enumerate(zip(before, ranks.all("read", [("traffic",)] * ranks.size), strict=True)):
        assert new.calls - old.calls == 2
        assert new.num_bytes - old.num_bytes == (800 if rank == 0 else 400)
        assert new.seconds > old.seconds


def test_the_librarys_own_sum_is_there_for_who_wants_it(tmp_path: Path) -> None:
    ranks = RankProcesses(gloo, 2, path=str(tmp_path / "store"), timeout=20.0, batch_invariant=False)
    summands = inputs(ranks, 5000)
    assert all(torch.equal(x, sum_in_order(summands)) for x in ranks.all("all_reduce", singles(summands)))
    ranks.end()


def test_a_group_of_the_default_group_works_too(tmp_path: Path) -> None:
    ranks = RankProcesses(gloo_in_default_group, 2, path=str(tmp_path / "store"), timeout=20.0)
    summands = inputs(ranks, 5000, dtype=torch.bfloat16)
    assert all(torch.equal(x, sum_in_order(summands)) for x in ranks.all("all_reduce", singles(summands)))
    ranks.all("barrier")
    ranks.end()


def test_sends_do_not_wait_for_the_receiver_and_arrive_in_order(tmp_path: Path) -> None:
    ranks = RankProcesses(gloo, 2, path=str(tmp_path / "store"), timeout=20.0)
    x = torch.randn(4, 1000)
    for part in x:
        ranks.begin(0, "send", part, to=1)
        assert ranks.result(0).error is None
    ranks.begin(0, "close")
    for part in x:
        ranks.begin(1, "receive", torch.empty(1000), source=0)
        assert torch.equal(ranks.result(1).value, part)
    assert ranks.result(0).error is None
    ranks.begin(0, "barrier")
    assert "has closed this group" in str(ranks.result(0).error)
    ranks.end()


def test_transfers_and_collectives_do_not_disturb_each_other(ranks: RankProcesses) -> None:
    if ranks.size == 1:
        return
    x = torch.randn(1000)
    ranks.begin(1, "send", x, to=0)
    assert ranks.result(1).error is None
    values = inputs(ranks, 1000)
    assert torch.equal(ranks.all("gather", singles(values))[0], torch.stack(values))
    ranks.begin(0, "receive", torch.empty(1000), source=1)
    assert torch.equal(ranks.result(0).value, x)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("call", ["all_reduce", "broadcast", "all_gather"])
def test_a_rank_that_is_gone_is_an_error_in_time(tmp_path: Path, number: signal.Signals, call: str) -> None:
    ranks = RankProcesses(gloo, 2, path=str(tmp_path / "store"), timeout=1.0)
    try:
        ranks.all("barrier")
        ranks.signal(1, number)
        kwargs = {"source": 1} if call == "broadcast" else {}
        ranks.begin(0, call, torch.ones(10), **kwargs)
        outcome = ranks.result(0)
        assert isinstance(outcome.error, CollectiveTimeoutError)
        assert outcome.seconds < 2.5
        ranks.begin(0, "barrier")
        again = ranks.result(0)
        assert "the group is over" in str(again.error)
        assert again.seconds < 0.1
    finally:
        ranks.end()


def test_a_rank_that_never_comes_is_an_error_in_time() -> None:
    with pytest.raises(CollectiveTimeoutError, match="could not form a group of 2 over gloo"):
        TorchCommunicator.create(HashStore(), rank=0, size=2, timeout=0.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nccl_without_a_gpu_says_what_to_do() -> None:
    with pytest.raises(ParallelError, match="use gloo"):
        TorchCommunicator.create(HashStore(), rank=0, size=1, backend="nccl")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("batch_invariant", [True, False])
def test_nccl_alone_on_one_gpu(batch_invariant: bool) -> None:
    group = TorchCommunicator.create(
        HashStore(), rank=0, size=1, backend="nccl", timeout=30, batch_invariant=batch_invariant
    )
    x = torch.randn(1000, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(group.all_reduce(x.clone()), x)
    assert torch.equal(group.all_gather(x), x[None])
    assert torch.equal(group.broadcast(x.clone()), x)
    gathered = group.gather(x)
    assert gathered is not None
    assert torch.equal(gathered, x[None])
    group.barrier()
    assert group.traffic.calls == 5
    group.close()
