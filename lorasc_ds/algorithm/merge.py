"""Noise and experts onto any flat slice of a weight, bit for bit the same however it is sliced.

A slice is `[start, start + len)` of the flattened row-major `W (out, in)`. It has an **accumulator** in
float32; the weight in use is the accumulator rounded once to its storage dtype, so that small experts
are not lost in bfloat16 (ten merges of 0.3 % each: relative error 0.18 instead of 0.47). A float32 weight
is its own accumulator.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lorasc_ds.algorithm.experts import Pair
from lorasc_ds.algorithm.noise import Stream, uniform_chunks


def delta_chunks(pair: Pair, scaling: float, start: int, stop: int) -> Iterator[tuple[int, int, Tensor]]:
    """`D(A, B)` for the elements [start, stop), a few rows of `B` at a time.

    `D[i,j] = float32(s·Σ_k B[i,k]·A[k,j])` with the sum in float64, k ascending. A product of two float32
    numbers is exact in float64, so the bits are the same with and without fused multiply-add; a matrix
    product is not used because it may sum in another order.

    Yields:
        (chunk start, chunk stop, float32 tensor of (chunk stop - chunk start,)).
    """
    A, B = pair.A.detach().double(), pair.B.detach().double()
    rank, in_features = A.shape
    # On a CPU the float64 chunk (256 KiB) stays in a core's cache; an accelerator wants few
    # launches, but no temporaries as large as the weight.
    rows = max(1, (1 << (15 if A.device.type == "cpu" else 21)) // in_features)
    for row in range(start // in_features, -(-stop // in_features), rows):
        sums = torch.zeros(min(rows, B.shape[0] - row), in_features, dtype=torch.float64, device=A.device)
        for k in range(rank):
            sums.addcmul_(B[row : row + rows, k : k + 1], A[k])
        chunk_start = max(start, row * in_features)
        chunk_stop = min(stop, (row + len(sums)) * in_features)
        flat = sums.mul_(scaling).float().view(-1)
        yield chunk_start, chunk_stop, flat[chunk_start - row * in_features : chunk_stop - row * in_features]


def add_delta_(accumulator: Tensor, pair: Pair, scaling: float, start: int = 0) -> None:
    """W <- W + D(slow) (eq. 12) on the slice of `W` that begins at `start`; float32 of (len,), in place."""
    # float32 + float32 rounds as the float64 sum rounded to float32 does: 53 >= 2·24 + 2 bits.
    for chunk_start, chunk_stop, delta in delta_chunks(pair, scaling, start, start + len(accumulator)):
        accumulator[chunk_start - start : chunk_stop - start] += delta


def add_noise_(accumulator: Tensor, stream: Stream, noise_scale: float, start: int = 0) -> None:
    """W <- W + N (eqs. 7 and 8), `N[i,j] = (u - 0.5)·c`, on the slice that begins at `start`, in place.

    With `c = noise_scale = 0` nothing is read or written.
    """
    if noise_scale == 0.0:
        return
    # u - 0.5 has 24 bits and c is a float32: one float32 product rounds as the float64 product does.
    chunks = uniform_chunks(stream, start, start + len(accumulator), accumulator.device)
    for chunk_start, chunk_stop, numbers in chunks:
        accumulator[chunk_start - start : chunk_stop - start] += numbers.sub_(0.5).mul_(noise_scale)


def round_into_(storage: Tensor, accumulator: Tensor) -> None:
    """The weight in use: the accumulator rounded to nearest even in the storage dtype, in place."""
    if storage.data_ptr() != accumulator.data_ptr():
        storage.copy_(accumulator)


def merge_(storage: Tensor, accumulator: Tensor, pair: Pair, scaling: float, start: int = 0) -> Tensor:
    """Close an expert on a slice: accumulator <- accumulator + D, storage <- round(accumulator), in place.

    Returns:
        float64 of (2,): Σ D² and Σ (D - change of `storage`)², what was meant and what rounding lost of it.
    """
    squares = torch.zeros(2, dtype=torch.float64, device=accumulator.device)
    for chunk_start, chunk_stop, delta in delta_chunks(pair, scaling, start, start + len(accumulator)):
        part = slice(chunk_start - start, chunk_stop - start)
        before = storage[part].to(accumulator.device, torch.float32, copy=True)
        accumulator[part] += delta
        storage[part] = accumulator[part].to(storage.dtype)
        change = storage[part].to(accumulator.device, torch.float32) - before
        squares[0] += delta.double().square().sum()
        squares[1] += (delta - change).double().square().sum()
    return squares


def write_merged_(storage: Tensor, accumulator: Tensor, pair: Pair, scaling: float, start: int = 0) -> None:
    """storage <- round(accumulator + D), and nothing else: the weights that closing now would ship.

    Undone by `round_into_(storage, accumulator)`, never by subtracting; where the two are one tensor,
    keep a copy of it first.
    """
    for chunk_start, chunk_stop, delta in delta_chunks(pair, scaling, start, start + len(accumulator)):
        part = slice(chunk_start - start, chunk_stop - start)
        storage[part] = (accumulator[part] + delta).to(storage.dtype)


def write_noisy_(storage: Tensor, accumulator: Tensor, stream: Stream, noise_scale: float, start: int = 0) -> None:
    """storage <- round(accumulator + N), and nothing else; undone as `write_merged_` is."""
    noisy = accumulator.clone()
    add_noise_(noisy, stream, noise_scale, start)
    storage.copy_(noisy)
