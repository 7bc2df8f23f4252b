"""Figures that set rows against each other: differences to the baseline, trade-offs, ranks over the experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from statistics import fmean
from typing import Any

from lorasc_ds.study.panels import dress, grid_of, styles, tell_apart, unit, unit_name
from lorasc_ds.study.plan import Row, label_of, short, text_of
from lorasc_ds.study.results import LEVEL, RATE, Cell, Results, score_of, spread, values_by_rate

LEDGER = "ledger/"


def differences_figure(results: Results, rows: Sequence[Row]) -> Any:
    """A panel for every score, with every task's mean difference to the baseline, paired, and its 95 % interval."""
    study, baseline = results.study, results.rows[0].label
    tasks, several = [*study.tasks], len(study.seeds) > 1
    height = (0.15 + 0.17 * len(rows)) * len(tasks)
    figure, ((*axes,),) = grid_of(
        f"{study.title}: difference to {baseline}", 1, len(study.scores), width=2.4, height=height
    )
    look, lines = styles([row.label for row in results.rows]), {}
    for name, axis in zip(study.scores, axes, strict=True):
        for (at, row), (down, task) in product(enumerate(rows), enumerate(tasks)):
            score = score_of(study, task, name)
            ours, theirs = (results.cells[task, label].values(score) for label in (row.label, baseline))
            if not ours or not theirs:
                continue
            differences = [unit(score) * (x - y) for x, y in zip(ours, theirs, strict=True)]
            tested, (mark, grey) = results.tested.get((task, row.label, name)), look[row.label]
            style = {"color": grey, "mfc": grey if tested and tested.p < LEVEL else "white", "ms": 5, "lw": 1}
            y = down + 0.7 * ((at + 0.5) / len(rows) - 0.5)
            half = half_interval(differences) if several else None
            lines[row.label] = axis.errorbar(fmean(differences), y, xerr=half, fmt=mark[0], capsize=2, **style)
        plain = any(unit(score_of(study, task, name)) == 1 for task in tasks)
        dress(axis, name, "difference" if plain else "percentage points")
        axis.axvline(0.0, color="0.6", lw=0.8)
        axis.set(ylim=(len(tasks) - 0.5, -0.5))
        axis.set_yticks(range(len(tasks)), tasks if axis is axes[0] else [""] * len(tasks), fontsize=8)
    bars = "bars: 95 % intervals over the seeds; full: p < " if several else "full: p < "
    tell_apart(figure, lines, f"{bars}{LEVEL} over seeds and over examples (Holm)")
    return figure


def half_interval(differences: Sequence[float]) -> float:
    """Half the 95 % interval of a mean by Student's t."""
    from scipy.stats import t  # takes a second to import

    _, deviation = spread(differences)
    return float(t.ppf(0.975, len(differences) - 1)) * (deviation or 0.0) / math.sqrt(len(differences))


def trade_off_figure(results: Results, across: str, up: str) -> Any:
    """One score over another, means at every learning rate, a line through those of a row; what dev chose is full."""
    study, tasks = results.study, [*results.study.tasks]
    columns = min(3, len(tasks))
    title = f"{study.title}: {up} and {across} at every learning rate"
    figure, axes = grid_of(title, -(-len(tasks) // columns), columns, width=3.0, height=2.6)
    look, lines = styles([row.label for row in results.rows]), {}
    for task, axis in zip(tasks, axes.ravel(), strict=False):
        scores = [score_of(study, task, name) for name in (across, up)]
        for label, (mark, grey) in look.items():
            cell = results.cells[task, label]
            rates, points = means_by_rate(cell, scores)
            if rates:
                (lines[label],) = axis.plot(*points, mark, color=grey, mfc="white", ms=5, lw=1)
                chosen = [at for at, rate in enumerate(rates) if rate == float(dict(cell.choice or ())[RATE])]
                axis.plot(*([one[at] for at in chosen] for one in points), mark[0], color=grey, ms=6)
        dress(axis, task, f"{across}, {unit_name(scores[0])}", f"{up}, {unit_name(scores[1])}")
    for axis in axes.ravel()[len(tasks) :]:
        axis.set_visible(False)
    tell_apart(figure, lines, "mean over the seeds; full: the rate that dev chose; a line follows the rates in order")
    return figure


def means_by_rate(cell: Cell, scores: Sequence[str]) -> tuple[list[float], list[list[float]]]:
    """The learning rates at which all scores are there, ascending, and of every score its means there, as shown."""
    found = [values_by_rate(cell, score) for score in scores]
    rates = sorted(set.intersection(*(set(one) for one in found)))
    return rates, [[unit(score) * fmean(one[rate]) for rate in rates] for score, one in zip(scores, found, strict=True)]


def growth_figure(results: Results) -> Any:
    """Measures of the total update after every expert, mean over the seeds at what dev chose.

    A panel for every measure (across), and every task and point of a sweep (down).
    """
    study = results.study
    names = [name for name in study.scores if score_of(study, next(iter(study.tasks)), name).startswith(LEDGER)]
    points = list(dict.fromkeys((task, row.sweep) for task in study.tasks for row in results.rows))
    look = styles([label_of(study, row.adapter, row.strategy, None) for row in results.rows])
    title = f"{study.title}: after every expert"
    figure, axes = grid_of(title, len(points), len(names), width=3.0, height=2.2)
    lines: dict[str, Any] = {}
    for (task, sweep), of_point in zip(points, axes, strict=True):
        for name, axis in zip(names, of_point, strict=True):
            key = score_of(study, task, name).removeprefix(LEDGER)
            for row in (one for one in results.rows if one.sweep == sweep):
                chosen = [one.experts for one in results.cells[task, row.label].chosen if one.experts]
                if chosen and all(one["expert"] == chosen[0]["expert"] and key in one for one in chosen):
                    label = label_of(study, row.adapter, row.strategy, None)
                    mark, grey = look[label]
                    means = [fmean(of_expert) for of_expert in zip(*(one[key] for one in chosen), strict=True)]
                    shares = [expert / chosen[0]["expert"][-1] for expert in chosen[0]["expert"]]
                    (lines[label],) = axis.plot(shares, means, mark, color=grey, mfc="white", ms=4, lw=1)
            parts = [task] if len(study.tasks) > 1 else []
            parts += [f"{short(sweep[0])} {text_of(sweep[1])}"] if sweep else []
            dress(axis, ": ".join([*parts, name]), "share of the experts", name)
    tell_apart(figure, lines, "after every expert, mean over the seeds at what dev chose")
    return figure
