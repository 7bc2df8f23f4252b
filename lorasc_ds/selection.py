"""What the dev loss decides: which weights ship (`training.select`), and whether the run ends early."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lorasc_ds.algorithm.experts import Pair
from lorasc_ds.errors import CheckpointError
from lorasc_ds.live_weights import LiveWeights
from lorasc_ds.tasks import Scores


class Patience:
    """Ends a run whose dev loss has not fallen for `epochs` evaluations at ends of epochs; None: never.

    It is a function of the losses so far, by step: one that is measured again after an interruption counts once.
    """

    def __init__(self, epochs: int | None) -> None:
        self.epochs = epochs
        self.losses: dict[int, float] = {}

    def consider(self, step: int, scores: Scores) -> None:
        if "dev" in scores:
            self.losses[step] = scores["dev"]["loss"]

    @property
    def best(self) -> int:
        """The step with the lowest loss, of equals the first."""
        return min(self.losses, key=lambda step: self.losses[step] if math.isfinite(self.losses[step]) else math.inf)

    @property
    def over(self) -> bool:
        return self.epochs is not None and sum(step > self.best for step in self.losses) >= self.epochs

    def state(self) -> list[tuple[int, float]]:
        return list(self.losses.items())

    def resume(self, state: Iterable[tuple[int, float]]) -> None:
        self.losses = dict(state)


class Selection:
    """The best weights so far: copies of them, and how the ledger gives them again.

    Weights after expert k are the ledger's first k experts; weights inside it are the first k - 1, the noise of k, and
    the pairs that closing then would have merged.

    Args:
        select: `training.select`.
    """

    def __init__(self, select: str, live: LiveWeights) -> None:
        self.select = select
        self.live = live
        self.dev_loss = math.inf
        self.step = 0
        self.scores: Scores = {}
        self.expert = 0
        self.pairs: dict[str, Pair] | None = None
        self.copies: dict[str, Tensor] = {}
        self.persistent: dict[str, Tensor] = {}

    def consider(self, step: int, expert: int, pairs: Mapping[str, Pair] | None, scores: Scores) -> None:
        """Called on the weights that closing now would ship.

        Args:
            pairs: what closing now would merge, inside `expert`; None after it.
        """
        if self.select == "best_dev" and scores["dev"]["loss"] < self.dev_loss:
            self.dev_loss, self.step, self.scores = scores["dev"]["loss"], step, scores
            self.expert, self.pairs = expert, None if pairs is None else dict(pairs)
            self.persistent = self.live.persistent()
            self.copies = self.live.copies()

    def restore(self) -> None:
        """Put the selected weights into the model; nothing to do with `last`."""
        if self.step and not self.copies:
            raise CheckpointError(
                f"training.select best_dev chose step {self.step}, and the ledger no longer gives its weights: it was"
                " compacted by another version"
            )
        if self.copies:
            self.live.write_copies(self.copies)
            self.live.write_persistent(self.persistent)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `resume` needs, as JSON and as tensors; nothing before a selection."""
        if not self.step:
            return {}, {}
        tensors = {f"selected.{key}": value for key, value in self.persistent.items()}
        for name, pair in (self.pairs or {}).items():
            tensors |= {f"selected.{name}.{part}": tensor for part, tensor in zip("AB", pair, strict=True)}
        values = {"dev_loss": self.dev_loss, "step": self.step, "scores": self.scores, "expert": self.expert}
        return values | {"closed": self.pairs is None}, tensors

    def resume(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Know the selection again; `passing` then takes the copies."""
        if not values:
            return
        self.dev_loss, self.step, self.scores = values["dev_loss"], values["step"], values["scores"]
        self.expert = values["expert"]
        names = [one.name for one in self.live.weights]
        if not values["closed"]:
            self.pairs = {n: Pair(*(tensors[f"selected.{n}.{part}"] for part in "AB")) for n in names}
        self.persistent = {key: tensors[f"selected.{key}"] for key in self.live.outside}

    def passing(self, expert: int, closed: bool) -> None:
        """While the weights are made again from the ledger: they are now those inside `expert`, or those after it."""
        if not self.step or (expert, closed) != (self.expert, self.pairs is None):
            return
        if self.pairs is None:
            self.copies = self.live.copies()
        else:
            with self.live.as_if_added(self.pairs):
                self.copies = self.live.copies()
