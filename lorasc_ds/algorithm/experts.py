"""The expert: a LoRA pair, fresh, averaged, measured. Pure functions on float32 pairs.

Shapes are PEFT's: `A (rank, in)`, `B (out, rank)`, `W (out, in)`, and the change a pair makes to a weight
is `D(A, B) = s·B·A` with the scaling `s`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lorasc_ds.algorithm.noise import Stream, uniform


class Pair(NamedTuple):
    """A LoRA pair in float32: `A (rank, in)`, `B (out, rank)`."""

    A: Tensor
    B: Tensor

    def to(self, device: torch.device) -> Pair:
        return Pair(self.A.to(device), self.B.to(device))


def fresh_pair(stream: Stream, out_features: int, in_features: int, rank: int) -> Pair:
    """A new expert: `A` as kaiming_uniform(a=√5) draws it, uniform in ±1/√in, and `B = 0`.

    The numbers come from `stream`, so that every rank and every replay draws the same.
    """
    # 2u - 1 has 24 bits: exact in float32, so that one float32 product rounds once, as in float64.
    bound = torch.tensor(1.0 / math.sqrt(in_features), dtype=torch.float32)
    symmetric = uniform(stream, rank * in_features).mul_(2.0).sub_(1.0)
    return Pair(symmetric.mul_(bound).view(rank, in_features), torch.zeros(out_features, rank))


def slow_update(slow: Pair, fast: Pair, slow_retention: float) -> Pair:
    """slow <- α·slow + (1-α)·fast, for A and B each, not for their product (eqs. 10 and 11).

    α and 1-α are rounded to float32; the sum is taken in float64 and rounded once.
    """
    keep = torch.tensor(slow_retention, dtype=torch.float32).double()
    take = (1.0 - keep).float().double()

    def average(slow_factor: Tensor, fast_factor: Tensor) -> Tensor:
        device = slow_factor.device
        total = keep.to(device) * slow_factor.double() + take.to(device) * fast_factor.double()
        return total.float()

    return Pair(average(slow.A, fast.A), average(slow.B, fast.B))


class DeltaStatistics(NamedTuple):
    """Of the out·in entries of `D = s·B·A`: their mean, standard deviation and root of the sum of squares."""

    mean: float
    std: float
    norm: float


def delta_statistics(pair: Pair, scaling: float) -> DeltaStatistics:
    """Mean, std and Frobenius norm of `D(A, B)` from Gram matrices in float64, without forming the product.

    With a = the row means of A, b = the column means of B, A' and B' what is left of them,
    `B·A = (b·a) + 1·(b·A') + (B'·a)·1ᵀ + B'·A'` has four orthogonal terms, so the variance is a sum of
    squares. It equals E[x²] - mean² with E[x²] = sum(BᵀB ∘ AAᵀ)/(out·in) and loses no digits where the
    mean is large.
    """
    A, B = pair.A.detach().double().cpu(), pair.B.detach().double().cpu()
    out_features, in_features = B.shape[0], A.shape[1]
    a, b = A.mean(dim=1), B.mean(dim=0)
    centred_A, centred_B = A - a[:, None], B - b
    mean = float(b @ a)
    variance = float(
        (b @ centred_A).square().sum() / in_features
        + (centred_B @ a).square().sum() / out_features
        + ((centred_B.T @ centred_B) * (centred_A @ centred_A.T)).sum() / (out_features * in_features)
    )
    variance = max(0.0, variance)
    norm = math.sqrt(out_features * in_features * (variance + mean * mean))
    return DeltaStatistics(scaling * mean, scaling * math.sqrt(variance), scaling * norm)


def std_of_delta(pair: Pair, scaling: float) -> float:
    """The standard deviation over all out·in entries of `D(A, B)` (eq. 8 needs it)."""
    return delta_statistics(pair, scaling).std


def std_of_matrix(weight: Tensor) -> float:
    """The standard deviation over all entries of a weight (for NoisyTune): float64 sums of rows, rows ascending."""
    total = square = 0.0
    for first in range(0, len(weight), 1024):
        rows = weight[first : first + 1024].detach().cpu().double()
        for row_total, row_square in zip(rows.sum(1).tolist(), rows.square().sum(1).tolist(), strict=True):
            total += row_total
            square += row_square
    mean = total / weight.numel()
    return math.sqrt(max(0.0, square / weight.numel() - mean * mean))


def noise_scale(std: float, noise_intensity: float) -> float:
    """c = float32(λ·std): the width of the noise (eqs. 7 and 8), with `std_of_delta` or `std_of_matrix`."""
    return torch.tensor(noise_intensity * std, dtype=torch.float32).item()


def gradient_projection(A: Tensor, scaling: float) -> Tensor:
    """LoRA-FA's (AAᵀ)⁻¹/s² (arXiv 2308.03303): the gradient of `B` times it moves W as full fine-tuning would, at best.

    Args:
        A: (rank, in), as drawn.

    Returns:
        float32 of (rank, rank), on A's device; computed in float64.
    """
    gram = A.detach().cpu().double() @ A.detach().cpu().double().T
    regular = gram + 1e-8 * torch.eye(len(gram), dtype=torch.float64)
    # LAPACK leaves columns together; row-major, a matrix product has the same bits wherever it is taken.
    return (torch.linalg.inv(regular) / scaling**2).float().contiguous().to(A.device)


def delta_inner_product(one: Pair, other: Pair, scaling: float) -> float:
    """⟨D(one), D(other)⟩ over all entries, from r×r products in float64, without forming either."""
    left = one.B.detach().double().cpu().T @ other.B.detach().double().cpu()
    right = one.A.detach().double().cpu() @ other.A.detach().double().cpu().T
    return scaling * scaling * float((left * right).sum())
