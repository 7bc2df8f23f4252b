"""Whether a row differs from its baseline, paired over seeds and over examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

TEST = (
    "paired t-tests (scipy.stats.ttest_1samp on differences to the baseline's row), two-sided: one over the seeds, one"
    " over the examples with their differences averaged over the seeds (a sign test where all differences are equal);"
    " the larger of the two p counts, so that a difference has to hold for other seeds and for other examples;"
    " corrected by Holm over all comparisons of the study"
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A row against its baseline.

    Args:
        difference: of the means over the seeds.
        p_seeds, p_examples: of the two tests; None: fewer than two seeds, or a score that is not a mean over examples
            that are the same on both sides, or one that is not finite.
        p: the larger of them; None where there is no test over the seeds.
    """

    difference: float
    p_seeds: float | None
    p_examples: float | None
    p: float | None


def compare(
    scores: Sequence[float],
    baseline: Sequence[float],
    outcomes: Sequence[Mapping[str, float] | None],
    outcomes_of_baseline: Sequence[Mapping[str, float] | None],
) -> Comparison:
    """
    Args:
        scores, baseline: one for every seed, the same seeds in the same order.
        outcomes, outcomes_of_baseline: for every seed, example -> metric.
    """
    by_seed = [ours - theirs for ours, theirs in zip(scores, baseline, strict=True)]
    by_example: dict[str, list[float]] = {}
    for ours, theirs in zip(outcomes, outcomes_of_baseline, strict=True):
        if ours is None or theirs is None or ours.keys() != theirs.keys():
            by_example.clear()
            break
        for example, outcome in ours.items():
            by_example.setdefault(example, []).append(outcome - theirs[example])
    p_seeds, p_examples = p_of(by_seed), p_of([fmean(by_example[example]) for example in sorted(by_example)])
    p = None if p_seeds is None else max(p_seeds, p_examples or 0.0)
    return Comparison(fmean(by_seed), p_seeds, p_examples, p)


def p_of(differences: Sequence[float]) -> float | None:
    """Two-sided, of the one-sample t-test that the mean is 0; of the sign test where all are equal.

    None for fewer than two, and where one is not finite.
    """
    from scipy.stats import ttest_1samp  # takes a second to import

    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return None
    if len({round(one, 12) for one in differences}) == 1:  # t has no spread to go by, but the signs have
        return 2.0 ** (1 - len(differences)) if round(differences[0], 12) else 1.0
    result: Any = ttest_1samp(differences, 0.0)  # scipy declares no pvalue
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p, each to be compared with the level: the probability of one false finding among all is kept."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[at]))
        adjusted[at] = highest
    return adjusted
