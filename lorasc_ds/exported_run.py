"""What a run directory says of a run, read without the live run; and the weights that it gave, one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasc_ds import models
from lorasc_ds.algorithm.dora import shipped_weight
from lorasc_ds.algorithm.ledger import Ledger, LedgerError
from lorasc_ds.config import Config, ModelConfig
from lorasc_ds.errors import ConfigError
from lorasc_ds.fields import build_config
from lorasc_ds.recipes import load_yaml


@dataclass(frozen=True, slots=True)
class ExportedRun:
    """A run up to one of its experts.

    Args:
        expert: after how many experts.
        noise: False leaves the noise out, as the run never had it.
        summary: of the finished run; None where it is not finished.
        packages: versions that the run was made with, by name.
        magnitudes: DoRA's after that expert, by name; {} for other methods.
        head: parts of the task's head after that expert; {} where none is trained.
    """

    config: Config
    ledger: Ledger
    expert: int
    noise: bool
    summary: dict[str, Any] | None
    packages: dict[str, str]
    magnitudes: dict[str, Tensor]
    head: dict[str, Tensor]

    @property
    def model(self) -> ModelConfig:
        """The model that the run began with, at the very commit; with the outputs of its new classifier."""
        labels = len(self.head["weight"]) if self.head else self.config.model.labels
        return self.config.model.model_copy(update={"revision": self.ledger.base.revision, "labels": labels})

    @property
    def last(self) -> bool:
        """Whether the finished run ended with this expert."""
        return self.summary is not None and self.expert == self.summary["experts"]

    @property
    def shipped(self) -> bool:
        """Whether it did, and `training.select` chose these weights for `model/`."""
        return self.last and self.summary is not None and self.summary["shipped"]["step"] == self.summary["steps"]

    @property
    def has_noise(self) -> bool:
        """Whether any noise was drawn until that expert."""
        return any(c for record in self.ledger.experts[: self.expert] for c in record.noise_scale.values())


def read_json(path: Path) -> Any:
    """The content of a file; None where there is none.

    Raises:
        LedgerError: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise LedgerError(f"{path} cannot be read: {error!r}") from error


def open_run(directory: Path, expert: int | None, noise: bool) -> ExportedRun:
    """Read a run directory and check the files of its ledger.

    Args:
        expert: after how many experts; None: after all that closed.

    Raises:
        ConfigError: there is no run; or no such expert, or it was compacted away.
        LedgerError: a file is damaged.
    """
    if not (directory / "config.yaml").is_file():
        raise ConfigError(f"RUN_DIR {directory} holds no config.yaml: give the --output_dir of a run")
    config = build_config(*load_yaml(directory / "config.yaml"), {})
    ledger = Ledger.load(directory / "ledger")
    closed = len(ledger.experts)
    if closed == 0:
        raise ConfigError(f"RUN_DIR {directory}: no expert has closed yet, so there is nothing to export but the model")
    expert = closed if expert is None else expert
    if expert > closed:
        raise ConfigError(f"--expert is {expert}, but {closed} experts have closed: give 1 to {closed}")
    if expert < ledger.compacted:
        raise ConfigError(
            f"--expert is {expert}, but experts 1 to {ledger.compacted} were compacted into one snapshot: give"
            f" {ledger.compacted} to {closed}"
        )
    if ledger.compacted and not noise:
        raise ConfigError(
            f"RUN_DIR {directory}: experts 1 to {ledger.compacted} were compacted, with their noise and without their"
            " pairs, so that neither --noise false nor an adapter can be had: take --as merged with the noise"
        )
    environment = read_json(directory / "environment.json") or {}
    return ExportedRun(
        config,
        ledger,
        expert,
        noise,
        read_json(directory / "summary.json"),
        environment.get("packages", {}),
        ledger.magnitudes(expert),
        ledger.head(expert),
    )


class Replay:
    """The tensors of a run's model, one at a time: the pretrained ones, and those that the run changed.

    Args:
        tensor: gives the pretrained tensor of a name, in the run's dtype.
    """

    def __init__(self, run: ExportedRun, tensor: Callable[[str], Tensor]) -> None:
        self.run = run
        self.tensor = tensor
        ledger = run.ledger
        adapted = ledger.replay(tensor, run.expert, run.noise)
        noised = ledger.replay_noised(tensor, run.expert, run.noise)
        self.changed = dict.fromkeys(ledger.weights, adapted) | dict.fromkeys(ledger.noised, noised)

    def __call__(self, name: str) -> Tensor:
        """The tensor of a name. The changed ones are to be asked for once each, in the ledger's order.

        Raises:
            LedgerError: it holds a number that is not finite.
        """
        if name.startswith(models.CLASSIFIER) and self.run.head:
            return self.run.head[name.removeprefix(models.CLASSIFIER)].to(models.DTYPES[self.run.model.dtype])
        if name not in self.changed:
            return self.tensor(name)
        found, tensor = next(self.changed[name])
        if found != name:
            raise RuntimeError(f"{name} was asked for where {found} comes next")
        if not torch.isfinite(tensor).all():
            raise LedgerError(
                f"{self.run.ledger.directory}: {name} after expert {self.run.expert} holds a number that is not finite"
            )
        return shipped_weight(tensor, self.run.magnitudes[name]) if name in self.run.magnitudes else tensor

    def finish(self) -> None:
        """Call when all changed tensors have been asked for.

        Raises:
            LedgerError: the pretrained weights were not those the run began with.
        """
        for stream in dict.fromkeys(self.changed.values()):
            next(stream, None)
