"""How much room the experts of a ledger use: every weight after every expert, measured from the pairs alone.

With DoRA all of it is about the directions, which are what is cascaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from lorasc_ds.algorithm.experts import Pair, delta_inner_products, delta_statistics, noise_norm
from lorasc_ds.algorithm.ledger import Ledger, read_pair
from lorasc_ds.algorithm.spectrum import LowRankSum, ranks, subspace_overlap

ROWS = 50  # experts that are shown; of more, as many at even distances


@dataclass(frozen=True, slots=True)
class Row:
    """A weight after an expert; or a mean of such over weights. Norms are Frobenius norms.

    Args:
        expert: index, from 1.
        bound: the rank that the total update can have at most.
        norm: of D(slow), what this expert merged.
        total_norm: of the total update, the sum of the D's so far.
        effective_rank, stable_rank, numerical_rank: of the total update, see `spectrum.Ranks`.
        overlap: cosine between D(slow) and that of the expert before; None for the first.
        column_overlap, row_overlap: shared part of their column (row) spaces, see `subspace_overlap`.
        noise: expected norm of the noise before this expert over `norm`.
        total_noise: that of all noise so far over `total_norm`.
        singular_values: of the total update, descending.
    """

    expert: int
    bound: float
    norm: float
    total_norm: float
    effective_rank: float
    stable_rank: float
    numerical_rank: float
    overlap: float | None
    column_overlap: float | None
    row_overlap: float | None
    noise: float
    total_noise: float
    singular_values: list[float]


def over(part: float, whole: float) -> float:
    """A ratio; 0 where there is nothing to compare with."""
    return part / whole if whole > 0 else 0.0


def inspect_weight(ledger: Ledger, name: str, files: dict[int, Any], shown: Sequence[int]) -> list[Row]:
    """The rows of one weight.

    Args:
        files: the open file of every expert, by index, ascending.
        shown: the experts that get a row.
    """
    scaling, rows = ledger.adapter.scaling, []
    total: LowRankSum | None = None
    before: Pair | None = None
    waiting: list[Pair] = []
    noise_squares, rank_sum = 0.0, 0
    for index, file in files.items():
        pair = read_pair(file, name)
        shape = (pair.B.shape[0], pair.A.shape[1])
        waiting.append(pair)
        rank_sum += len(pair.A)
        noise = noise_norm(ledger.experts[index - 1].noise_scale[name], shape)
        noise_squares += noise * noise
        if index in shown:
            total = total or LowRankSum.zero(*shape)
            total.add(waiting, scaling)
            waiting.clear()
            norm, total_norm = delta_statistics([pair], [scaling])[0].norm, float(total.values.norm())
            found, overlaps = ranks(total.values), (None, None, None)
            if before is not None:
                norms = norm * delta_statistics([before], [scaling])[0].norm
                overlaps = (
                    over(delta_inner_products([pair], [before], [scaling])[0], norms),
                    subspace_overlap(pair.B, before.B),
                    subspace_overlap(pair.A.T, before.A.T),
                )
            row = Row(
                expert=index,
                bound=min(rank_sum, *shape),
                norm=norm,
                total_norm=total_norm,
                effective_rank=found.effective,
                stable_rank=found.stable,
                numerical_rank=found.numerical,
                overlap=overlaps[0],
                column_overlap=overlaps[1],
                row_overlap=overlaps[2],
                noise=over(noise, norm),
                total_noise=over(math.sqrt(noise_squares), total_norm),
                singular_values=total.values.tolist(),
            )
            rows.append(row)
        before = pair
    return rows


def mean_row(rows: Sequence[Row]) -> Row:
    """Every number's mean over the weights; a weight with fewer singular values than another has zeros for the rest."""
    length = max(len(row.singular_values) for row in rows)
    spectra = [row.singular_values + [0.0] * (length - len(row.singular_values)) for row in rows]
    numbers: dict[str, Any] = {
        key: None if value is None else fmean(getattr(row, key) for row in rows)
        for key, value in asdict(rows[0]).items()
        if key not in ("expert", "singular_values")
    }
    return Row(
        expert=rows[0].expert, singular_values=[fmean(values) for values in zip(*spectra, strict=True)], **numbers
    )


def inspect(ledger: Ledger, experts: int) -> dict[str, list[Row]]:
    """The rows of every weight over the first `experts` experts; of a compacted ledger, from the snapshot's last on."""
    first = max(1, ledger.compacted)
    count = experts - first + 1
    shown = {first, *(first + math.ceil(count * part / ROWS) - 1 for part in range(1, ROWS + 1))}
    with ExitStack() as stack:
        files = {index: stack.enter_context(ledger.expert_file(index)) for index in range(first, experts + 1)}
        return {name: inspect_weight(ledger, name, files, sorted(shown)) for name in ledger.weights}
