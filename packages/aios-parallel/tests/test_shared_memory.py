"""Shared memory against plain sums, between real processes; and what happens when one of them is gone."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from connections import shared
from rank_processes import RankProcesses
from summands import inputs, singles, sum_in_order

from aios_model.native import native_status
from aios_parallel.errors import CollectiveTimeoutError, ParallelError
from aios_parallel.native.structures import parallel_function, parallel_library
from aios_parallel.segment_file import SegmentFile
from aios_parallel.shared_memory import SharedMemoryCommunicator

pytestmark = pytest.mark.skipif(
    not native_status(parallel_library).available, reason=native_status(parallel_library).reason
)

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SLOT = 256 << 10


def fresh_path() -> str:
    return f"/dev/shm/aios-test-{secrets.token_hex(8)}"


@pytest.fixture(scope="module", params=[(1, ""), (2, ""), (2, "portable"), (3, ""), (4, "")], ids=str)
def ranks(request: pytest.FixtureRequest) -> Iterator[RankProcesses]:
    size, isa = request.param
    processes = RankProcesses(shared, size, path=fresh_path(), isa=isa, timeout=20)
    yield processes
    processes.end()


@pytest.fixture
def pair() -> Iterator[RankProcesses]:
    processes = RankProcesses(shared, 2, path=fresh_path(), timeout=0.5)
    yield processes
    processes.end()


@pytest.fixture
def trio() -> Iterator[RankProcesses]:
    processes = RankProcesses(shared, 3, path=fresh_path(), timeout=0.5)
    yield processes
    processes.end()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_rank_gets_the_sum_in_the_order_of_ranks(ranks: RankProcesses, dtype: torch.dtype) -> None:
    per_slot = SLOT // dtype.itemsize
    for numel in (1, 2, 15, 257, 2048, 8193, per_slot - 1, per_slot, per_slot + 1, 3 * per_slot + 77):
        summands = inputs(ranks, numel, dtype=dtype)
        expected = sum_in_order(summands)
        for got in ranks.all("all_reduce", singles(summands)):
            assert torch.equal(got, expected), numel


def test_integers_are_added_up_too(ranks: RankProcesses) -> None:
    for dtype in (torch.int32, torch.int64):
        summands = [torch.randint(-(10**9), 10**9, (1000,), dtype=dtype) // 4 for _ in range(ranks.size)]
        assert torch.equal(ranks.all("all_reduce", singles(summands))[0], torch.stack(summands).sum(0, dtype=dtype))


def test_float16_is_rounded_as_torch_does(ranks: RankProcesses) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    summands = [every, *(every[torch.randperm(2**16)] for _ in range(ranks.size - 1))]
    expected = sum_in_order(summands)
    for got in ranks.all("all_reduce", singles(summands)):
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(0.0).view(torch.int16), expected.nan_to_num(0.0).view(torch.int16))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_sum_does_not_depend_on_where_its_element_lies(ranks: RankProcesses, dtype: torch.dtype) -> None:
    large = inputs(ranks, 3 * SLOT // dtype.itemsize + 501, dtype=dtype)
    whole = ranks.all("all_reduce", singles(large))[0]
    for _ in range(5):
        start = int(torch.randint(len(whole) - 40, ()))
        alone = ranks.all("all_reduce", [(x[start : start + 40].clone(),) for x in large])[0]
        assert torch.equal(alone, whole[start : start + 40])


def test_an_empty_tensor_is_no_problem(ranks: RankProcesses) -> None:
    assert all(x.shape == (0, 3) for x in ranks.all("all_reduce", [(torch.empty(0, 3),)] * ranks.size))
    assert all(x.shape == (ranks.size, 0, 3) for x in ranks.all("all_gather", [(torch.empty(0, 3),)] * ranks.size))


def test_many_sums_in_a_row_never_mix(ranks: RankProcesses) -> None:
    sizes = (1, 5000, 33, 40_000, 2048)
    offsets = sum(range(ranks.size))
    for sums in ranks.all("burst", [(100, *sizes)] * ranks.size):
        for step, got in enumerate(sums):
            expected = ranks.size * (torch.arange(sizes[step % 5], dtype=torch.float64) + step) + offsets
            assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(), (3,), (7, 11), (5, 60_001)], ids=str)
def test_gathering_stacks_what_all_have(ranks: RankProcesses, shape: tuple[int, ...]) -> None:
    values = inputs(ranks, *shape, dtype=torch.bfloat16)
    assert all(torch.equal(got, torch.stack(values)) for got in ranks.all("all_gather", singles(values)))
    for to in range(ranks.size):
        got = ranks.all("gather", singles(values), to=to)
        assert torch.equal(got.pop(to), torch.stack(values))
        assert got == [None] * (ranks.size - 1)


@pytest.mark.parametrize("numel", [1, 1000, 200_000])
def test_a_broadcast_overwrites_what_others_have(ranks: RankProcesses, numel: int) -> None:
    for source in range(ranks.size):
        values = inputs(ranks, numel)
        assert all(torch.equal(x, values[source]) for x in ranks.all("broadcast", singles(values), source=source))


def test_native_code_gets_the_same_sums(ranks: RankProcesses) -> None:
    summands = inputs(ranks, 100_003)
    assert all(
        torch.equal(x, sum_in_order(summands)) and not failed for x, failed in ranks.all("native", singles(summands))
    )


def test_calls_bytes_and_seconds_are_counted_wherever_they_are_made(ranks: RankProcesses) -> None:
    before = ranks.all("read", [("traffic", "progress")] * ranks.size)
    for call in ("all_reduce", "native", "all_gather"):
        ranks.all(call, singles(inputs(ranks, 100)))
    ranks.all("barrier")
    for (old, old_progress), (new, progress) in zip(
        before, ranks.all("read", [("traffic", "progress")] * ranks.size), strict=True
    ):
        assert new.calls - old.calls == progress - old_progress == 4
        assert new.num_bytes - old.num_bytes == 3 * 400
        assert 0 < new.seconds - old.seconds < 20


@pytest.mark.parametrize("numel", [16, 40_000, 300_000])
def test_micro_batches_walk_through_a_pipeline(ranks: RankProcesses, numel: int) -> None:
    totals = ranks.all("relay", [(10, numel)] * ranks.size)
    assert totals == [numel * sum(step + rank + 1 for step in range(10)) for rank in range(ranks.size)]


def test_what_cannot_be_exchanged_is_refused_and_harms_nobody(ranks: RankProcesses) -> None:
    for call, argument, words in [
        ("all_reduce", torch.zeros(2, dtype=torch.bool), "bool"),
        ("all_reduce", torch.zeros(3, 3).t(), "contiguous"),
        ("all_reduce", torch.zeros(3, device="meta"), "meta"),
    ]:
        with pytest.raises(ValueError, match=words):
            ranks.all(call, singles([argument] * ranks.size))
    with pytest.raises(ValueError, match=f"no rank {ranks.size}"):
        ranks.all("broadcast", singles(inputs(ranks, 1)), source=ranks.size)
    with pytest.raises(ValueError, match="with itself"):
        send_to_itself(ranks)
    ranks.all("barrier")


def send_to_itself(ranks: RankProcesses) -> None:
    ranks.begin(0, "send", torch.zeros(1), to=0)
    error = ranks.result(0).error
    assert error is not None
    raise error


def test_a_send_that_fits_does_not_wait_and_arrives_in_order(pair: RankProcesses) -> None:
    x = torch.randn(4, 128, 256)
    for part in x:
        pair.begin(0, "send", part, to=1)
        assert pair.result(0).error is None
    for part in x:
        pair.begin(1, "receive", torch.empty(128, 256), source=0)
        assert torch.equal(pair.result(1).value, part)


def test_transfers_and_collectives_do_not_disturb_each_other(trio: RankProcesses) -> None:
    x = torch.randn(1000)
    trio.begin(0, "send", x, to=2)
    assert trio.result(0).error is None
    assert torch.equal(trio.all("all_reduce", [(torch.ones(3),)] * 3)[2], torch.full((3,), 3.0))
    trio.begin(2, "receive", torch.empty(1000), source=0)
    assert torch.equal(trio.result(2).value, x)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("call", ["all_reduce", "all_gather", "broadcast"])
def test_a_rank_that_is_gone_is_named_in_time(trio: RankProcesses, number: signal.Signals, call: str) -> None:
    trio.signal(1, number)
    for rank in (0, 2):
        trio.begin(rank, call, torch.ones(10))
    outcomes = [trio.result(rank) for rank in (0, 2)]
    assert all(isinstance(outcome.error, CollectiveTimeoutError) for outcome in outcomes)
    assert all(outcome.seconds < 1.5 for outcome in outcomes)
    assert any("rank 1 did not come" in str(outcome.error) for outcome in outcomes)
    trio.begin(0, call, torch.ones(10))
    again = trio.result(0)
    assert isinstance(again.error, CollectiveTimeoutError)
    assert again.seconds < 0.1


def test_a_rank_that_stops_in_the_middle_of_a_transfer_is_named(pair: RankProcesses) -> None:
    pair.signal(1, signal.SIGSTOP)
    pair.begin(0, "send", torch.ones(1_000_000), to=1)
    outcome = pair.result(0)
    assert isinstance(outcome.error, CollectiveTimeoutError)
    assert "rank 1 did not come" in str(outcome.error)
    assert outcome.seconds < 1.5


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_native_code_learns_of_a_failure_and_goes_on_at_once(pair: RankProcesses, number: signal.Signals) -> None:
    pair.signal(1, number)
    pair.begin(0, "native", torch.ones(10))
    first = pair.result(0)
    assert first.value[1]
    assert 0.4 < first.seconds < 1.5
    pair.begin(0, "native", torch.ones(10))
    second = pair.result(0)
    assert second.value[1]
    assert second.seconds < 0.1
    pair.begin(0, "barrier")
    assert "rank 1 did not come" in str(pair.result(0).error)


def test_an_abort_ends_the_waits_of_all_ranks() -> None:
    ranks = RankProcesses(shared, 3, path=fresh_path(), timeout=30)
    try:
        ranks.begin(0, "abort_after", 0.2)
        assert ranks.result(0).error is None
        ranks.begin(0, "barrier")
        ranks.begin(1, "receive", torch.empty(3), source=2)
        for rank in (0, 1):
            outcome = ranks.result(rank)
            assert isinstance(outcome.error, CollectiveTimeoutError)
            assert "aborted by rank 0" in str(outcome.error)
            assert outcome.seconds < 2
        ranks.begin(2, "native", torch.ones(3))
        assert ranks.result(2).value[1]
    finally:
        ranks.end()


def test_a_rank_that_leaves_does_not_keep_others_waiting() -> None:
    ranks = RankProcesses(shared, 2, path=fresh_path(), timeout=30)
    try:
        ranks.begin(1, "close")
        ranks.begin(0, "barrier")
        outcome = ranks.result(0)
        assert "rank 1 has closed" in str(outcome.error)
        assert outcome.seconds < 2
        assert ranks.result(1).error is None
        ranks.begin(1, "barrier")
        assert "has closed this group" in str(ranks.result(1).error)
        ranks.begin(1, "close")
        assert ranks.result(1).error is None
    finally:
        ranks.end()


def test_ranks_that_are_out_of_step_are_told(pair: RankProcesses) -> None:
    pair.begin(0, "all_reduce", torch.ones(10))
    pair.begin(1, "all_reduce", torch.ones(11))
    errors = [pair.result(rank).error for rank in range(2)]
    assert any(type(error) is ParallelError and "another size" in str(error) for error in errors)
    assert None not in errors


def test_another_thread_sees_whether_a_rank_waits(pair: RankProcesses) -> None:
    pair.begin(0, "watch", 0.1)
    pair.begin(1, "sleep", 0.3)
    assert pair.result(1).error is None
    pair.begin(1, "barrier")
    assert pair.result(0).value == [False, True, False]


def test_a_rank_that_waits_long_leaves_its_core() -> None:
    ranks = RankProcesses(shared, 2, path=fresh_path(), timeout=30)
    try:
        ranks.begin(0, "barrier")
        time.sleep(0.3)
        before = cpu_seconds(ranks.processes[0].pid)
        time.sleep(1)
        assert cpu_seconds(ranks.processes[0].pid) - before < 0.3
        ranks.begin(1, "barrier")
        assert [ranks.result(rank).error for rank in range(2)] == [None, None]
    finally:
        ranks.end()


def cpu_seconds(pid: int | None) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_nothing_is_left_behind_when_all_are_killed() -> None:
    path = Path(fresh_path())
    ranks = RankProcesses(shared, 2, path=str(path))
    assert list(path.parent.glob(f"{path.name}*")) == []
    ranks.end()
    assert list(path.parent.glob(f"{path.name}*")) == []


def test_a_rank_that_never_comes_is_named_and_nothing_is_left_behind() -> None:
    path = Path(fresh_path())
    with pytest.raises(CollectiveTimeoutError, match="ranks 0, 2 of 3"):
        SharedMemoryCommunicator.open(path, rank=1, size=3, open_timeout=0.1)
    assert list(path.parent.glob(f"{path.name}*")) == []


@pytest.mark.parametrize("content", [b"", b"x" * 100, bytes(4 << 20)], ids=len)
def test_a_file_that_is_none_of_ours_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "group"
    path.write_bytes(content)
    with pytest.raises(ParallelError, match="is not the shared memory of this group"):
        SharedMemoryCommunicator.open(path, rank=0, size=2)
    assert path.read_bytes() == content


def test_a_group_of_another_size_is_refused(tmp_path: Path) -> None:
    num_bytes = parallel_function("aios_segment_bytes")(2)
    file = SegmentFile.open(tmp_path / "group", size=2, num_bytes=num_bytes)
    os.close(file.descriptor)
    with pytest.raises(ParallelError, match="the same number of ranks"):
        SharedMemoryCommunicator.open(file.path, rank=0, size=3)


def test_a_rank_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "group"
    file = SegmentFile.open(path, size=2, num_bytes=parallel_function("aios_segment_bytes")(2))
    first = SharedMemoryCommunicator(file, rank=0, size=2, timeout=1)
    assert parallel_function("aios_group_arrive")(first._group) == 0
    with pytest.raises(ParallelError, match="has a rank 0"):
        SharedMemoryCommunicator.open(path, rank=0, size=2)
    first.close()
    os.close(file.descriptor)


def test_a_folder_without_room_or_rights_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ParallelError, match="--shm-size"):
        SharedMemoryCommunicator.open("/proc/group", rank=0, size=2)


@pytest.mark.parametrize(("rank", "size", "timeout"), [(2, 2, 1), (-1, 2, 1), (0, 0, 1), (0, 65, 1), (0, 2, 0)])
def test_ranks_and_times_out_of_range_are_refused(rank: int, size: int, timeout: float) -> None:
    with pytest.raises(ValueError, match="need 0 <= rank"):
        SharedMemoryCommunicator.open(fresh_path(), rank=rank, size=size, timeout=timeout)


@pytest.mark.parametrize("size", [1, 2, 8, 16, 64])
def test_the_segment_is_small(size: int) -> None:
    assert parallel_function("aios_segment_bytes")(size) < 20 << 20
