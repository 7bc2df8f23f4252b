"""When experts begin and end, and the learning rate of every step, as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Expert:
    """Expert `index` (from 1) trains on the optimizer steps [start, stop), counted from 0 over the run."""

    index: int
    start: int
    stop: int

    @property
    def steps(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Plan:
    """`experts` experts over `steps` optimizer steps.

    Expert k closes after step ⌊k·steps/experts⌋, so experts need not be whole epochs (2 experts in 5
    epochs) and may be as short as one step (the paper's 1250).

    Raises:
        ValueError: unless 1 <= experts <= steps.
    """

    steps: int
    experts: int

    def __post_init__(self) -> None:
        if not 1 <= self.experts <= self.steps:
            raise ValueError(
                f"experts must be between 1 and the number of optimizer steps ({self.steps}), got {self.experts}"
            )

    def expert(self, index: int) -> Expert:
        return Expert(index, (index - 1) * self.steps // self.experts, index * self.steps // self.experts)

    def __iter__(self) -> Iterator[Expert]:
        return (self.expert(index) for index in range(1, self.experts + 1))


def linear(progress: float) -> float:
    return 1.0 - progress


def cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def constant(progress: float) -> float:
    return 1.0


DECAYS: dict[str, Callable[[float], float]] = {"linear": linear, "cosine": cosine, "constant": constant}


def learning_rate_factor(schedule: str, step: int, steps: int, warmup_steps: int = 0) -> float:
    """What the learning rate is multiplied by at `step` (from 0) of a schedule of `steps` steps.

    Warm-up rises as (step+1)/warmup_steps, then the decay runs from 1 towards 0, which it would reach
    at `steps`: on a step that is taken the factor is never 0.

    Args:
        schedule: `linear`, `cosine` or `constant`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return DECAYS[schedule]((step - warmup_steps) / (steps - warmup_steps))


def compressed_warmup(warmup_steps: int, steps: int, run_steps: int) -> int:
    """The warm-up of a schedule of `steps` steps where the run's is `warmup_steps`: the same share, rounded up."""
    return math.ceil(warmup_steps * steps / run_steps)
