"""Tables across the tasks of a study: which method dev prefers on each, and how much the learning rate matters.

How much it matters is told twice: by the mean over all rates, which depends on how far the grid reaches, and by what
one rate for all tasks gives, which does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean

from lorasc_ds.robustness_report import Sheet
from lorasc_ds.study.plan import Row
from lorasc_ds.study.records import Outcomes, Record
from lorasc_ds.study.results import LEVEL, Results, at_every_rate, corrected, metric_of, score_of, values_of
from lorasc_ds.study.selection import choose, lower_is_better
from lorasc_ds.study.statistics import TEST, Comparison, compare
from lorasc_ds.study.tables import AT_AN_END, difference_text, number, spread_text


def best_sheets(results: Results) -> list[Sheet]:
    """Of every task the method that dev prefers, and how the best but the baseline differs from it on test."""
    study, (first, *others) = results.study, results.rows
    if not others or any(row.sweep for row in results.rows):
        return []

    def best(task: str, rows: Sequence[Row]) -> str | None:
        grid = {row.label: [one.dev for one in results.cells[task, row.label].chosen] for row in rows}
        return choose(grid, metric_of(study, task))

    def cell(task: str, label: str | None) -> str:
        metric = metric_of(study, task)
        return "-" if label is None else f"{label} ({spread_text(metric, results.cells[task, label].dev(metric))})"

    def row(task: str) -> tuple[str, ...]:
        other = best(task, others)
        differences = (difference_text(results, task, other, name) if other else "-" for name in study.scores)
        return task, cell(task, best(task, results.rows)), cell(task, other), *differences

    head = ("task", "best by dev", f"best but {first.label}", *(f"its {name}" for name in study.scores))
    notes = ("in brackets the metric on dev; its differences on test, with p, are those of the tables above",)
    title = f"the method that dev prefers, and what the best but {first.label} gains over it"
    return [Sheet(title, head, tuple(row(task) for task in study.tasks), notes)]


@dataclass(frozen=True, slots=True)
class OverRates:
    """A score at learning rates that all rows have tried.

    Args:
        means: over the rates, by seed.
        worst: of the means over the seeds.
        outcomes: by seed, of every example the mean over the rates.
    """

    means: list[float]
    worst: float
    outcomes: list[Outcomes | None]


def stability_sheets(results: Results) -> list[Sheet]:
    """What becomes of a score where nobody has chosen the learning rate: its mean over the rates and the worst."""
    study, baseline = results.study, results.rows[0].label
    rates = {task: common_rates(results, task) for task in study.tasks}
    if any(row.sweep for row in results.rows) or all(len(of_task) < 2 for of_task in rates.values()):
        return []
    chosen = {
        (task, label): {rate: runs for rate, runs in at_every_rate(cell).items() if rate in rates[task]}
        for (task, label), cell in results.cells.items()
    }
    found: dict[tuple[str, str, str], OverRates] = {}
    for (task, label), name in product(chosen, study.scores):
        one = over_rates(chosen[task, label], score_of(study, task, name))
        found |= {(task, label, name): one} if one is not None else {}
    compared: dict[tuple[str, str, str], Comparison] = {}
    for (task, label, name), one in found.items():
        theirs = found.get((task, baseline, name))
        if label != baseline and theirs is not None:
            compared[task, label, name] = compare(one.means, theirs.means, one.outcomes, theirs.outcomes)
    tested = corrected(compared)

    def text(task: str, label: str, name: str) -> str:
        one, score = found.get((task, label, name)), score_of(study, task, name)
        if one is None:
            states = [run.state for runs in chosen[task, label].values() for run in runs]
            return f"failed {states.count('failed')}/{len(states)}" if "failed" in states else "-"
        mark = tested[task, label, name].mark if (task, label, name) in tested else ""
        return f"{spread_text(score, one.means)} (worst {number(score, one.worst)}){mark}"

    texts = {task: ", ".join(f"{rate:g}" for rate in of_task) for task, of_task in rates.items()}
    alike = len({*texts.values()}) == 1
    listed = next(iter(texts.values())) if alike else "; ".join(f"{task}: {text}" for task, text in texts.items())
    notes = (
        f"mean over the learning rates that all rows have tried, ± over seeds, and the worst of them; {listed}",
        f"↑ ↓: higher or lower than {baseline}, p < {LEVEL}; {TEST.replace('of the study', 'of this kind')}",
    )
    return [
        Sheet(
            f"over learning rates, {name}",
            ("method", *study.tasks),
            tuple((row.label, *(text(task, row.label, name) for task in study.tasks)) for row in results.rows),
            notes,
        )
        for name in study.scores
    ]


def one_rate_sheets(results: Results) -> list[Sheet]:
    """What becomes of the scores where one learning rate has to serve all tasks: the best by the mean of dev."""
    study, baseline = results.study, results.rows[0].label
    metrics = {metric_of(study, task) for task in study.tasks}
    names = [name for name in study.scores if len({score_of(study, task, name) for task in study.tasks}) == 1]
    if len(study.tasks) < 2 or len(metrics) > 1 or not names or any(row.sweep for row in results.rows):
        return []
    (metric,), scores = metrics, {name: score_of(study, next(iter(study.tasks)), name) for name in names}
    rates: dict[str, str] = {}
    values: dict[tuple[str, str, str], list[float]] = {}
    outcomes: dict[tuple[str, str, str], list[Outcomes | None]] = {}
    for row in results.rows:
        of_tasks = [at_every_rate(results.cells[task, row.label]) for task in study.tasks]
        common = sorted(set.intersection(*map(set, of_tasks)))
        by_seed = {rate: [*zip(*(runs[rate] for runs in of_tasks), strict=True)] for rate in common}
        grid = {rate: [mean_of_dev(runs, metric) for runs in seeds] for rate, seeds in by_seed.items()}
        rate = choose(grid, metric)
        if rate is None or len(common) < 2:
            return []
        rates[row.label] = f"{rate:g}{AT_AN_END if rate in (common[0], common[-1]) else ''}"
        for name, score in scores.items():
            key = "", row.label, name
            values[key] = [fmean(one) for one in (values_of(runs, score) for runs in by_seed[rate]) if one]
            outcomes[key] = [averaged([run.outcomes(score) for run in runs]) for runs in by_seed[rate]]
    tested = corrected(
        {
            key: compare(of_key, values["", baseline, key[2]], outcomes[key], outcomes["", baseline, key[2]])
            for key, of_key in values.items()
            if key[1] != baseline and len(of_key) == len(values["", baseline, key[2]])
        }
    )

    def text(label: str, name: str) -> str:
        key = "", label, name
        mark = tested[key].mark if key in tested else ""
        return spread_text(scores[name], values[key]) + mark if values[key] else "-"

    notes = (
        "mean over the tasks; ± over seeds; for every method the one rate with the best mean of dev over the tasks",
        f"↑ ↓: higher or lower than {baseline}, p < {LEVEL}; {TEST.replace('of the study', 'of this table')}",
    )
    rows = tuple((row.label, rates[row.label], *(text(row.label, name) for name in names)) for row in results.rows)
    return [Sheet("one learning rate for all tasks", ("method", "learning rate", *names), rows, notes)]


def mean_of_dev(runs: Sequence[Record], metric: str) -> dict[str, float] | None:
    """What choosing looks at, of a seed's runs on all tasks; None where one is not there."""
    found = [run.dev for run in runs if run.dev is not None]
    return {key: fmean(dev[key] for dev in found) for key in {metric, "loss"}} if len(found) == len(runs) else None


def common_rates(results: Results, task: str) -> list[float]:
    """Learning rates that every row has tried on a task, with the rest of its choice as dev made it."""
    return sorted(set.intersection(*({*at_every_rate(results.cells[task, row.label])} for row in results.rows)))


def over_rates(runs: Mapping[float, Sequence[Record]], score: str) -> OverRates | None:
    """None where a run does not have the score, or there are fewer than two rates."""
    by_rate = [values_of(records, score) for records in runs.values()]
    if len(by_rate) < 2 or not all(by_rate):
        return None
    outcomes = [[one.outcomes(score) for one in of_seed] for of_seed in zip(*runs.values(), strict=True)]
    means = [fmean(of_seed) for of_seed in zip(*by_rate, strict=True)]
    worst = max if lower_is_better(score) else min
    return OverRates(means, worst(map(fmean, by_rate)), [averaged(one) for one in outcomes])


def averaged(outcomes: Sequence[Outcomes | None]) -> Outcomes | None:
    """Of every example the mean; None where it is not known of every one."""
    known = [one for one in outcomes if one is not None]
    if len(known) < len(outcomes) or any(one.keys() != known[0].keys() for one in known):
        return None
    return {each: fmean(one[each] for one in known) for each in known[0]}
