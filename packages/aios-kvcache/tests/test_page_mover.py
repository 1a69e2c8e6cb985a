"""What goes out comes back bit by bit, from memory and from disk, and what does not is noticed."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import tempfile
import threading

import pytest
import torch

from aios_kvcache.disk_tier import DiskTier
from aios_kvcache.native.native_cache import NativePagedKVCache
from aios_kvcache.page_mover import PageMover, SwapOrderError
from aios_kvcache.paged_cache import PagedKVCache
from aios_kvcache.swap import Swap
from aios_kvcache.tier_sizing import NUM_SPARE_PAGES, TierPlan, check_host_room, plan_tiers
from aios_model.config import LayerSpec, ModelConfig
from aios_model.errors import ConfigError
from aios_model.native.compiler import find_compiler
from aios_model.native.threads import get_pool

NUM_BLOCKS, NUM_HOST, NUM_DISK = 12, 4, 20
LAYERS = tuple(
    LayerSpec(num_key_value_heads=heads, head_dim=size, window=None, scale=0.3) for heads, size in ((2, 8), (1, 12))
)
CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    layers=LAYERS,
)


def paged(dtype):
    return PagedKVCache(CONFIG, num_blocks=NUM_BLOCKS, block_size=4, dtype=dtype, device="cpu")


def native(dtype):
    if find_compiler() is None:
        pytest.skip("there is no C++ compiler here")
    return NativePagedKVCache(CONFIG, num_blocks=NUM_BLOCKS, block_size=16, pool=get_pool(1), kv_dtype=dtype)


CACHES = {
    "float32": lambda: paged(torch.float32),
    "float64": lambda: paged(torch.float64),
    "native bfloat16": lambda: native(torch.bfloat16),
    "native int8": lambda: native(torch.int8),
}


def fill(cache):
    for tensor in cache.page_tensors:
        raw = tensor[1:].view(torch.uint8)
        raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8))


def pages_of(cache):
    return [tensor.flatten(1).view(torch.uint8).clone() for tensor in cache.page_tensors]


@pytest.fixture
def make_mover(tmp_path):
    movers = []

    def make(cache, *, num_disk=NUM_DISK, **options):
        plan = TierPlan(num_host_pages=NUM_HOST, num_disk_pages=num_disk, directory=str(tmp_path), page_bytes=1)
        movers.append(PageMover(cache.page_tensors, plan, **options))
        return movers[-1]

    yield make
    for mover in movers:
        mover.close()


@pytest.mark.parametrize("gather", [False, True], ids=["memmove", "gather"])
@pytest.mark.parametrize("name", CACHES)
def test_random_moves_leave_every_page_bit_by_bit_what_it_was(name, gather, make_mover):
    cache = CACHES[name]()
    fill(cache)
    mover, draw = make_mover(cache, gather=gather), random.Random(name)
    pool, host, disk = dict(enumerate(range(NUM_BLOCKS + 1))), {}, {}  # which page of the beginning lies where
    original = pages_of(cache)
    num_moves = 0
    for _ in range(60):
        swaps = []
        for _ in range(draw.randint(0, 12)):
            kind = draw.choice(["out", "in", "demote", "load"])
            page, slot, place = draw.randint(1, NUM_BLOCKS), draw.randrange(NUM_HOST), draw.randrange(NUM_DISK)
            if kind == "out":
                swaps.append(Swap("out", page, slot))
                host[slot] = pool[page]
            elif kind == "in" and slot in host:
                swaps.append(Swap("in", slot, page))
                pool[page] = host[slot]
            elif kind == "demote" and slot in host:
                swaps.append(Swap("demote", slot, place))
                disk[place] = host.pop(slot)
            elif kind == "load" and place in disk:
                swaps.append(Swap("load", place, page))
                pool[page] = disk[place]
        assert mover.run(num_moves, swaps) == ()
        num_moves += len(swaps)
        for now, before in zip(pages_of(cache), original, strict=True):
            assert torch.equal(now, before[list(pool.values())])
    assert num_moves > 100


def test_moves_are_made_once_and_in_their_order(make_mover):
    cache = paged(torch.float32)
    fill(cache)
    mover, before = make_mover(cache), pages_of(cache)
    swaps = (Swap("out", 1, 0), Swap("in", 0, 2))
    mover.run(0, swaps)
    fill(cache)
    overwritten = pages_of(cache)
    mover.run(0, swaps)  # the step failed, and comes again
    assert all(map(torch.equal, pages_of(cache), overwritten))
    mover.run(0, (*swaps, Swap("in", 0, 3)))
    for now, old in zip(pages_of(cache), before, strict=True):
        assert torch.equal(now[3], old[1])
    with pytest.raises(SwapOrderError, match="move 5 of a page came before move 3"):
        mover.run(5, ())


def to_disk_and_back(mover, harm=lambda: None):
    """Pages 1 to 4 to disk slots 0 to 3, and back into pages 5 to 8; returns the numbers of those that are lost."""
    out = [Swap("out", page, page - 1) for page in (1, 2, 3, 4)] + [Swap("demote", slot, slot) for slot in range(4)]
    assert mover.run(0, out) == ()
    for slot in range(4):
        mover._disk.wait(slot)
    harm()
    return mover.run(len(out), [Swap("load", slot, slot + 5) for slot in range(4)])


def check_lost(cache, before, lost):
    """Lost pages are zeros, the others came back."""
    for now, old in zip(pages_of(cache), before, strict=True):
        for slot in range(4):
            assert torch.equal(now[slot + 5], torch.zeros_like(old[1]) if slot in lost else old[slot + 1])


def test_a_flipped_byte_on_disk_is_a_lost_page_and_one_warning(make_mover, caplog):
    cache = paged(torch.float32)
    fill(cache)
    mover, before = make_mover(cache), pages_of(cache)

    def harm():
        for slot in (1, 3):
            place = slot * mover.page_bytes + random.randrange(mover.page_bytes)
            byte = os.pread(mover._disk._file.fileno(), 1, place)
            os.pwrite(mover._disk._file.fileno(), bytes([byte[0] ^ 0x10]), place)

    assert to_disk_and_back(mover, harm) == (9, 11)
    assert mover.run(12, [Swap("load", 1, 1)]) == (12,)
    check_lost(cache, before, {1, 3})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "holds something else than was written" in caplog.text


def test_a_loss_is_told_again_when_the_step_comes_again(make_mover):
    mover = make_mover(paged(torch.float32))
    assert mover.run(0, [Swap("load", 7, 1)]) == (0,)  # never written
    assert mover.run(0, [Swap("load", 7, 1), Swap("out", 2, 0)]) == (0,)
    assert mover.run(2, []) == ()


def test_a_file_cut_short_loses_what_it_no_longer_holds(make_mover, caplog):
    cache = paged(torch.float32)
    fill(cache)
    mover, before = make_mover(cache), pages_of(cache)
    harm = lambda: os.truncate(mover._disk._file.fileno(), 2 * mover.page_bytes + 5)  # noqa: E731
    assert to_disk_and_back(mover, harm) == (10, 11)
    check_lost(cache, before, {2, 3})
    assert len(caplog.records) == 1


def test_a_full_disk_loses_pages_and_nothing_else(make_mover, monkeypatch, caplog):
    cache = paged(torch.float32)
    fill(cache)
    mover, before = make_mover(cache), pages_of(cache)
    write = os.pwrite

    def full(fd, data, offset):
        if offset >= mover.page_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    assert to_disk_and_back(mover) == (9, 10, 11)
    check_lost(cache, before, {1, 2, 3})
    assert "No space left on device" in caplog.text
    assert len(caplog.records) == 1
    monkeypatch.undo()
    assert mover.run(12, [Swap("out", 1, 0), Swap("demote", 0, 3), Swap("load", 3, 9)]) == ()  # there is room again


def test_a_limit_on_file_sizes_is_noticed_at_the_start(tmp_path):
    """What a full disk looks like to whoever starts a server: refused, with what to do about it."""
    script = f"""
