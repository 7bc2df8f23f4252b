"""Trackers beside TensorBoard, through Accelerate's classes for them (`tracking.backends`).

Importing this needs neither torch nor any of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from lorasc_ds.errors import ConfigError

PACKAGES = {"comet_ml": "comet-ml"}  # where pip has another name than Python
IDENTITIES: dict[str, Callable[[Any], str]] = {
    "mlflow": lambda run: run.info.run_id,
    "wandb": lambda run: run.id,
}
"""How a tracker's own run is known again, where it can be gone on with."""


def check_installed(names: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: a tracker is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracking.backends {name} is not installed: pip install {PACKAGES.get(name, name)}, or leave it out"
            )


class Backend:
    """A tracker that is given the same numbers at the same steps as TensorBoard.

    One that fails later ends no run: it gets nothing more, and `scalars` says so once.

    Args:
        name: as in `tracking.backends`.
        project: that it files the run under.
        directory: of the run, whose name the tracker's run gets.
        settings: the configuration, flattened, as numbers, booleans and texts.
        known: `identity` of the tracker's run that is gone on with; None: a new one.

    Raises:
        ConfigError: it cannot be started.
    """

    def __init__(
        self, name: str, project: str, directory: Path, settings: Mapping[str, Any], known: str | None
    ) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # here, since it takes seconds

        self.name = name
        self.failed = False
        kind = LOGGER_TYPE_TO_CLASS[name]
        places = [str(directory)] if kind.requires_logging_directory else []
        try:
            self.tracker = kind(project, *places, **options(name, directory, known))
            self.tracker.start()
            if known is None:
                self.tracker.store_init_configuration(dict(settings))
        except Exception as error:  # whatever a service answers
            raise ConfigError(
                f"tracking.backends {name}: {one_line(error)}; set it up as its own manual says, or leave it out"
            ) from error
        self.identity = IDENTITIES[name](self.tracker.tracker) if name in IDENTITIES else None

    def scalars(self, values: Mapping[str, float], step: int) -> str | None:
        """Give it these. Returns what went wrong, the first time."""
        if self.failed:
            return None
        try:
            self.tracker.log(dict(values), step=step)
        except Exception as error:  # whatever a service answers: the training is worth more
            self.failed = True
            return f"tracking.backends {self.name}: {one_line(error)}; it gets nothing more of this run"
        return None

    def end(self, exit_code: int) -> None:
        """The run is over; a tracker that can say how is told."""
        try:
            if self.name == "wandb":
                self.tracker.tracker.finish(exit_code=exit_code)
            elif self.name == "mlflow" and exit_code:
                importlib.import_module("mlflow").end_run("KILLED" if exit_code == 75 else "FAILED")
            else:
                self.tracker.finish()
        except Exception:  # as above; what was recorded is in metrics.jsonl
            self.failed = True


def options(name: str, directory: Path, known: str | None) -> dict[str, Any]:
    """What Accelerate passes on to a tracker: how its run is called, and which one it goes on with."""
    label = directory.absolute().name
    if name == "wandb":
        return {"name": label, "id": known or uuid4().hex, "resume": "allow", "dir": str(directory)}
    if name == "mlflow":
        return {"run_name": label, "run_id": known}
    return {}


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
