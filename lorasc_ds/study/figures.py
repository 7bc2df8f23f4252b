"""The figures of a study, as PNG and SVG: marks and dashes tell rows apart, so that grey is enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, product
from statistics import fmean
from typing import Any

from lorasc_ds.figure_files import files_of
from lorasc_ds.study.paper import TABLES
from lorasc_ds.study.plan import Row, baseline_of, short
from lorasc_ds.study.results import LEVEL, RATE, Results, at_every_rate, score_of, spread, values_of
from lorasc_ds.study.tables import is_plain

STYLES = ("o-", "s--", "^:", "D-.", "v-", "P--", "X:", "*-.")
GREYS = ("0.0", "0.45", "0.0", "0.45", "0.6", "0.3", "0.6", "0.3")
FEW_ROWS = 4  # whose marks beside each other can be told apart
WIDTH = 3.4  # inches of a panel
Curves = Mapping[str, Mapping[float, Sequence[float]]]  # line -> x -> values by seed


def draw(results: Results) -> dict[str, bytes]:
    """File name -> content: the table as a picture, a line per strategy over what is swept, and over learning rates.

    Where few rows are compared on three tasks or more, also by how much they differ from the baseline.
    """
    figures = {"scores": scores_figure(results)}
    compared = [row for row in results.rows if row != baseline_of(results.rows, row)]
    if len(results.study.tasks) > 2 and 0 < len(compared) <= FEW_ROWS and not any(row.sweep for row in compared):
        figures["differences"] = differences_figure(results, compared)
    for key in dict.fromkeys(row.sweep[0] for row in results.rows if row.sweep):
        figures[f"over_{short(key)}"] = curves_figure(results, key, swept(results, key))
    if any(len({dict(one.run.choice).get(RATE) for one in cell.every}) > 1 for cell in results.cells.values()):
        curves = by_rate(results)
        figures["over_learning_rate"] = curves_figure(results, RATE, curves)
        if results.study.trade_off is not None:
            figures["trade_off"] = trade_off_figure(results, curves, *results.study.trade_off)
    return files_of(figures)


def panels(results: Results, height: float) -> tuple[Any, dict[tuple[str, str], Any]]:
    """A figure with a panel for every task (down) and score (across)."""
    from matplotlib.figure import Figure  # here, since it takes a second and is needed here only

    tasks, names = [*results.study.tasks], [*results.study.scores]
    figure = Figure(figsize=(1.6 + WIDTH * len(names), 1.2 + height * len(tasks)), layout="constrained")
    figure.suptitle(results.study.title)
    axes = figure.subplots(len(tasks), len(names), squeeze=False)
    found = {(task, name): axes[i, j] for i, task in enumerate(tasks) for j, name in enumerate(names)}
    for (task, name), axis in found.items():
        axis.set_title(f"{task}: {name}" if len(tasks) > 1 else name, fontsize=10)
        axis.grid(color="0.9", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, found


def unit(score: str) -> float:
    """What a value is multiplied by to be shown."""
    return 1.0 if is_plain(score) else 100.0


def scores_figure(results: Results) -> Any:
    """Mean and standard deviation of every row; full marks differ from the baseline's, diamonds are quoted."""
    figure, axes = panels(results, 0.6 + 0.24 * len(results.rows))
    quoted = TABLES[results.study.paper].rows if results.study.paper else {}
    for (task, name), axis in axes.items():
        score = score_of(results.study, task, name)
        for at, row in enumerate(results.rows):
            values = results.cells[task, row.label].values(score)
            tested = results.tested.get((task, row.label, name))
            if values:
                mean, deviation = (unit(score) * (one or 0.0) for one in spread(values))
                face = "black" if tested and tested.p < LEVEL else "white"
                axis.errorbar(mean, at, xerr=deviation, fmt="o", color="black", mfc=face, ms=5, lw=1, capsize=2)
            column = task if len(results.study.tasks) > 1 else name
            if column in quoted.get(row.label, {}):
                axis.plot(float(quoted[row.label][column]), at, "D", color="0.55", mfc="none", ms=6)
        labels = [row.label for row in results.rows] if name == next(iter(results.study.scores)) else []
        axis.set_yticks(range(len(results.rows)), labels or [""] * len(results.rows), fontsize=8)
        axis.set(ylim=(len(results.rows) - 0.5, -0.5), xlabel="per cent" if unit(score) > 1 else "value")
    figure.supxlabel(f"full: differs from {results.rows[0].label}, p < {LEVEL} (Holm)", fontsize=8)
    return figure


