"""The cells of a study's tables: what dev chose for each, its runs, and how it compares with the baseline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from lorasc_ds.errors import ConfigError
from lorasc_ds.fields import did_you_mean
from lorasc_ds.study.plan import Choice, Row, baseline_of, label_of, rows_of, short
from lorasc_ds.study.records import Record
from lorasc_ds.study.selection import choose
from lorasc_ds.study.statistics import Comparison, compare, holm
from lorasc_ds.study.study_config import StudyConfig

LEVEL = 0.05
RATE = "training.learning_rate"


@dataclass(frozen=True, slots=True)
class Cell:
    """A task under a row.

    Args:
        choice: the point of the grid that dev chose; None where no point has all its seeds.
        chosen: the runs there, by seed.
        every: the runs of all points.
    """

    task: str
    row: Row
    choice: Choice | None
    chosen: tuple[Record, ...]
    every: tuple[Record, ...]

    def values(self, score: str) -> list[float]:
        """Of the chosen runs, by seed; [] where one does not have it."""
        return values_of(self.chosen, score)

    def dev(self, metric: str) -> list[float]:
        """Of the chosen runs, by seed."""
        return [record.dev[metric] for record in self.chosen if record.dev is not None]

    def count(self, state: str) -> int:
        return sum(record.state == state for record in self.every)


@dataclass(frozen=True, slots=True)
class Tested:
    """A comparison, and its p corrected for all that were made."""

    comparison: Comparison
    p: float

    @property
    def mark(self) -> str:
        """↑ or ↓ where the difference is significant."""
        return "" if self.p >= LEVEL else " ↑" if self.comparison.difference > 0 else " ↓"


def corrected(compared: Mapping[tuple[str, str, str], Comparison]) -> dict[tuple[str, str, str], Tested]:
    """Those that can be tested, by (task, row's label, name of the score); corrected over all of them."""
    p_values = {key: one.p for key, one in compared.items() if one.p is not None}
    adjusted = zip(p_values, holm([*p_values.values()]), strict=True)
    return {key: Tested(compared[key], p) for key, p in adjusted}


@dataclass(frozen=True, slots=True)
class Results:
    """Args:
    tested: (task, row's label, name of the score) -> the comparison with the baseline.
    """

    study: StudyConfig
    rows: tuple[Row, ...]
    cells: Mapping[tuple[str, str], Cell]
    tested: Mapping[tuple[str, str, str], Tested]

    @property
    def baseline(self) -> str:
        """What rows are compared with, in words; see `plan.baseline_of`."""
        first = self.rows[0]
        name = label_of(self.study, first.adapter, first.strategy, None)
        return name if first.sweep is None else f"{name} at the same {short(first.sweep[0])}"


def score_of(study: StudyConfig, task: str, name: str) -> str:
    """What a column of a task shows, as `StudyConfig.scores` has it."""
    return (study.tasks[task].scores or study.scores)[name]


def metric_of(study: StudyConfig, task: str) -> str:
    """That on dev which chooses."""
    return (study.tasks[task].select_by or study.select_by).removeprefix("dev/")


def check_names(study: StudyConfig, record: Record) -> None:
    """
    Raises:
        ConfigError: a run that is done has not all that the study reports and chooses by.
    """
    if record.state != "done":
        return
    task, own = record.run.task, study.tasks[record.run.task]
    there = {*(f"dev/{metric}" for metric in record.dev or {}), *(record.scores or {})}
    place = "" if own.scores is None else f"tasks.{task}."
    asked = {f"{place}scores.{name}": score_of(study, task, name) for name in study.scores}
    asked[f"{'' if own.select_by is None else f'tasks.{task}.'}select_by"] = f"dev/{metric_of(study, task)}"
    for key, score in asked.items():
        for part in score.split(" - "):
            if part.strip() not in there:
                listed = sorted(name for name in there if name.rpartition("/")[0] not in there)  # no group by itself
                raise ConfigError(
                    f"{key} is {score!r}, but the runs of {task} have no {part.strip()}: one of {', '.join(listed)} is"
                    f" needed{did_you_mean(part.strip(), listed)}"
                )


def results_of(study: StudyConfig, records: Sequence[Record]) -> Results:
    rows = tuple(row for row in rows_of(study) if any(record.run.row == row for record in records))
    cells = {
        (task, row.label): cell_of(
            study, task, row, [one for one in records if (one.run.task, one.run.row) == (task, row)]
        )
        for task in study.tasks
        for row in rows
    }
    compared: dict[tuple[str, str, str], Comparison] = {}
    for task, row, name in ((task, row, name) for task in study.tasks for row in rows for name in study.scores):
        baseline = baseline_of(rows, row)
        if row != baseline:
            found = against(cells[task, row.label], cells[task, baseline.label], score_of(study, task, name))
            compared |= {} if found is None else {(task, row.label, name): found}
    return Results(study, rows, cells, corrected(compared))


def cell_of(study: StudyConfig, task: str, row: Row, records: Sequence[Record]) -> Cell:
    points: dict[Choice, list[Record]] = {}
    for record in records:
        points.setdefault(record.run.choice, []).append(record)
    metric = metric_of(study, task)
    choice = choose({point: [one.dev for one in ones] for point, ones in points.items()}, metric)
    return Cell(task, row, choice, tuple(points[choice]) if choice is not None else (), tuple(records))


def against(cell: Cell, baseline: Cell, score: str) -> Comparison | None:
    """None where one of them has not all its seeds."""
    ours, theirs = cell.values(score), baseline.values(score)
    if not ours or not theirs:
        return None
    return compare(ours, theirs, *([one.outcomes(score) for one in each.chosen] for each in (cell, baseline)))


def values_of(records: Iterable[Record], score: str) -> list[float]:
    """Of every run; [] where one does not have it."""
    found = [record.score(score) for record in records]
    return [value for value in found if value is not None] if None not in found else []


def at_every_rate(cell: Cell) -> dict[float, list[Record]]:
    """The runs at every learning rate of the grid, by seed, with the rest of the choice as dev made it."""
    rest = dict(cell.choice or ()) | {RATE: None}
    found: dict[float, list[Record]] = {}
    for record in cell.every:
        choice = dict(record.run.choice)
        if RATE in choice and cell.choice is not None and choice | {RATE: None} == rest:
            found.setdefault(float(choice[RATE]), []).append(record)
    return found


def values_by_rate(cell: Cell, score: str) -> dict[float, list[float]]:
    """A score by seed at every learning rate where all seeds have it, with the rest of the choice as dev made it."""
    found = {rate: values_of(records, score) for rate, records in at_every_rate(cell).items()}
    return {rate: values for rate, values in found.items() if values}


def spread(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n - 1) over the seeds; None for one seed."""
    found = [*values]
    return fmean(found), stdev(found) if len(found) > 1 else None
