"""When experts begin and end, and the learning rate of every step, as pure functions of the step."""

from __future__ import annotations

import math
from bisect import bisect_right
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
    epochs) and may be as short as one step (the paper's 1250). With an `interval` (ReLoRA's) it closes
    after step k·interval, and the last one where the run ends.

    Raises:
        ValueError: unless 1 <= experts <= steps, and with an interval the experts are those it makes.
    """

    steps: int
    experts: int
    interval: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.experts <= self.steps:
            raise ValueError(
                f"experts must be between 1 and the number of optimizer steps ({self.steps}), got {self.experts}"
            )
        if self.interval is not None and self.experts != math.ceil(self.steps / self.interval):
            raise ValueError(f"{self.steps} steps are not {self.experts} experts of {self.interval}")

    def stop(self, index: int) -> int:
        """After how many optimizer steps expert `index` closes; 0 for the 0th."""
        return min(index * self.interval, self.steps) if self.interval else index * self.steps // self.experts

    def expert(self, index: int) -> Expert:
        return Expert(index, self.stop(index - 1), self.stop(index))

    def expert_at(self, step: int) -> Expert:
        """The one that trains on optimizer step `step` of the run."""
        return self.expert(1 + bisect_right(range(1, self.experts + 1), step, key=self.stop))

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


@dataclass(frozen=True, slots=True)
class Schedule:
    """The learning rate over a run and its experts.

    Args:
        decay: `linear`, `cosine` or `constant`.
        span: `run`: one schedule over the run; `expert`: it starts again, compressed, with every expert; `jagged`
            (ReLoRA): as `run`, but after a restart the rate first warms up again.
        warmup_steps: of the run; `expert` compresses them too.
        rewarmup_steps: of every expert but the first, with `jagged`; None: a tenth of the expert's steps.
    """

    decay: str
    span: str
    warmup_steps: int = 0
    rewarmup_steps: int | None = None

    def factor(self, plan: Plan, expert: Expert, step: int) -> float:
        """What the learning rate is multiplied by at optimizer step `step` of the run, which lies in `expert`."""
        if self.span == "expert":
            warmup = compressed_warmup(self.warmup_steps, expert.steps, plan.steps)
            return learning_rate_factor(self.decay, step - expert.start, expert.steps, warmup)
        rewarmup = self.rewarmup(expert)
        done = step - expert.start
        if done < rewarmup:  # up to what the schedule has when the warm-up is over
            return (done + 1) / rewarmup * self.factor_of_run(plan, expert.start + rewarmup)
        return self.factor_of_run(plan, step)

    def rewarmup(self, expert: Expert) -> int:
        """Steps of `expert` in which the rate warms up again."""
        if self.span != "jagged" or expert.index == 1:
            return 0
        wanted = math.ceil(expert.steps / 10) if self.rewarmup_steps is None else self.rewarmup_steps
        return min(wanted, expert.steps - 1)  # the last expert may be shorter than the warm-up

    def factor_of_run(self, plan: Plan, step: int) -> float:
        return learning_rate_factor(self.decay, step, plan.steps, self.warmup_steps)
