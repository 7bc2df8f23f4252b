"""How a run of the method goes wrong, told from numbers that it measures anyway; each sign names the knob to turn.

Four signs: the training loss is far below the dev loss; the dev loss rises while the training loss falls; the noise is
larger than the update it stands beside; nothing gets better. All here are functions of what they are given.

A mean loss over n examples is known to about 1/√n of itself, since the losses of examples differ by about as much as
they are large. Twice that is what a difference between examples must exceed, so that chance is not told as a sign.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GAP = 0.5  # of the dev loss: then the perplexity of the training examples is less than the square root of dev's
LEAST_GAP = 0.1  # of the loss at the beginning: what is left of it once a task is learnt says little
LEAST_RISE = 0.05  # of a dev loss on however many examples: less is usual in the last epochs of a sound run
LEAST_FALL = 1e-3  # of a loss on the same examples: less is no progress
PATIENCE = (3, 0.25)  # epochs without progress that are told once there was some: at least these, this share of all


@dataclass(frozen=True, slots=True)
class Epoch:
    """One pass over the training examples; at the end of a run, what is left of one.

    Args:
        step: its last optimizer step.
        expert: that was trained, the last of them where there were several.
        train_loss: mean over its steps, each taken before the step's update.
        dev_loss: of what would ship after it; None where that is not scored.
    """

    step: int
    expert: int
    train_loss: float
    dev_loss: float | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """What the signs need to know of a run.

    Args:
        values: the configuration, flattened.
        epochs: of the run, counting one that is cut short.
        train_examples: of an epoch.
        dev_examples: of every dev loss.
    """

    values: Mapping[str, Any]
    epochs: int
    train_examples: int
    dev_examples: int

    @property
    def length(self) -> str:
        """The key that says how long the run is."""
        return "training.epochs" if self.values["training.max_steps"] is None else "training.max_steps"

    @property
    def averages(self) -> bool:
        retention = self.values["cascade.slow_retention"]
        return self.values["cascade.strategy"] in ("slow", "lorasc") and (retention == "auto" or retention > 0)

    def knob(self, verb: str, key: str, end: str = "") -> str:
        return f"{verb} --{key} (now {shown(self.values[key])}){end}"


@dataclass(frozen=True, slots=True)
class Sign:
    """Something is going wrong.

    Args:
        name: `gap`, `rising_dev`, `noise` or `no_progress`.
        message: what was measured, and which knobs to turn, on one line.
    """

    name: str
    message: str


def shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def chance(examples: int) -> float:
    """The relative difference between two mean losses over so many examples that chance alone makes."""
    return max(LEAST_RISE, 2 / math.sqrt(max(1, examples)))


def noise_sign(noise: float, update: float, setting: Setting) -> Sign | None:
    """The noise before an expert against what the expert then merged.

    Args:
        noise: expected Frobenius norm over all adapted weights.
        update: norm of D(slow) over the same.
    """
    if noise <= update:
        return None
    intensity = setting.values["cascade.noise_intensity"]
    if intensity == "auto":
        knob = setting.knob("leave the largest out of", "cascade.noise_intensity_candidates")
    else:  # the noise is in proportion to it
        knob = setting.knob("lower", "cascade.noise_intensity", f", below {intensity * update / noise:.2g}")
    return Sign(
        "noise", f"the noise before it has norm {noise:.3g}, more than its update, which has {update:.3g}: {knob}"
    )


def epoch_signs(start: float | None, epochs: Sequence[Epoch], setting: Setting, drowned: bool = False) -> list[Sign]:
    """What is wrong after the last of `epochs`.

    Args:
        drowned: whether there is too much noise already, so that more is no remedy.
        start: dev loss of the pretrained model, which has seen neither the training nor the dev examples: both losses
            begin there. None where nothing is scored.
    """
    if not all(math.isfinite(loss) for one in epochs for loss in (one.train_loss, one.dev_loss or 0.0)):
        return []  # such a run is ended or told of elsewhere
    rising = rising_dev_sign(start, epochs, setting)
    found = (
        gap_sign(start, epochs[-1], setting, drowned),
        rising,
        None if rising else progress_sign(start, epochs, setting),
    )
    return [one for one in found if one is not None]


def gap_sign(start: float | None, last: Epoch, setting: Setting, drowned: bool) -> Sign | None:
    """The training loss is less than half of the dev loss."""
    if start is None or last.dev_loss is None:
        return None
    gap = last.dev_loss - last.train_loss
    if gap <= max(GAP, chance(setting.dev_examples)) * last.dev_loss or gap <= LEAST_GAP * start:
        return None
    retention = "cascade.slow_retention"
    robust = {"lorasc": retention if drowned else "cascade.noise_intensity", "slow": retention}
    key = robust.get(setting.values["cascade.strategy"])  # what the method itself has against it
    knobs = [setting.knob("raise", key)] if key and setting.values[key] != "auto" else []
    knobs += [setting.knob("raise", "adapter.dropout"), setting.knob("lower", "adapter.rank")]
    return Sign(
        "gap",
        f"the training loss is {last.train_loss:.4g}, and the dev loss {last.dev_loss:.4g}, more than twice as high:"
        f" {', '.join(knobs[:-1])} or {knobs[-1]}",
    )


def rising_dev_sign(start: float | None, epochs: Sequence[Epoch], setting: Setting) -> Sign | None:
    """The dev loss is above its lowest by more than chance, and the training loss below what it was then."""
    last = epochs[-1]
    scored = [one for one in epochs[:-1] if one.dev_loss is not None]
    if last.dev_loss is None or (start is None and not scored):
        return None
    before = [] if start is None else [Epoch(0, 0, start, start)]
    best = min((*before, *scored), key=lambda one: one.dev_loss or 0.0)
    assert best.dev_loss is not None
    rise = last.dev_loss - best.dev_loss
    if last.train_loss >= best.train_loss or rise <= chance(setting.dev_examples) * best.dev_loss:
        return None
    knobs = [setting.knob("lower", setting.length, f", the best was step {best.step}") if best.step else ""]
    knobs.append(setting.knob("lower", "training.learning_rate"))
    if setting.values["training.select"] == "last" and best.step and setting.values["training.evaluate"] == "epoch":
        knobs.append("set --training.select best_dev (now last)")
    return Sign(
        "rising_dev",
        f"the dev loss rose from {best.dev_loss:.4g} at step {best.step} to {last.dev_loss:.4g} while the training loss"
        f" fell from {best.train_loss:.4g} to {last.train_loss:.4g}: {' or '.join(filter(None, knobs))}",
    )


def progress_sign(start: float | None, epochs: Sequence[Epoch], setting: Setting) -> Sign | None:
    """No loss has become lower than ever before: since the beginning, or for long."""
    last, best = epochs[-1], last_progress(start, epochs, setting)
    since = len(epochs) - best
    if best and since < max(PATIENCE[0], math.ceil(PATIENCE[1] * setting.epochs)):
        return None
    if not best and (len(epochs) < min(2, setting.epochs) or not comparable(start, epochs)):
        return None  # one epoch may be a slow start
    losses = f"training loss {last.train_loss:.4g}"
    if last.dev_loss is not None:
        losses += f", dev loss {last.dev_loss:.4g}"
    if best:
        words = f"no progress over the last {since} epochs, since step {epochs[best - 1].step} ({losses})"
        return Sign("no_progress", f"{words}: {setting.knob('lower', setting.length)}")
    first = f"; it began at {start:.4g}" if start is not None and last.dev_loss is not None else ""
    knobs = setting.knob("lower" if worse(start, epochs) else "raise", "training.learning_rate")
    if setting.averages and not worse(start, epochs):
        knobs += f" or {setting.knob('lower', 'cascade.slow_retention')}"
    return Sign("no_progress", f"no progress since the beginning ({losses}{first}): {knobs}")


def last_progress(start: float | None, epochs: Sequence[Epoch], setting: Setting) -> int:
    """The last epoch, from 1, after which one of the losses was lower than ever before; 0: none was.

    The first training loss is on other examples than `start`, so that it must be lower by more than chance.
    """
    dev = math.inf if start is None else start
    train = math.inf if start is None else start * (1 - chance(setting.train_examples)) / (1 - LEAST_FALL)
    found = 0
    for index, one in enumerate(epochs, start=1):
        lower_train = one.train_loss < train * (1 - LEAST_FALL)
        lower_dev = one.dev_loss is not None and one.dev_loss < dev * (1 - LEAST_FALL)
        if (lower_train and math.isfinite(train)) or (lower_dev and math.isfinite(dev)):
            found = index
        train = one.train_loss if index == 1 else min(train, one.train_loss)
        dev = dev if one.dev_loss is None else min(dev, one.dev_loss)
    return found


def comparable(start: float | None, epochs: Sequence[Epoch]) -> bool:
    """Whether a loss is known twice on the same examples."""
    return len(epochs) > 1 or (start is not None and epochs[-1].dev_loss is not None)


def worse(start: float | None, epochs: Sequence[Epoch]) -> bool:
    """Whether the losses of a run without progress rose, rather than stayed."""
    first, last = epochs[0], epochs[-1]
    if start is not None and last.dev_loss is not None:
        return last.dev_loss > start * (1 + LEAST_FALL)
    return last.train_loss > first.train_loss * (1 + LEAST_FALL)


def not_judged(setting: Setting) -> str | None:
    """What cannot be told in this run, in words."""
    if not setting.dev_examples:
        return "the train-dev gap and a rising dev loss, since there is no dev split"
    if setting.values["training.evaluate"] == "end":
        return "the train-dev gap and a rising dev loss before the end, since training.evaluate is end"
    return None
