"""What the live parts of a run tell its record: an opening, a step, a closing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from lorasc_ds.tasks import Scores


def shown(metric: str, value: float) -> str:
    """A score as people read it: losses and perplexities as they are, all else in percent."""
    return f"{value:.3f}" if metric in ("loss", "perplexity") else f"{100 * value:.1f}"


@dataclass(frozen=True, slots=True)
class Opening:
    """What opening an expert did.

    Args:
        noise_intensity: λ as used; 0 without noise.
        noise_losses: dev loss of every candidate for λ, where there are several.
        noise_scale: c by name; 0 without noise.
        noise_norm: expected Frobenius norm of the noise on all adapted weights.
        noise_change: change of the probe's logits by the noise, as `relative_change`.
        pruned: share of the moments' elements that are zero after pruning, read back; None where nothing is pruned.
        choosing_seconds: of `seconds`, spent on candidates; None where there are none.
        seconds: wall time, probes included.
    """

    noise_intensity: float
    noise_losses: dict[float, float]
    noise_scale: dict[str, float]
    noise_norm: float
    noise_change: float | None
    pruned: float | None
    choosing_seconds: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Closing:
    """What closing an expert did, over all adapted weights.

    Args:
        slow_retention: α as used.
        retention_losses: dev loss of every candidate for α, where there are several.
        norm: Frobenius norm of what was merged, D(slow).
        std: its standard deviation, by name.
        overlap: cosine between D(slow) and the D(slow) merged before; None at the first expert.
        lost: share of D(slow), in norm, that the weights in use do not show, by rounding.
        averaging_change: change of the probe's logits as fast becomes slow; 0 with α = 0; None without the checks of
            `cascade.check_boundaries`.
        drift: change of the probe's logits by the merge alone; bounded; None likewise.
        choosing_seconds: of `seconds`, spent on candidates; None where there are none.
        seconds: wall time, probes included.
    """

    slow_retention: float
    retention_losses: dict[float, float]
    norm: float
    std: dict[str, float]
    overlap: float | None
    lost: float
    averaging_change: float | None
    drift: float | None
    choosing_seconds: float | None
    seconds: float


class StepReport(NamedTuple):
    """An optimizer step.

    Args:
        loss: mean loss of the global batch.
        grad_norm: of the gradient before clipping.
        tokens: read; of a task on the classes of images, these.
        seconds: wall time.
        examples: ids of the global batch.
        asked_to_stop: whether any process was.
        unreadable: what is wrong with examples that were left out, a line each.
    """

    loss: float
    grad_norm: float
    tokens: int
    seconds: float
    examples: tuple[str, ...]
    asked_to_stop: bool
    unreadable: tuple[str, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether the step could be taken."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def results_table(before: Scores, after: Scores) -> str:
    """Every split and metric before and after training."""
    rows = [
        (split, metric, shown(metric, before[split][metric]), shown(metric, after[split][metric]))
        for split in after
        for metric in after[split]
    ]
    head = ("split", "metric", "before", "after")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(4)]
    lines = [
        f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in (head, *rows)
    ]
    return "\n".join(lines)
