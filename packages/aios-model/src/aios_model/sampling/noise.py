"""Randomness without a generator: every draw is a pure function of (seed, position, token id).

A counter-based hash (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) replaces a stateful generator.
What a request draws then depends on nothing but its own seed and position: not on the other rows, the batch size, a
preemption or a speculative step, nor on whether noise was asked for the whole vocabulary or for a few candidates.

Shapes: R rows, W token ids per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# The finaliser of splitmix64 (Steele, Lea, Flood, 2014), as signed 64-bit integers: torch has no unsigned arithmetic.
_GOLDEN_64 = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_64 = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
# "lowbias32", the constants with the lowest avalanche bias found for two multiplications (C. Wellons, hash-prospector).
_MIX_32 = (0x21F0AAAD, 0x735A2D97)

_LARGEST_BELOW_ONE = 1.0 - 2.0**-24
_UNIFORM_SCALE = 2.0**-31 * _LARGEST_BELOW_ONE


def row_keys(seeds_R: Tensor, positions_R: Tensor) -> Tensor:
    """Two 32-bit keys per row.

    Args:
        seeds_R: int64 [R].
        positions_R: int64 [R].

    Returns:
        int32 [R, 2].
    """
    mixed = _mix_64(_mix_64(seeds_R + _GOLDEN_64) + positions_R * _GOLDEN_64)
    return mixed.view(torch.int32).view(-1, 2)


def uniform_noise(keys_R2: Tensor, token_ids: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), never 0 and never 1, bit for bit the same on every device.

    Args:
        keys_R2: int32 [R, 2] from `row_keys`.
        token_ids: int32 [W], the same ids for every row, or int32 [R, W].

    Returns:
        float32 [R, W], between 2**-32 and 1 - 2**-24. Small values keep 31 bits of resolution.
    """
    bits = _hash_32(keys_R2, token_ids).bitwise_and_(0x7FFFFFFF)
    # A float32 rounds 2**31 - 1 up to 2**31: the scale, just below 2**-31, keeps the result below one.
    return bits.to(torch.float32).add_(0.5).mul_(_UNIFORM_SCALE)


def exponential_noise(keys_R2: Tensor, token_ids: Tensor) -> Tensor:
    """Exponential numbers of mean one: the noise of an exponential race.

    The index that maximises weight[i] / exponential[i] is a draw in proportion to the weights. This is the Gumbel-max
    trick, whose noise is -log(exponential), one logarithm cheaper.

    Args:
        keys_R2: int32 [R, 2] from `row_keys`.
        token_ids: int32 [W] or [R, W].

    Returns:
        float32 [R, W], positive and finite.
    """
    uniform = uniform_noise(keys_R2, token_ids)
    # -log1p(-u), written as Kahan did: log(x) * u / (x - 1) with x = 1 - u rounded. Small results decide the race, so
    # they must keep full relative precision; torch.log1p does, at five times the cost of torch.log.
    rounded = torch.sub(1.0, uniform).clamp_(max=_LARGEST_BELOW_ONE)
    return torch.log(rounded).div_(rounded.sub_(1.0)).mul_(uniform)


def _hash_32(keys_R2: Tensor, token_ids: Tensor) -> Tensor:
    """int32 [R, W]. The second key enters halfway, so that rows with neighbouring first keys share no values."""
    bits = token_ids + keys_R2[:, :1]
    spare = torch.empty_like(bits)
    _xor_shift(bits, 16, spare).mul_(_MIX_32[0]).bitwise_xor_(keys_R2[:, 1:])
    _xor_shift(bits, 15, spare).mul_(_MIX_32[1])
    return _xor_shift(bits, 15, spare)


def _xor_shift(bits: Tensor, count: int, spare: Tensor) -> Tensor:
    """bits ^= bits >>> count, in place. Torch's shift is arithmetic, so the copies of the sign bit are masked off."""
    torch.bitwise_right_shift(bits, count, out=spare)
    return bits.bitwise_xor_(spare.bitwise_and_((1 << (32 - count)) - 1))


def _mix_64(bits: Tensor) -> Tensor:
    """The splitmix64 finaliser over an int64 tensor."""
    bits = (bits ^ (bits >> 30 & ((1 << 34) - 1))) * _MIX_64[0]
    bits = (bits ^ (bits >> 27 & ((1 << 37) - 1))) * _MIX_64[1]
    return bits ^ (bits >> 31 & ((1 << 33) - 1))