def differences_figure(results: Results, rows: Sequence[Row]) -> Any:
    """A panel for every score, with every task's mean difference to the baseline, paired, and its 95 % interval."""
    from matplotlib.figure import Figure
    from scipy.stats import t

    tasks, names = [*results.study.tasks], [*results.study.scores]
    height = 1.6 + (0.15 + 0.17 * len(rows)) * len(tasks)
    figure = Figure(figsize=(2.2 + 2.4 * len(names), height), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    baseline, lines = results.rows[0].label, {}
    for (name, axis), (at, row) in product(zip(names, axes, strict=True), enumerate(rows)):
        for down, task in enumerate(tasks):
            score = score_of(results.study, task, name)
            ours, theirs = (results.cells[task, label].values(score) for label in (row.label, baseline))
            if not ours or not theirs:
                continue
            mean, deviation = spread(unit(score) * (x - y) for x, y in zip(ours, theirs, strict=True))
            half = (deviation or 0.0) * float(t.ppf(0.975, max(1, len(ours) - 1))) / math.sqrt(len(ours))
            tested = results.tested.get((task, row.label, name))
            style = {"color": GREYS[at], "mfc": GREYS[at] if tested and tested.p < LEVEL else "white"}
            y = down + 0.7 * ((at + 0.5) / len(rows) - 0.5)
            lines[row.label] = axis.errorbar(mean, y, xerr=half, fmt=STYLES[at][0], ms=5, lw=1, capsize=2, **style)
    for axis, name in zip(axes, names, strict=True):
        axis.axvline(0.0, color="0.6", lw=0.8)
        axis.grid(color="0.9", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        points = unit(score_of(results.study, tasks[0], name)) > 1
        axis.set(title=name, ylim=(len(tasks) - 0.5, -0.5), xlabel="percentage points" if points else "difference")
    axes[0].set_yticks(range(len(tasks)), tasks, fontsize=8)
    figure.suptitle(f"{results.study.title}: difference to {baseline}")
    note = f"bars: 95 % intervals over the seeds; full: p < {LEVEL} over seeds and over examples (Holm)"
    keys = {"loc": "outside lower center", "ncols": 4, "frameon": False, "fontsize": 8, "title_fontsize": 8}
    figure.legend(lines.values(), lines.keys(), title=note, **keys)
    return figure


def swept(results: Results, key: str) -> dict[tuple[str, str], Curves]:
    """Of every panel the values at the points of a sweep, each at what dev chose there."""
    found: dict[tuple[str, str], dict[str, dict[float, list[float]]]] = {}
    for (task, _), cell in results.cells.items():
        for name in results.study.scores:
            values = cell.values(score_of(results.study, task, name))
            if cell.row.sweep is not None and cell.row.sweep[0] == key and values:
                line = found.setdefault((task, name), {}).setdefault(line_of(results, cell.row), {})
                line[float(cell.row.sweep[1])] = values
    return dict(found)


def by_rate(results: Results) -> dict[tuple[str, str], Curves]:
    """Of every panel the values at every learning rate, with the rest of the choice that dev made; rows of no sweep."""
    found: dict[tuple[str, str], dict[str, dict[float, list[float]]]] = {}
    for (task, label), cell in results.cells.items():
        if cell.row.sweep is not None or cell.choice is None:
            continue
        for name in results.study.scores:
            score = score_of(results.study, task, name)
            values = {rate: values_of(records, score) for rate, records in at_every_rate(cell).items()}
            found.setdefault((task, name), {})[label] = {rate: one for rate, one in values.items() if one}
    return dict(found)


def line_of(results: Results, row: Row) -> str:
    adapters = {one.adapter for one in results.rows}
    return row.strategy if len(adapters) == 1 else f"{row.adapter} {row.strategy}"


def curves_figure(results: Results, key: str, curves: Mapping[tuple[str, str], Curves]) -> Any:
    """Means over x with bars of one standard deviation; a row with a failed seed has no point there."""
    figure, axes = panels(results, 2.4)
    for (task, name), axis in axes.items():
        factor = unit(score_of(results.study, task, name))
        lines = curves.get((task, name), {})
        for (label, points), style, grey in zip(lines.items(), cycle(STYLES), cycle(GREYS)):
            spreads = [(x, *(factor * (one or 0.0) for one in spread(points[x]))) for x in sorted(points)]
            if spreads:
                xs, means, deviations = zip(*spreads, strict=True)
                axis.errorbar(xs, means, deviations, fmt=style, color=grey, label=label, ms=4, lw=1.2, capsize=2)
        every = sorted({x for points in lines.values() for x in points})
        if every and every[0] > 0 and every[-1] / every[0] >= 3:
            axis.set_xscale("log")
            axis.set_xticks(every, [f"{x:g}" for x in every], fontsize=7)
            axis.minorticks_off()
        axis.set(xlabel=short(key).replace("_", " "), ylabel="per cent" if math.isclose(factor, 100) else "value")
    handles = {
        label: one for axis in axes.values() for one, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def trade_off_figure(results: Results, curves: Mapping[tuple[str, str], Curves], across: str, up: str) -> Any:
    """One score over another, means at every learning rate, a line through those of a row; what dev chose is full."""
    from matplotlib.figure import Figure

    tasks, columns = [*results.study.tasks], min(3, len(results.study.tasks))
    down = -(-len(tasks) // columns)
    figure = Figure(figsize=(1.2 + 3.0 * columns, 1.4 + 2.6 * down), layout="constrained")
    figure.suptitle(f"{results.study.title}: {up} and {across} at every learning rate")
    axes, lines = figure.subplots(down, columns, squeeze=False).ravel(), {}
    for axis in axes[len(tasks) :]:
        axis.set_visible(False)
    for task, axis in zip(tasks, axes, strict=False):
        factors = [unit(score_of(results.study, task, name)) for name in (across, up)]
        by_row = (curves.get((task, name), {}) for name in (across, up))
        xs_of, ys_of = ({label: one for label, one in rows.items() if one} for rows in by_row)
        for (label, style), grey in zip(zip(xs_of, cycle(STYLES), strict=False), cycle(GREYS)):
            chosen = dict(results.cells[task, label].choice or ())[RATE]
            rates = sorted(xs_of[label].keys() & ys_of[label].keys())
            points = [
                [f * fmean(of[label][rate]) for rate in rates] for f, of in zip(factors, (xs_of, ys_of), strict=True)
            ]
            (line,) = axis.plot(*points, style, color=grey, mfc="white", ms=5, lw=1)
            axis.plot(*([one[rates.index(chosen)]] for one in points), style[0], color=grey, ms=6)
            lines[label] = line
        axis.set_title(task, fontsize=9)
        axis.set(xlabel=across, ylabel=up)
        axis.grid(color="0.9", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    note = "mean over the seeds; full: the rate that dev chose; a line follows the rates in order"
    keys = {"loc": "outside lower center", "ncols": 4, "frameon": False, "fontsize": 8, "title_fontsize": 8}
    figure.legend(lines.values(), lines.keys(), title=note, **keys)
    return figure
