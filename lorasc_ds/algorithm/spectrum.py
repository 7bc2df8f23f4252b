"""How much room a cascade really uses: singular values and ranks of a sum of pairs, without forming it.

After k experts the total update `Σ s·B·A` is a matrix (out, in) of rank k·r at most. Everything here is float64
on the CPU and works on the factors: the cost is that of matrices (out + in, k·r), and never more than
(out + in, min(out, in)) of them are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lorasc_ds.algorithm.experts import Pair

NEGLIGIBLE = 1e-6  # of the largest singular value: below it there is only the rounding of float32 pairs


@dataclass(slots=True)
class LowRankSum:
    """A sum of pairs as its singular value decomposition: `left · diag(values) · rightᵀ`.

    Args:
        left: (out, p), orthonormal columns, with p the least of out, in and the ranks added so far.
        values: (p,), descending.
        right: (in, p), orthonormal columns.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def zero(cls, out_features: int, in_features: int) -> LowRankSum:
        sizes = ((out_features, 0), (0,), (in_features, 0))
        return cls(*(torch.zeros(size, dtype=torch.float64) for size in sizes))

    def add(self, pairs: Sequence[Pair], scaling: float) -> None:
        """Add `Σ s·B·A` of pairs.

        The factors side by side, [left·values, s·B …] and [right, Aᵀ …], are each made orthonormal (QR); what is
        left between the two bases is a small matrix, and its decomposition is that of the sum.
        """
        columns = torch.cat([self.left * self.values, *(scaling * pair.B.detach().cpu().double() for pair in pairs)], 1)
        rows = torch.cat([self.right, *(pair.A.detach().cpu().double().T for pair in pairs)], 1)
        # A QR is at most square: where there are more columns than out (or in), the basis spans everything already.
        left, core_left = torch.linalg.qr(columns)
        right, core_right = torch.linalg.qr(rows)
        inner_left, self.values, inner_right = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
        self.left, self.right = left @ inner_left, right @ inner_right.T


class Ranks(NamedTuple):
    """Three answers to how many directions a matrix uses; all 0 for the zero matrix.

    effective: exp of the entropy of the singular values over their sum (Roy and Vetterli, 2007); n equal ones give n.
    stable: sum of their squares over the largest square; a few large ones keep it small.
    numerical: how many are above `NEGLIGIBLE` of the largest.
    """

    effective: float
    stable: float
    numerical: int


def ranks(values: Tensor) -> Ranks:
    """Of the singular values (p,), float64, in any order."""
    if not values.any():
        return Ranks(0.0, 0.0, 0)
    share = values / values.sum()
    largest = values.max()
    return Ranks(
        effective=float(torch.special.entr(share).sum().exp()),
        stable=float((values / largest).square().sum()),
        numerical=int((values > NEGLIGIBLE * largest).sum()),
    )


def subspace_overlap(one: Tensor, other: Tensor) -> float:
    """How much of the columns' span of two matrices is shared: the mean squared cosine of their principal angles.

    1 where the smaller span lies in the other, 0 where they are orthogonal or one is zero; two random spans of
    dimension r in n have r/n.

    Args:
        one, other: (n, r) each, r may differ.
    """
    first, second = orthonormal(one), orthonormal(other)
    smaller = min(first.shape[1], second.shape[1])
    return float((first.T @ second).square().sum()) / smaller if smaller else 0.0


def orthonormal(matrix: Tensor) -> Tensor:
    """A basis (n, rank) of the columns' span."""
    left, values, _ = torch.linalg.svd(matrix.detach().cpu().double(), full_matrices=False)
    return left[:, values > NEGLIGIBLE * values.max()]
