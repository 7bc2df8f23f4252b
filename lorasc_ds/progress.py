"""How far a run is, and what of its plan is still to come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lorasc_ds.algorithm.plan import Expert, Plan
from lorasc_ds.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Progress:
    """`step` optimizer steps were taken; an evaluation that is due there comes next.

    `training`: inside an expert. `closing`: its last step was taken, its boundary has not begun. `merged`: it is
    closed, or no expert was opened yet.
    """

    step: int = 0
    phase: Literal["training", "closing", "merged"] = "merged"

    @classmethod
    def after(cls, step: int, expert: Expert) -> Progress:
        """Optimizer step `step` of `expert`, counted from 0, was taken."""
        return cls(step + 1, "training" if step + 1 < expert.stop else "closing")

    @property
    def name(self) -> str:
        """Of a checkpoint made here; names sort by age."""
        return f"step_{self.step:08d}_{self.phase}"

    def open_expert(self, plan: Plan) -> Expert | None:
        return None if self.phase == "merged" else plan.expert_at(self.step - 1)

    def remaining(self, plan: Plan) -> Iterator[Expert]:
        """The experts that are not closed; the first of them may be open."""
        closed = plan.experts if self.step == plan.steps else plan.expert_at(self.step).index - 1
        opened = self.open_expert(plan)
        return (plan.expert(index) for index in range(opened.index if opened else closed + 1, plan.experts + 1))


def check_plan(plan: Plan, progress: Progress, expert: int | None, closed: Sequence[tuple[int, int]]) -> None:
    """Whether a run that is so far can go on by a plan, which may have been overridden.

    Args:
        expert: the index of the one that is open.
        closed: the steps [start, stop) of those that are closed.

    Raises:
        ConfigError: in this plan, experts that have begun end elsewhere, or the run is over before.
    """
    fits = list(closed) == [(e.start, e.stop) for e in plan][: len(closed)] and progress.step <= plan.steps
    if fits and expert is not None:
        opened = plan.expert(expert) if expert <= plan.experts else None
        within = opened is not None and opened.start < progress.step <= opened.stop
        fits = opened is not None and within and progress == Progress.after(progress.step - 1, opened)
    if not fits:
        raise ConfigError(
            f"--resume_override training.epochs or training.max_steps: after it the experts of this run end after steps"
            f" {[e.stop for e in plan][:5]}, but until step {progress.step} they ended after"
            f" {[stop for _, stop in closed][:5]}: take so many epochs that no expert that has begun ends elsewhere"
        )
