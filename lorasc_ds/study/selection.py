"""Which point of a grid a row is reported at. Only what was measured on dev gets in here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TypeVar

Point = TypeVar("Point")
Dev = Mapping[str, float]  # metric -> value on dev
LOWER_IS_BETTER = ("loss", "perplexity", "mce")


def lower_is_better(score: str) -> bool:
    """Whether less of `METRIC`, `SPLIT/METRIC`, or a difference of two of them, is better."""
    return score.split(" - ")[0].rpartition("/")[2] in LOWER_IS_BETTER


def choose(grid: Mapping[Point, Sequence[Dev | None]], metric: str) -> Point | None:
    """The point with the best mean over the seeds; of equals that with the lower mean dev loss, then the first.

    Args:
        grid: point -> what every seed has on dev; None: the run failed, or is not there.

    Returns:
        None where no point has all its seeds. A point with a run that failed is not chosen: a mean over the rest
        would leave out just the seeds that went wrong.
    """

    def badness(seeds: Sequence[Dev]) -> tuple[float, float]:
        value = fmean(dev[metric] for dev in seeds) * (1 if lower_is_better(metric) else -1)
        loss = fmean(dev["loss"] for dev in seeds)
        return (value, loss) if math.isfinite(value) else (math.inf, math.inf)

    whole = {
        point: [dev for dev in seeds if dev is not None] for point, seeds in grid.items() if seeds and None not in seeds
    }
    return min(whole, key=lambda point: badness(whole[point]), default=None)
