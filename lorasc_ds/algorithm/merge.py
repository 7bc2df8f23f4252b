"""Noise and experts onto flat slices of weights, bit for bit the same however they are sliced and wherever computed.

A slice is `[start, start + len)` of the flattened row-major `W (out, in)`. It has an **accumulator** in
float32; the weight in use is the accumulator rounded once to its storage dtype, so that small experts
are not lost in bfloat16 (ten merges of 0.3 % each: relative error 0.18 instead of 0.47). A float32 weight
is its own accumulator.

The eager torch below is the reference. `compiled.py` (CPU) and `triton_kernels.py` (CUDA) do the same in one pass over
all slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorasc_ds.algorithm import compiled
from lorasc_ds.algorithm.experts import Pair
from lorasc_ds.algorithm.noise import Stream, uniform


class Edit(NamedTuple):
    """A slice of a weight, and what is added to it: first an expert, then noise. Either may be absent.

    Args:
        storage: the slice in use, (len,), float32 or bfloat16.
        accumulator: its float32 sums, (len,), on the same device; `storage` itself where that is float32.
        start: position of its first element in the flattened weight.
        pair: an expert, on that device: `D[i,j] = float32(s·Σ_k B[i,k]·A[k,j])`, the sum in float64, k
            ascending; added even where it is zero.
        scaling: `s`.
        stream: gives the noise `N[i,j] = (u - 0.5)·c` (eqs. 7 and 8).
        noise_scale: `c`, a float32 number; 0: no noise, and nothing is written for it.
    """

    storage: Tensor
    accumulator: Tensor
    start: int = 0
    pair: Pair | None = None
    scaling: float = 1.0
    stream: Stream | None = None
    noise_scale: float = 0.0

    @property
    def empty(self) -> bool:
        return self.accumulator.numel() == 0 or (self.pair is None and self.noise_scale == 0.0)


def edit_(edits: Sequence[Edit], *, virtual: bool = False) -> Tensor:
    """For every slice: accumulator <- accumulator + D + N, storage <- round(accumulator), in place, in one pass.

    Before, every weight in use is its accumulator rounded. A slice that nothing is added to stays as it is. There is at
    least one, and all are on one device.

    Args:
        virtual: only `storage` is written: the weights that an edit would ship. Undone by `round_into_`, never by
            subtracting; where storage and accumulator are one tensor, keep a copy of it first.

    Returns:
        float64 of (2,), on that device: Σ D² and Σ (D - change of `storage` by D)², over all slices:
        what was meant, and what rounding lost of it. The bits of the sums depend on the implementation, as those of
        the weights do not.
    """
    device = edits[0].accumulator.device
    edits = [one for one in edits if not one.empty]
    if not edits:
        return torch.zeros(2, dtype=torch.float64, device=device)
    if device.type == "cuda" and has_triton():
        from lorasc_ds.algorithm import triton_kernels

        return triton_kernels.edit_(edits, virtual)
    elements = sum(one.accumulator.numel() for one in edits)
    library = compiled.library() if device.type == "cpu" and compiled.pays(elements, len(edits)) else None
    return edit_eagerly_(edits, virtual) if library is None else compiled.edit_(library, edits, virtual)


def edit_through_host_(edits: Sequence[Edit], *, virtual: bool = False) -> Tensor:
    """`edit_` of weights whose accumulators are in host memory: computed there, and copied while the next one is."""
    squares = torch.zeros(2, dtype=torch.float64)
    for one in edits:
        if not one.empty:
            staged = torch.empty(one.storage.shape, dtype=one.storage.dtype, pin_memory=one.storage.is_cuda)
            pair = None if one.pair is None else one.pair.to(torch.device("cpu"))
            squares += edit_([one._replace(storage=staged, pair=pair)], virtual=virtual)
            one.storage.copy_(staged, non_blocking=True)  # torch keeps pinned memory until the copy is done
    return squares


def round_into_(storage: Tensor, accumulator: Tensor) -> None:
    """The weight in use: the accumulator rounded to nearest even in the storage dtype, in place."""
    if storage.data_ptr() != accumulator.data_ptr():
        storage.copy_(accumulator)


def has_triton() -> bool:
    """Whether torch found Triton, which comes with its CUDA builds."""
    from torch.utils._triton import has_triton_package

    return has_triton_package()


def edit_eagerly_(edits: Sequence[Edit], virtual: bool = False) -> Tensor:
    """`edit_` in eager torch, of slices that are not empty."""
    squares = torch.zeros(2, dtype=torch.float64, device=edits[0].accumulator.device)
    for one in edits:
        for first, last, delta in delta_chunks(one):
            part = slice(first - one.start, last - one.start)
            total = one.accumulator[part].clone()
            if delta is not None:
                before = total.to(one.storage.dtype, copy=True)
                # float32 + float32 rounds as the float64 sum rounded to float32 does: 53 >= 2·24 + 2 bits.
                total += delta
                change = total.to(one.storage.dtype).float() - before.float()
                squares[0] += delta.double().square_().sum()
                squares[1] += (delta - change).double().square_().sum()
            if one.noise_scale != 0.0:
                assert one.stream is not None
                # u - 0.5 has 24 bits and c is a float32: one float32 product rounds as the float64 product does.
                noise = uniform(one.stream, first, last, total.device).sub_(0.5).mul_(one.noise_scale)
                total += noise
            if not virtual:
                one.accumulator[part] = total
            one.storage[part] = total.to(one.storage.dtype)
    return squares


def delta_chunks(edit: Edit) -> Iterator[tuple[int, int, Tensor | None]]:
    """The slice a few rows at a time.

    A product of two float32 numbers is exact in float64, so the bits of `D` are the same with and without fused
    multiply-add; a matrix product is not used because it may sum in another order.

    Yields:
        (first element, last + 1, `D` of these as float32 or None where there is no expert).
    """
    stop = edit.start + len(edit.accumulator)
    # On a CPU a float64 chunk (256 KiB) stays in a core's cache; an accelerator wants few launches, but no
    # temporaries as large as the weight.
    size = 1 << (15 if edit.accumulator.device.type == "cpu" else 21)
    if edit.pair is None:
        for first in range(edit.start, stop, size):
            yield first, min(first + size, stop), None
        return
    A, B = edit.pair.A.detach().double(), edit.pair.B.detach().double()
    rank, width = A.shape
    rows = max(1, size // width)
    for row in range(edit.start // width, -(-stop // width), rows):
        sums = torch.zeros(min(rows, len(B) - row), width, dtype=torch.float64, device=A.device)
        for k in range(rank):
            sums.addcmul_(B[row : row + rows, k : k + 1], A[k])
        first, last = max(edit.start, row * width), min(stop, (row + len(sums)) * width)
        yield first, last, sums.mul_(edit.scaling).float().view(-1)[first - row * width : last - row * width]
