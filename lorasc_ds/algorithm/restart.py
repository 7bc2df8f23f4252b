"""The pairs that experts begin with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

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
    sizes_A = [rank * width for rank, (_, width) in zip(ranks, shapes, strict=True)]
    sizes_B = [out * rank for rank, (out, _) in zip(ranks, shapes, strict=True)]
    A, B = (torch.zeros(sum(sizes), device=device).split(sizes) for sizes in (sizes_A, sizes_B))
    # (2u - 1)·b = (u - 0.5)·2b, to the bit: noise of width 2b on nothing.
    doubled = {
        width: 2.0 * torch.tensor(1.0 / math.sqrt(width), dtype=torch.float32).item()
        for width in {width for _, width in shapes}
    }
    widths = [doubled[width] for _, width in shapes]
    edit_([Edit(flat, flat, stream=s, noise_scale=c) for flat, s, c in zip(A, streams, widths, strict=True)])
    rows = zip(A, B, ranks, shapes, strict=True)
    return [Pair(a.view(rank, width), b.view(out, rank)) for a, b, rank, (out, width) in rows]
