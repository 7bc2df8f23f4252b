"""A boundary on a CUDA device: one launch over a table of pointers to all slices, with the bits of merge.py's torch."""

# pyright: reportMissingImports=false, reportCallIssue=false, reportIndexIssue=false
from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorasc_ds.algorithm.compiled import factors_of

if TYPE_CHECKING:
    from lorasc_ds.algorithm.merge import Edit

FIELDS = tl.constexpr(11)  # integers of a slice
ROWS, COLUMNS = 32, 128  # of a tile: a factor's element is loaded once for as many of the weight


@triton.jit
def uniform(block, seed, weight, purpose):
    """The four words of Philox-4x32-10 at each counter, as uniform numbers in [0, 1)."""
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    words = tl.philox(seed, low, high, low * 0 + weight.to(tl.uint32), low * 0 + purpose.to(tl.uint32))
    u0 = (words[0] >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2**-24
    u1 = (words[1] >> 8).to(tl.float32) * 5.9604644775390625e-08
    u2 = (words[2] >> 8).to(tl.float32) * 5.9604644775390625e-08
    u3 = (words[3] >> 8).to(tl.float32) * 5.9604644775390625e-08
    return u0, u1, u2, u3


@triton.jit
def to_bfloat16(value):
    """The 16 bits of the nearest bfloat16, ties to even, as the upper half of a word."""
    bits = value.to(tl.uint32, bitcast=True)
    return tl.where(value == value, (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000, 0x7FC00000)


@triton.jit
def rounded(value, BFLOAT16: tl.constexpr):
    return to_bfloat16(value).to(tl.uint32).to(tl.float32, bitcast=True) if BFLOAT16 else value


@triton.jit
def edit_tile(
    integers,
    numbers,
    squares,
    BFLOAT16: tl.constexpr,
    ALIGNED: tl.constexpr,
    MERGES: tl.constexpr,
    NOISES: tl.constexpr,
    KEEPS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Of slice `program_id(1)`, tile `program_id(0)` of the whole weight, from the slice's first row.

    Args:
        integers: int64 of (slices, FIELDS), as `integers_of` gives them; numbers: float64 of (slices, 2), s and c.
        squares: float64 of (slices, tiles, 2), what every tile adds to them.
        ALIGNED: rows begin at multiples of four, so that Philox is asked once for four elements.
    """
    table = integers + tl.program_id(1) * FIELDS
    accumulator = tl.load(table).to(tl.pointer_type(tl.float32))
    start, length, width = tl.load(table + 4), tl.load(table + 5), tl.load(table + 7)
    across = tl.cdiv(width, C)
    tile = tl.program_id(0).to(tl.int64)
    row = start // width + tile // across * R + tl.arange(0, R)
    column = tile % across * C + tl.arange(0, C)
    element = row[:, None] * width + column[None, :]
    inside = (column < width)[None, :] & (element >= start) & (element < start + length)
    total = tl.load(accumulator + (element - start), inside, other=0.0)
    if MERGES:
        A, B = tl.load(table + 2).to(tl.pointer_type(tl.float64)), tl.load(table + 3).to(tl.pointer_type(tl.float64))
        rank = tl.load(table + 6)
        sums = tl.zeros((R, C), tl.float64)
        for k in range(rank):
            b = tl.load(B + row * rank + k, row * width < start + length, other=0.0)
            a = tl.load(A + k * width + column, column < width, other=0.0)
            sums = tl.fma(tl.broadcast_to(b[:, None], (R, C)), tl.broadcast_to(a[None, :], (R, C)), sums)
        delta = (sums * tl.load(numbers + 2 * tl.program_id(1))).to(tl.float32)
        before = rounded(total, BFLOAT16)
        total += delta
        meant = tl.where(inside, delta, 0.0)
        lost = tl.where(inside, delta - (rounded(total, BFLOAT16) - before), 0.0)
        here = squares + 2 * (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tile)
        tl.store(here, tl.sum(meant.to(tl.float64) * meant.to(tl.float64)))
        tl.store(here + 1, tl.sum(lost.to(tl.float64) * lost.to(tl.float64)))
    if NOISES:
        seed, weight, purpose = tl.load(table + 8), tl.load(table + 9), tl.load(table + 10)
        c = tl.load(numbers + 2 * tl.program_id(1) + 1).to(tl.float32)
        if ALIGNED:
            block = row[:, None] * (width // 4) + (tile % across * (C // 4) + tl.arange(0, C // 4))[None, :]
            u0, u1, u2, u3 = uniform(block, seed, weight, purpose)
            u = tl.interleave(tl.interleave(u0, u2), tl.interleave(u1, u3))
        else:
            u0, u1, u2, u3 = uniform(element // 4, seed, weight, purpose)
            word = element % 4
            u = tl.where(word < 2, tl.where(word == 0, u0, u1), tl.where(word == 2, u2, u3))
        total = tl.where(c == 0.0, total, total + (u - 0.5) * c)
    if not KEEPS:
        tl.store(accumulator + (element - start), total, inside)
    if BFLOAT16:
        storage = tl.load(table + 1).to(tl.pointer_type(tl.uint16))
        tl.store(storage + (element - start), (to_bfloat16(total) >> 16).to(tl.uint16), inside)
    elif KEEPS:
        storage = tl.load(table + 1).to(tl.pointer_type(tl.float32))
        tl.store(storage + (element - start), total, inside)


def edit_(edits: Sequence[Edit], virtual: bool) -> Tensor:
    """`merge.edit_` of slices that are not empty; nothing waits for the device."""
    device = edits[0].accumulator.device
    alike = defaultdict(list)  # of one kernel: it is compiled for each of these
    for one in edits:
        aligned = one.pair is None or one.pair.A.shape[1] % 4 == 0
        alike[one.storage.dtype, aligned, one.pair is not None, one.noise_scale != 0.0].append(one)
    squares = torch.zeros(2, dtype=torch.float64, device=device)
    for (dtype, aligned, merges, noises), group in alike.items():
        factors = factors_of(group)
        table = integers_of(group, factors.data_ptr())
        tiles = max(tiles_of(start, length, width) for _, _, _, _, start, length, _, width, *_ in table)
        integers = torch.tensor(table).to(device, non_blocking=True)
        numbers = torch.tensor([(one.scaling, one.noise_scale) for one in group], dtype=torch.float64)
        parts = torch.empty(len(group), tiles, 2, dtype=torch.float64, device=device)
        edit_tile[(tiles, len(group))](
            integers,
            numbers.to(device, non_blocking=True),
            parts,
            BFLOAT16=dtype == torch.bfloat16,
            ALIGNED=aligned,
            MERGES=merges,
            NOISES=noises,
            KEEPS=virtual,
            R=ROWS,
            C=COLUMNS,
            enable_fp_fusion=False,  # a fused multiply-add where none is written would round differently
        )
        if merges:
            squares += parts.view(-1, 2).sum(0)
    return squares


def integers_of(edits: Sequence[Edit], factors: int) -> list[tuple[int, ...]]:
    """Addresses of accumulator, storage, A, B; start, length, rank, width; seed, weight, last word of the counter.

    Args:
        factors: address of `factors_of`: conversions to float64 are slow on a GPU, and these are few.
    """
    table = []
    for one in edits:
        A = B = rank = seed = weight = purpose = 0
        width = COLUMNS  # without a pair any will do
        if one.pair is not None:
            rank, width = one.pair.A.shape
            A, B = factors, factors + 8 * rank * width
            factors = B + 8 * one.pair.B.numel()
        if one.stream is not None:
            seed, weight, purpose = one.stream.seed, one.stream.weight, 2 * one.stream.expert + one.stream.purpose
            seed -= (seed >> 63) << 64  # as an int64 of the same bits
        addresses = (one.accumulator.data_ptr(), one.storage.data_ptr(), A, B)
        table.append((*addresses, one.start, one.accumulator.numel(), rank, width, seed, weight, purpose))
    return table


def tiles_of(start: int, length: int, width: int) -> int:
    """How many tiles the rows of a slice take."""
    rows = (start + length - 1) // width - start // width + 1
    return triton.cdiv(rows, ROWS) * triton.cdiv(width, COLUMNS)
