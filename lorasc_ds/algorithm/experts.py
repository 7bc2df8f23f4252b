"""The expert: a LoRA pair, averaged and measured. Pure functions on float32 pairs.

Shapes are PEFT's: `A (rank, in)`, `B (out, rank)`, `W (out, in)`, and the change a pair makes to a weight
is `D(A, B) = s·B·A` with the scaling `s`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """A LoRA pair in float32: `A (rank, in)`, `B (out, rank)`."""

    A: Tensor
    B: Tensor

    def to(self, device: torch.device) -> Pair:
        return self if self.A.device == device else Pair(self.A.to(device), self.B.to(device))


def slow_updates(slow: Sequence[Pair], fast: Sequence[Pair], slow_retention: float) -> list[Pair]:
    """slow <- α·slow + (1-α)·fast, for A and B each, not for their product (eqs. 10 and 11).

    α and 1-α are rounded to float32; the sum is taken in float64 and rounded once.
    """
    keep = torch.tensor(slow_retention, dtype=torch.float32).double().item()
    take = torch.tensor(1.0 - keep, dtype=torch.float32).double().item()
    average = flat(slow).double().mul_(keep).add_(flat(fast).double().mul_(take)).float()
    factors = iter(average.split([factor.numel() for pair in fast for factor in pair]))
    return [Pair(next(factors).view(pair.A.shape), next(factors).view(pair.B.shape)) for pair in fast]


def flat(pairs: Sequence[Pair]) -> Tensor:
    """All factors end to end."""
    return torch.cat([factor.detach().reshape(-1) for pair in pairs for factor in pair])


class DeltaStatistics(NamedTuple):
    """Of the out·in entries of `D = s·B·A`: their mean, standard deviation and root of the sum of squares."""

    mean: float
    std: float
    norm: float


def delta_statistics(pairs: Sequence[Pair], scalings: Sequence[float]) -> list[DeltaStatistics]:
    """Mean, std and Frobenius norm of every `D(A, B)` from Gram matrices in float64, without forming the products.

    With a = the row means of A, b = the column means of B, A' and B' what is left of them,
    `B·A = (b·a) + 1·(b·A') + (B'·a)·1ᵀ + B'·A'` has four orthogonal terms, so the variance is a sum of
    squares. It equals E[x²] - mean² with E[x²] = sum(BᵀB ∘ AAᵀ)/(out·in) and loses no digits where the
    mean is large. Computed on the CPU, pairs of one shape together.
    """
    found: dict[int, DeltaStatistics] = {}
    for places in alike(pairs):
        A, B = stacked(pairs, places)
        out_features, in_features = B.shape[1], A.shape[2]
        a, b = A.mean(dim=2, keepdim=True), B.mean(dim=1, keepdim=True)
        centred_A, centred_B = A - a, B - b
        mean = (b @ a).flatten()
        variance = (
            (b @ centred_A).square().sum((1, 2)) / in_features
            + (centred_B @ a).square().sum((1, 2)) / out_features
            + ((centred_B.mT @ centred_B) * (centred_A @ centred_A.mT)).sum((1, 2)) / (out_features * in_features)
        ).clamp_(min=0.0)
        norm = (out_features * in_features * (variance + mean * mean)).sqrt()
        of_each = torch.stack([mean, variance.sqrt(), norm], dim=1).tolist()
        found |= {
            place: DeltaStatistics(*(scalings[place] * value for value in values))
            for place, values in zip(places, of_each, strict=True)
        }
    return [found[place] for place in range(len(pairs))]


def alike(pairs: Sequence[Pair]) -> list[list[int]]:
    """Positions of the pairs, those of one shape together."""
    places = defaultdict(list)
    for place, pair in enumerate(pairs):
        places[pair.A.shape, pair.B.shape].append(place)
    return list(places.values())


def stacked(pairs: Sequence[Pair], places: Sequence[int]) -> Pair:
    """`A (n, rank, in)` and `B (n, out, rank)` of n pairs of one shape, float64, on the CPU."""
    A, B = (torch.stack([pairs[place][part].detach() for place in places]) for part in (0, 1))
    return Pair(A.cpu().double(), B.cpu().double())


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
    """c = float32(λ·std): the width of the noise (eqs. 7 and 8), from `delta_statistics` or `std_of_matrix`."""
    return torch.tensor(noise_intensity * std, dtype=torch.float32).item()


def noise_norm(noise_scale: float, shape: tuple[int, int]) -> float:
    """Expected Frobenius norm (root of the mean square) of noise that is uniform over a width of c: c·√(out·in/12)."""
    return noise_scale * math.sqrt(shape[0] * shape[1] / 12)


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


def delta_inner_products(one: Sequence[Pair], other: Sequence[Pair], scalings: Sequence[float]) -> list[float]:
    """⟨D(one), D(other)⟩ over all entries, for every two of one weight, from r×r products in float64."""
    products = torch.empty(len(one), dtype=torch.float64)
    for places in alike(one):
        first, second = stacked(one, places), stacked(other, places)
        inner = (first.B.mT @ second.B) * (first.A @ second.A.mT)
        products[places] = inner.sum((1, 2))
    return [s * s * product for s, product in zip(scalings, products.tolist(), strict=True)]
