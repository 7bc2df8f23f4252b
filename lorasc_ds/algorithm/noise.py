"""Random numbers by position: Philox-4x32-10, counted by the element's index in the whole matrix.

A number depends on (seed, expert, weight, purpose, element index) and on nothing else: not on the world
size, the slice asked for, the thread count or the device. So every rank can draw the noise of its own
shard, and a replay draws it again. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW_32_BITS = 0xFFFFFFFF


class Purpose(IntEnum):
    """What a stream of numbers is for; part of the counter, so that the streams never meet."""

    NOISE = 0
    FRESH_A = 1


class Stream(NamedTuple):
    """One stream of numbers.

    Args:
        seed: the run's seed, 0 to 2**64 - 1.
        expert: index of the expert, from 1.
        weight: position of the weight among the adapted weights' names sorted as strings.
        purpose: what the numbers are for.
    """

    seed: int
    expert: int
    weight: int
    purpose: Purpose


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox-4x32-10 on many counters at once.

    Args:
        counter: four int64 tensors of one shape that hold the counters' 32-bit words.
        key: the two 32-bit words of the key.

    Returns:
        four int64 tensors of the same shape: the 32-bit words drawn.
    """
    # The product of two 32-bit words wraps around in int64, but its 64 bits are right: shift, then mask.
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product0 = c0 * MULTIPLIERS[0]
        product1 = c2 * MULTIPLIERS[1]
        c0 = (product1 >> 32).bitwise_and_(LOW_32_BITS).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (product0 >> 32).bitwise_and_(LOW_32_BITS).bitwise_xor_(c3).bitwise_xor_(k1)
        c1 = product1.bitwise_and_(LOW_32_BITS)
        c3 = product0.bitwise_and_(LOW_32_BITS)
        k0 = (k0 + KEY_INCREMENTS[0]) & LOW_32_BITS
        k1 = (k1 + KEY_INCREMENTS[1]) & LOW_32_BITS
    return c0, c1, c2, c3


def words(stream: Stream, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """The 32-bit words of the elements [start, stop) of the flattened matrix, int64 of (stop - start,)."""
    first_block, last_block = start // 4, (stop + 3) // 4
    block = torch.arange(first_block, last_block, dtype=torch.int64, device=device)
    counter = (
        block & LOW_32_BITS,
        block >> 32,
        torch.full_like(block, stream.weight),
        torch.full_like(block, 2 * stream.expert + stream.purpose),
    )
    drawn = philox_4x32(counter, (stream.seed & LOW_32_BITS, stream.seed >> 32))
    return torch.stack(drawn, dim=1).view(-1)[start - 4 * first_block : stop - 4 * first_block]


def uniform(stream: Stream, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform numbers in [0, 1) for the elements [start, stop): float32 of (stop - start,), multiples of 2**-24."""
    # 16k elements keep the dozen int64 temporaries in a core's cache: 5 times faster than whole rows. An
    # accelerator wants few launches instead.
    size = 1 << (14 if torch.device(device).type == "cpu" else 21)
    numbers = torch.empty(stop - start, dtype=torch.float32, device=device)
    for first in range(start, stop, size):
        last = min(first + size, stop)
        numbers[first - start : last - start] = words(stream, first, last, device) >> 8
    return numbers.mul_(2.0**-24)
