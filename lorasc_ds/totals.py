"""What a run has spent and left out so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(slots=True)
class Totals:
    """Counts on from where a checkpoint was written.

    Args:
        seconds, tokens: of all optimizer steps; of a task on the classes of images, tokens are images.
        boundary_seconds: of every expert, its opening and its closing together.
        choosing_seconds: of them, spent on candidates for α and λ.
        checkpoint_seconds: of all checkpoints.
        skipped: steps that were left out.
        unreadable: examples that were.
    """

    seconds: float = 0.0
    tokens: int = 0
    boundary_seconds: list[float] = field(default_factory=list)
    choosing_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    skipped: int = 0
    unreadable: int = 0

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Totals:
        """As a checkpoint has them; what a run of an earlier version did not count is 0."""
        return cls(**{one.name: state[one.name] for one in fields(cls) if one.name in state})

    def timing(self, counted: str) -> dict[str, Any]:
        """Seconds of all steps, of each boundary and of all checkpoints, and what was read per second of steps."""
        return {
            "train_seconds": self.seconds,
            "boundary_seconds": self.boundary_seconds,
            "checkpoint_seconds": self.checkpoint_seconds,
            f"{counted}_per_second": self.tokens / self.seconds,
        }

    def choosing(self, examples: int) -> dict[str, float]:
        """What it cost to choose α and λ on `examples` dev examples; `share` is of the training."""
        share = self.choosing_seconds / (self.seconds + sum(self.boundary_seconds))
        return {"examples": examples, "seconds": self.choosing_seconds, "share": share}
