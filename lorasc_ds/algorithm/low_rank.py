"""What a whole cascade adds to a weight, as one pair: exactly, of rank T·r, or the best of a smaller rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from lorasc_ds.algorithm.experts import Pair
from lorasc_ds.algorithm.spectrum import LowRankSum


def joined(pairs: Sequence[Pair]) -> Pair:
    """One pair whose B·A is the sum of those of `pairs`: `A (T·r, in)` and `B (out, T·r)`, with the same scaling."""
    return Pair(torch.cat([pair.A for pair in pairs]), torch.cat([pair.B for pair in pairs], dim=1))


def truncated(pair: Pair, scaling: float, rank: int) -> tuple[Pair, float]:
    """The pair of rank `rank` and scaling 1 that is closest to `D(A, B)` in the Frobenius norm (Eckart and Young).

    Out×in is never formed. In float64, rounded once to float32.

    Returns:
        the pair, of which each factor has the square roots of the singular values; and what it misses of D, in norm
        over that of D (0 where D is 0).
    """
    total = LowRankSum.zero(len(pair.B), pair.A.shape[1])
    total.add([pair], scaling)
    roots = total.values[:rank].sqrt()
    A, B = roots[:, None] * total.right[:, :rank].T, total.left[:, :rank] * roots
    norm, missed = float(total.values.norm()), float(total.values[rank:].norm())
    return Pair(A.float().contiguous(), B.float().contiguous()), missed / norm if norm > 0 else 0.0


def noise_norm(shape: tuple[int, int], noise_scales: Iterable[float]) -> float:
    """The Frobenius norm to expect of the noise of several experts on one weight: c is the width of a uniform draw."""
    return math.sqrt(math.prod(shape) * sum(c * c for c in noise_scales) / 12)
