"""From the configuration to the plain numbers of a cascade: when experts end, the rates, what a boundary does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lorasc_ds.algorithm.plan import Plan, Schedule
from lorasc_ds.config import STRATEGIES, CascadeConfig
from lorasc_ds.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Pruning:
    """ReLoRA's partial reset: the share of elements that lose their moments, and which (`cascade.prune_method`)."""

    method: Literal["magnitude", "random", "full"]
    fraction: float


@dataclass(frozen=True, slots=True)
class Method:
    """What a boundary does, as numbers; made from a row of `STRATEGIES`.

    Args:
        slow_retention: α; several are candidates, of which each boundary takes the one with the lowest dev loss.
        noise_intensity: λ, likewise.
        noise: `none`, `once` before the first expert, or before `every` expert but the first.
        noise_on: `adapted` weights, or `all` matrices.
        pruning: of the optimizer's moments; None: they are emptied, with the step counts.
    """

    strategy: str
    slow_retention: tuple[float, ...]
    noise_intensity: tuple[float, ...]
    noise: Literal["none", "once", "every"]
    noise_on: Literal["adapted", "all"]
    pruning: Pruning | None

    def noises(self, expert: int) -> bool:
        """Whether noise is drawn before expert `expert`."""
        return (expert == 1) == (self.noise == "once") and self.noise != "none" and self.noise_intensity != (0.0,)

    @property
    def candidates(self) -> int:
        """How many values a boundary tries on the dev examples."""
        return sum(len(values) for values in (self.slow_retention, self.noise_intensity) if len(values) > 1)


def make_method(cascade: CascadeConfig) -> Method:
    """What `cascade` asks of a boundary; settings that its strategy does not use are left out."""
    strategy = STRATEGIES[cascade.strategy]
    retention, intensity = cascade.slow_retention, cascade.noise_intensity
    retentions = cascade.slow_retention_candidates if retention == "auto" else (retention,)
    intensities = cascade.noise_intensity_candidates if intensity == "auto" else (intensity,)
    return Method(
        strategy=cascade.strategy,
        slow_retention=retentions if strategy.averages else (0.0,),
        noise_intensity=intensities if strategy.noise != "none" else (0.0,),
        noise=strategy.noise,
        noise_on=cascade.noise_on if strategy.noise == "once" else "adapted",
        pruning=Pruning(cascade.prune_method, cascade.prune_fraction) if strategy.optimizer == "pruned" else None,
    )


def unused_settings(cascade: CascadeConfig) -> list[str]:
    """Settings that were changed from their default and that the strategy does not use, as `key value`."""
    strategy = STRATEGIES[cascade.strategy]
    used = {
        "slow_retention": strategy.averages,
        "noise_intensity": strategy.noise != "none",
        "noise_on": strategy.noise == "once",
        "prune_method": strategy.optimizer == "pruned",
        "prune_fraction": strategy.optimizer == "pruned" and cascade.prune_method != "full",
    }
    values = {key: getattr(cascade, key) for key, holds in used.items() if not holds}
    return [
        f"cascade.{key} {value}"
        for key, value in values.items()
        if value not in (0, CascadeConfig.model_fields[key].default)
    ]


def make_plan(cascade: CascadeConfig, steps: int, epochs: float) -> Plan:
    """Experts over `steps` optimizer steps, which are `epochs` epochs.

    Raises:
        ConfigError: more experts than steps.
    """
    defaults = {"one": 1, "two": 2, "one per epoch": math.ceil(epochs)}
    if cascade.restart_interval is not None:
        interval = min(cascade.restart_interval, steps)
        return Plan(steps, math.ceil(steps / interval), interval)
    experts = cascade.experts or defaults[STRATEGIES[cascade.strategy].experts]
    if experts > steps:
        raise ConfigError(
            f"cascade.experts is {experts}, but {epochs:g} epochs are only {steps} optimizer steps: an expert needs at"
            " least one; lower experts, or raise training.epochs or training.max_steps"
        )
    return Plan(steps, experts)


def make_schedule(
    cascade: CascadeConfig, plan: Plan, *, decay: str | None = None, span: str | None = None, warmup_steps: int = 0
) -> Schedule:
    """The strategy's schedule, or the one asked for.

    Raises:
        ConfigError: a warm-up is longer than what it belongs to.
    """
    strategy = STRATEGIES[cascade.strategy]
    schedule = Schedule(decay or strategy.schedule, span or strategy.span, warmup_steps, cascade.rewarmup_steps)
    if warmup_steps >= plan.steps:
        raise ConfigError(
            f"training.warmup_steps is {warmup_steps}, but the run has only {plan.steps} optimizer steps: lower it, or"
            " raise training.epochs or training.max_steps"
        )
    steps = plan.expert(min(2, plan.experts)).steps
    if schedule.span == "jagged" and plan.experts > 1 and (cascade.rewarmup_steps or 0) >= steps:
        raise ConfigError(
            f"cascade.rewarmup_steps is {cascade.rewarmup_steps}, but an expert has only {steps} optimizer steps: lower"
            " it, or take fewer experts"
        )
    return schedule
