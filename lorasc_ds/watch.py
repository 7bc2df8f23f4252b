"""What is strange about a run's numbers, said while it can still be stopped."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import astuple, replace
from typing import Any

from lorasc_ds.warning_signs import Epoch, Setting, Sign, epoch_signs, noise_sign, not_judged

SPIKE_WINDOW = 100  # steps whose median the loss is compared with
SPIKE_LEAST = 20  # of them, before anything is said
SPIKE_FACTOR = 2.0


class LossWatch:
    """Finds steps whose loss stands far above those before; one in a row is told, the others belong to it."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.high = False

    def spike(self, loss: float) -> str | None:
        """What is strange about the loss of this step, if anything."""
        usual = statistics.median(self.losses) if len(self.losses) >= SPIKE_LEAST else None
        self.losses.append(loss)
        was_high, self.high = self.high, usual is not None and loss > SPIKE_FACTOR * usual
        if not self.high or was_high:
            return None
        return f"the loss is {loss:.4g}, and the median of the {len(self.losses) - 1} steps before {usual:.4g}"


class SignWatch:
    """Gathers what `warning_signs` judges, and tells each sign once.

    An epoch is judged when its dev loss is known, or where it gets none, at its last step.

    Args:
        setting: of the run.
        steps, steps_per_epoch: optimizer steps of the run, and of an epoch.
        scored: after which steps of it every split is.
    """

    def __init__(self, setting: Setting, *, steps: int, steps_per_epoch: int, scored: frozenset[int]) -> None:
        self.setting = setting
        self.steps, self.steps_per_epoch = steps, steps_per_epoch
        self.scored_steps = scored
        self.start: float | None = None
        self.epochs: list[Epoch] = []
        self.losses: list[float] = []
        self.noise = 0.0
        self.told: list[dict[str, Any]] = []

    @property
    def not_judged(self) -> str | None:
        return not_judged(self.setting)

    def step(self, step: int, expert: int, loss: float | None) -> list[Sign]:
        """An optimizer step, the `step`-th; its loss, or None where it was left out."""
        if loss is not None:
            self.losses.append(loss)
        if (step % self.steps_per_epoch and step != self.steps) or not self.losses:
            return []
        self.epochs.append(Epoch(step, expert, statistics.fmean(self.losses)))
        self.losses = []
        return [] if step in self.scored_steps else self.judge()

    def scored(self, step: int, dev_loss: float | None) -> list[Sign]:
        """Dev was scored after `step` steps, if there is dev."""
        if step == 0:
            self.start = dev_loss
        if not self.epochs or self.epochs[-1].step != step:  # a score inside an epoch has no training loss beside it
            return []
        self.epochs[-1] = replace(self.epochs[-1], dev_loss=dev_loss)
        return self.judge()

    def gap(self, step: int) -> dict[str, float]:
        """How far dev is above the training loss of the epoch that ended at `step`, if both are known."""
        last = self.epochs[-1] if self.epochs else None
        if last is None or last.step != step or last.dev_loss is None:
            return {}
        return {"train/dev_gap": last.dev_loss - last.train_loss}

    def judge(self) -> list[Sign]:
        last = self.epochs[-1]
        drowned = any(one["sign"] == "noise" for one in self.told)
        return list(self.new(epoch_signs(self.start, self.epochs, self.setting, drowned), last.step, last.expert))

    def closed(self, step: int, expert: int, update: float) -> list[Sign]:
        """An expert whose D(slow) has norm `update` was merged; the noise before it had norm `noise`."""
        found = noise_sign(self.noise, update, self.setting)
        return list(self.new([found] if found else [], step, expert))

    def new(self, signs: list[Sign], step: int, expert: int) -> Iterator[Sign]:
        known = {one["sign"] for one in self.told}
        for sign in (one for one in signs if one.name not in known):
            self.told.append({"sign": sign.name, "step": step, "expert": expert, "message": sign.message})
            yield sign

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {
            "start": self.start,
            "epochs": [astuple(one) for one in self.epochs],
            "losses": self.losses,
            "noise": self.noise,
            "told": self.told,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        self.start, self.losses, self.noise = state["start"], list(state["losses"]), state["noise"]
        self.epochs = [Epoch(*one) for one in state["epochs"]]
        self.told = list(state["told"])


def until(state: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The `state` of a watch as it was when an expert had closed after `step` steps; dev was not yet scored there.

    Of an epoch that goes on beyond `step`, the losses before it are not known any more.
    """
    epochs = [one for one in state["epochs"] if one[0] <= step]
    if epochs and epochs[-1][0] == step:
        epochs[-1] = (*epochs[-1][:-1], None)
    told = [one for one in state["told"] if one["step"] < step or (one["step"] == step and one["sign"] == "noise")]
    return {**state, "epochs": epochs, "losses": [], "noise": 0.0, "told": told}
