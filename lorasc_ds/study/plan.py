"""The runs of a study: every combination as flags of `launch/train.py`, known by the digest of what it comes to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from lorasc_ds.config import Config
from lorasc_ds.errors import ConfigError
from lorasc_ds.fields import build_config, did_you_mean, fields_of
from lorasc_ds.recipes import load_yaml
from lorasc_ds.study.study_config import PLAIN, StudyConfig

Choice = tuple[tuple[str, Any], ...]  # dotted key and value of every axis of the grid


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the tables: what is compared.

    Args:
        sweep: the key and the value that make it a row of its own; None without a sweep.
    """

    adapter: str
    strategy: str
    sweep: tuple[str, Any] | None
    label: str


@dataclass(frozen=True, slots=True)
class Run:
    """One training run.

    Args:
        choice: its point of the grid.
        flags: overrides of the recipe, as `launch/train.py` takes them.
        digest: sha256 of the settings that are not the defaults; runs with one digest are one run.
    """

    task: str
    row: Row
    choice: Choice
    seed: int
    flags: tuple[str, ...]
    config: Config
    digest: str

    @property
    def name(self) -> str:
        """Of its directory."""
        config = self.config
        return f"{config.task.name}-{config.adapter.method}-{config.cascade.strategy}-{self.seed}-{self.digest[:12]}"

    @property
    def title(self) -> str:
        point = "".join(f", {short(key)} {text_of(value)}" for key, value in self.choice)
        return f"{self.task}: {self.row.label}{point}, seed {self.seed}"


def expand(study: StudyConfig, recipe: Path, overrides: Mapping[str, str]) -> tuple[Run, ...]:
    """Every run, in the order of the tables; of those that come to the same settings, each is there.

    Args:
        overrides: dotted key -> text of the command line; a key that is swept or chosen there is so no more.

    Raises:
        ConfigError: a setting is unknown or impossible; names the run.
    """
    content, places = load_yaml(recipe)
    known = fields_of()
    for place, key in keys_of(study):
        if key not in known:
            raise ConfigError(f"{place}: unknown key {key}{did_you_mean(key, [*known])}")

    def build(task: str, row: Row, choice: Choice, seed: int) -> Run:
        variants = study.tasks[task], study.adapters[row.adapter], study.strategies[row.strategy]
        settings: dict[str, Any] = dict(study.set)
        for variant in variants:
            settings |= variant.set
        settings |= dict([row.sweep] if row.sweep else []) | dict(choice) | {"training.seed": seed}
        texts = {key: text_of(value) for key, value in settings.items()} | dict(overrides)
        try:
            config = build_config(content, places, texts)
        except ConfigError as error:
            raise ConfigError(f"{task}, {row.label}: {error}") from None
        return Run(task, row, choice, seed, tuple(f"--{k}={v}" for k, v in texts.items()), config, digest_of(config))

    return tuple(
        build(task, row, choice, seed)
        for task in study.tasks
        for row in rows_of(study, overrides)
        for choice in choices(study, task, row, overrides)
        for seed in study.seeds
    )


def keys_of(study: StudyConfig) -> Iterator[tuple[str, str]]:
    """Every dotted key of a study, after the place where it stands."""
    yield from ((place, key) for place in ("set", "sweep", "grid") for key in getattr(study, place))
    for axis in ("tasks", "adapters", "strategies"):
        for name, variant in getattr(study, axis).items():
            parts = ("set", "grid", "sweep") if axis == "strategies" else ("set", "grid")
            yield from ((f"{axis}.{name}.{part}", key) for part in parts for key in getattr(variant, part))


def rows_of(study: StudyConfig, overrides: Mapping[str, str] = {}) -> list[Row]:
    """The rows of the tables."""
    found = []
    for adapter, (strategy, variant) in product(study.adapters, study.strategies.items()):
        if variant.adapters is None or adapter in variant.adapters:
            axes = {key: values for key, values in (study.sweep | variant.sweep).items() if key not in overrides}
            points = [(key, value) for key, values in axes.items() for value in values]
            found += [Row(adapter, strategy, one, label_of(study, adapter, strategy, one)) for one in points or [None]]
    return found


def label_of(study: StudyConfig, adapter: str, strategy: str, sweep: tuple[str, Any] | None) -> str:
    both = strategy if len(study.adapters) == 1 else f"{adapter} {strategy}"
    base = adapter if strategy == PLAIN else both
    return base if sweep is None else f"{base}, {short(sweep[0])} {text_of(sweep[1])}"


def baseline_of(rows: Sequence[Row], row: Row) -> Row:
    """What a row is compared with: the first adapter and strategy, at the same point of a sweep where it has one."""
    first = rows[0]
    same = [one for one in rows if (one.adapter, one.strategy) == (first.adapter, first.strategy)]
    return next((one for one in same if one.sweep == row.sweep), first)


def choices(study: StudyConfig, task: str, row: Row, overrides: Mapping[str, str]) -> list[Choice]:
    """The points of the grid of a cell."""
    axes: dict[str, Sequence[Any]] = dict(study.grid)
    for variant in (study.tasks[task], study.adapters[row.adapter], study.strategies[row.strategy]):
        axes |= variant.grid
    swept = row.sweep[0] if row.sweep else None
    free = {key: values for key, values in axes.items() if key not in overrides and key != swept}
    return [tuple(zip(free, point, strict=True)) for point in product(*free.values())]


def text_of(value: Any) -> str:
    """A value as a flag has it."""
    return value if isinstance(value, str) else json.dumps(value)


def short(key: str) -> str:
    """A dotted key without its section."""
    return key.rsplit(".", 1)[-1]


def digest_of(config: Config) -> str:
    """The same for all versions that have the same defaults, whatever keys they add."""
    settings = config.model_dump(mode="json", exclude_defaults=True)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