import resource, signal
from aios_kvcache.disk_tier import DiskTier
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
DiskTier(num_slots=9, page_bytes=1000, directory={str(tmp_path)!r})
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "ConfigError" in result.stderr
    assert "give less with kv_offloading_disk_size" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_left_even_of_a_process_that_is_killed(tmp_path):
    script = f"""
import os
from aios_kvcache.disk_tier import DiskTier
tier = DiskTier(num_slots=4, page_bytes=1000, directory={str(tmp_path)!r})
tier.write(0, memoryview(bytes(1000)), done=lambda: None)
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert list(tmp_path.iterdir()) == []


def test_reading_waits_for_the_write_that_is_on_its_way():
    with tempfile.TemporaryFile(buffering=0) as file:
        tier = DiskTier(num_slots=2, page_bytes=100, directory=".", file=file)
        gate = threading.Event()
        tier._queue.put(gate.wait)
        data, into = memoryview(os.urandom(100)), bytearray(100)
        written = []
        tier.write(1, data, done=lambda: written.append(1))
        threading.Timer(0.05, gate.set).start()
        assert tier.read(1, memoryview(into))
        assert bytes(into) == bytes(data)
        assert written == [1]
        tier.close()


def test_steps_go_on_while_more_pages_are_written_than_there_are_spare_buffers(make_mover):
    cache = paged(torch.float32)
    fill(cache)
    mover, before = make_mover(cache), pages_of(cache)
    swaps = []
    for slot in range(NUM_SPARE_PAGES + 8):
        swaps += [Swap("out", 1 + slot % NUM_BLOCKS, 0), Swap("demote", 0, slot)]
    mover.run(0, swaps)
    assert mover.run(len(swaps), [Swap("load", NUM_SPARE_PAGES + 2, 12)]) == ()
    for now, old in zip(pages_of(cache), before, strict=True):
        assert torch.equal(now[12], old[1 + (NUM_SPARE_PAGES + 2) % NUM_BLOCKS])


def test_measuring_leaves_pages_alone(make_mover):
    cache = paged(torch.float32)
    fill(cache)
    mover, before = make_mover(cache), pages_of(cache)
    seconds = mover.measure()
    assert 0 < min(seconds.page_out, seconds.page_in, seconds.disk_write, seconds.disk_read) < 0.1
    assert all(map(torch.equal, pages_of(cache), before))


def test_sizes_are_counted_in_pages_and_refused_with_the_arithmetic():
    plan = plan_tiers(page_bytes=100, host_bytes=1050, disk_bytes=5000, directory="/tmp")
    assert (plan.num_host_pages, plan.num_disk_pages, plan.num_host_bytes) == (10, 50, 1000)
    assert plan_tiers(page_bytes=100, host_bytes=0, directory="/tmp") is None
    for options, message in (
        ({"host_bytes": 0, "disk_bytes": 900}, "without kv_offloading_size"),
        ({"host_bytes": 4}, "one page takes 100 bytes"),
        ({"host_bytes": 900, "disk_bytes": 9}, "kv_offloading_disk_size=9 cannot be used"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan_tiers(page_bytes=100, directory="/tmp", **options)
    with pytest.raises(ConfigError, match=r"2\.00 GiB is asked for, and 1\.00 GiB of host memory is available"):
        check_host_room(2 << 30, available_bytes=1 << 30)
