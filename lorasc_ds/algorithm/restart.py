"""The pairs that experts begin with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lorasc_ds.algorithm.experts import Pair
from lorasc_ds.algorithm.merge import Edit, edit_
from lorasc_ds.algorithm.noise import Stream


def fresh_pairs(
    streams: Sequence[Stream],
    shapes: Sequence[tuple[int, int]],
    ranks: Sequence[int],
    device: torch.device | str = "cpu",
) -> list[Pair]:
    """New experts: `A` as kaiming_uniform(a=√5) draws it, uniform in ±1/√in, and `B = 0`.

    The numbers come from `streams`, so that every rank and every replay draws the same.

    Args:
        shapes: (out, in) of every weight.
    """
    A = parts([rank * width for rank, (_, width) in zip(ranks, shapes, strict=True)], device)
    B = parts([out * rank for rank, (out, _) in zip(ranks, shapes, strict=True)], device)
    # (2u - 1)·b = (u - 0.5)·2b, to the bit: noise of width 2b on nothing.
    widths = [2.0 * torch.tensor(1.0 / math.sqrt(width), dtype=torch.float32).item() for _, width in shapes]
    edit_([Edit(flat, flat, stream=s, noise_scale=c) for flat, s, c in zip(A, streams, widths, strict=True)])
    rows = zip(A, B, ranks, shapes, strict=True)
    return [Pair(a.view(rank, width), b.view(out, rank)) for a, b, rank, (out, width) in rows]


def parts(sizes: Sequence[int], device: torch.device | str) -> list[Tensor]:
    """Zeros of these sizes, cut from one tensor."""
    edges = torch.tensor([0, *sizes]).cumsum(0).tolist()
    whole = torch.zeros(edges[-1], device=device)
    return [whole[first:last] for first, last in pairwise(edges)]
