from __future__ import annotations

import math

import pytest
import torch

from aios_model.sampling import noise
from aios_model.sampling.noise import exponential_noise, row_keys, uniform_noise

MASK_32 = 2**32 - 1
MASK_64 = 2**64 - 1


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors gain nothing from a second thread, and on a busy machine they wait for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def keys(seeds, positions) -> torch.Tensor:
    return row_keys(torch.tensor(seeds, dtype=torch.int64), torch.tensor(positions, dtype=torch.int64))


def ids(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)


def splitmix_by_hand(x: int) -> int:
    x &= MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK_64
    return x ^ (x >> 31)


def hash_by_hand(seed: int, position: int, token_id: int) -> int:
    golden = 0x9E3779B97F4A7C15
    key = splitmix_by_hand(splitmix_by_hand(seed + golden) + position * golden)
    low, high = key & MASK_32, key >> 32
    x = (token_id + low) & MASK_32
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & MASK_32
    x ^= high
    x = ((x ^ (x >> 15)) * 0x735A2D97) & MASK_32
    return x ^ (x >> 15)


def surprise(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Chi-square statistic as a number of standard deviations (Wilson and Hilferty, 1931)."""
    freedom = counts.numel() - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def bin_surprise(u: torch.Tensor, bins: int = 256) -> float:
    counts = torch.histc(u.double().flatten(), bins=bins, min=0, max=1)
    return surprise(counts, torch.full_like(counts, u.numel() / bins))


def pair_surprise(a: torch.Tensor, b: torch.Tensor, bins: int = 16) -> float:
    cells = (a.double() * bins).long().flatten() * bins + (b.double() * bins).long().flatten()
    counts = torch.bincount(cells, minlength=bins * bins).double()
    return surprise(counts, torch.full_like(counts, cells.numel() / bins**2))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123456789])
@pytest.mark.parametrize("position", [0, 1, 4095, 2**40])
def test_bits_equal_the_hash_worked_out_in_unbounded_integers(seed, position):
    token_ids = torch.tensor([0, 1, 2, 31999, 151935, 2**31 - 1], dtype=torch.int32)
    bits = noise._hash_32(keys([seed], [position]), token_ids)
    assert [b & MASK_32 for b in bits[0].tolist()] == [hash_by_hand(seed, position, t) for t in token_ids.tolist()]


def test_uniform_numbers_are_the_bits_scaled():
    got = uniform_noise(keys([3], [5]), ids(1000))[0].double()
    wanted = torch.tensor([(hash_by_hand(3, 5, t) % 2**31 + 0.5) / 2**31 for t in range(1000)], dtype=torch.float64)
    torch.testing.assert_close(got, wanted, rtol=2e-7, atol=0)


def test_no_bits_give_zero_or_one(monkeypatch):
    extremes = torch.tensor([[0, 1, 2**31 - 1, 2**31 - 2, -1, -(2**31), -(2**31) + 1]], dtype=torch.int32)
    monkeypatch.setattr(noise, "_hash_32", lambda keys_R2, token_ids: extremes.clone())
    uniform = uniform_noise(keys([0], [0]), ids(7))
    assert 0 < float(uniform.min()) <= 2**-31
    assert float(uniform.max()) == 1 - 2**-24
    exponential = exponential_noise(keys([0], [0]), ids(7))
    assert torch.isfinite(exponential).all()
    assert float(exponential.min()) > 0


def test_exponentials_keep_full_precision_however_small():
    uniform = uniform_noise(keys(range(8), [0] * 8), ids(200_000))
    wanted = -torch.log1p(-uniform.double())
    assert float(uniform.min()) < 1e-5
    torch.testing.assert_close(
        exponential_noise(keys(range(8), [0] * 8), ids(200_000)).double(), wanted, rtol=5e-7, atol=0
    )


def test_small_exponentials_are_as_fine_as_the_bits(monkeypatch):
    tiny = torch.tensor([[0, 1, 2, 3, 7, 100]], dtype=torch.int32)
    monkeypatch.setattr(noise, "_hash_32", lambda keys_R2, token_ids: tiny.clone())
    got = exponential_noise(keys([0], [0]), ids(6)).double()
    torch.testing.assert_close(got, (tiny.double() + 0.5) / 2**31, rtol=1e-6, atol=0)


def test_noise_is_the_same_alone_in_any_batch_and_for_any_candidates():
    whole = exponential_noise(keys(range(50), range(100, 150)), ids(4099))
    for row in (0, 7, 49):
        assert torch.equal(exponential_noise(keys([row], [100 + row]), ids(4099))[0], whole[row])
    picks = torch.randint(0, 4099, (50, 37), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(exponential_noise(keys(range(50), range(100, 150)), picks), whole.gather(1, picks.long()))


def test_noise_does_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = exponential_noise(keys(range(4), [9] * 4), ids(49152))
        torch.set_num_threads(2)
        assert torch.equal(exponential_noise(keys(range(4), [9] * 4), ids(49152)), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
def test_uniform_noise_is_bitwise_the_same_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    here = keys(range(16), range(16))
    there = row_keys(torch.arange(16, device="cuda"), torch.arange(16, device="cuda"))
    assert torch.equal(there.cpu(), here)
    assert torch.equal(uniform_noise(there, ids(49152).cuda()).cpu(), uniform_noise(here, ids(49152)))


def test_numbers_are_uniform_over_tokens_positions_and_seeds():
    n = 2**18
    assert abs(bin_surprise(uniform_noise(keys([0], [0]), ids(n)))) < 4
    assert abs(bin_surprise(uniform_noise(keys([0] * n, range(n)), ids(1)))) < 4
    assert abs(bin_surprise(uniform_noise(keys(range(n), [0] * n), ids(1)))) < 4
    assert abs(bin_surprise(uniform_noise(keys(range(512), range(512)), ids(512)), bins=4096)) < 4


def test_every_bit_is_set_half_the_time():
    bits = noise._hash_32(keys(range(64), [0] * 64), ids(4096)).long()
    half, spread = bits.numel() / 2, math.sqrt(bits.numel()) / 2
    for place in range(32):
        assert abs(int((bits >> place & 1).sum()) - half) < 4.5 * spread


def test_neighbouring_tokens_positions_and_seeds_are_independent():
    u = uniform_noise(keys([7] * 512, range(512)), ids(512))
    by_seed = uniform_noise(keys(range(512), [7] * 512), ids(512))
    pairs = {
        "tokens": (u[:, 1:], u[:, :-1]),
        "tokens a power of two apart": (u[:, 256:], u[:, :-256]),
        "positions": (u[1:], u[:-1]),
        "seeds": (by_seed[1:], by_seed[:-1]),
        "seed and position exchanged": (u, by_seed),
        "token against position": (u[1:, :-1], u[:-1, 1:]),
        "token against seed": (by_seed[1:, :-1], by_seed[:-1, 1:]),
    }
    for name, (a, b) in pairs.items():
        a, b = a.flatten().double(), b.flatten().double()
        if name == "seed and position exchanged":  # (7, 7) lies in both
            a, b = a[:3584], b[:3584]
        correlation = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
        assert abs(correlation) * math.sqrt(len(a)) < 4, name
        assert abs(pair_surprise(a, b)) < 4, name


def test_rows_sum_to_what_independent_numbers_would():
    sums = uniform_noise(keys(range(4096), [3] * 4096), ids(1024)).double().sum(dim=1)
    standard = (sums - 512) / math.sqrt(1024 / 12)
    assert abs(float(standard.mean())) < 4 / math.sqrt(4096)
    assert abs(float(standard.var()) - 1) < 4 * math.sqrt(2 / 4096)


def test_the_same_tests_notice_planted_faults():
    u = uniform_noise(keys([7] * 512, range(512)), ids(512))
    assert bin_surprise(u * 0.99) > 6
    assert bin_surprise(u.double() ** 1.03) > 6
    assert bin_surprise((u * 128).floor() / 128) > 6
    mixed = torch.where(torch.rand(u.shape, generator=torch.Generator().manual_seed(0)) < 0.05, u.roll(1, 1), u)
    assert pair_surprise(mixed[:, 1:], u[:, :-1]) > 6
    weak = ((ids(512)[None] * 2654435 + torch.arange(512)[:, None] * 40503) % 2**16) / 2**16
    assert pair_surprise(weak[:, 1:], weak[:, :-1]) > 6
