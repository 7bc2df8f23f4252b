"""The figures of a study, as PNG and SVG, readable in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorasc_ds.figure_files import files_of
from lorasc_ds.study.comparison_figures import differences_figure, growth_figure, trade_off_figure
from lorasc_ds.study.panels import dress, grid_of, styles, tell_apart, unit, unit_name
from lorasc_ds.study.paper import TABLES
from lorasc_ds.study.plan import Row, baseline_of, label_of, short
from lorasc_ds.study.results import LEVEL, RATE, Results, score_of, spread, values_by_rate
from lorasc_ds.study.tables import columns_of

FEW_ROWS = 4  # whose marks beside each other can be told apart
Curves = Mapping[str, Mapping[float, Sequence[float]]]  # line -> x -> values by seed


def draw(results: Results) -> dict[str, bytes]:
    """File name -> content: the table as a picture, a line per strategy over what is swept, and over learning rates.

    Where few rows are compared on three tasks or more, also by how much they differ from the baseline; where ledgers
    were inspected, ranks over the experts; and the study's `trade_off`.
    """
    study, rows = results.study, results.rows
    figures = {"scores": scores_figure(results)}
    compared = [row for row in rows if row != baseline_of(rows, row)]
    if len(study.tasks) > 2 and 0 < len(compared) <= FEW_ROWS and not any(row.sweep for row in compared):
        figures["differences"] = differences_figure(results, compared)
    for key in dict.fromkeys(row.sweep[0] for row in rows if row.sweep):
        levels = {} if key in study.sweep else values_of_unswept(results)
        figures[f"over_{short(key)}"] = curves_figure(results, key, swept(results, key), levels)
    by_rate = over_rates(results)
    if any(len(points) > 1 for curves in by_rate.values() for points in curves.values()):
        figures["over_learning_rate"] = curves_figure(results, RATE, by_rate, {})
    if study.trade_off is not None:
        figures["trade_off"] = trade_off_figure(results, *study.trade_off)
    if any(record.experts for cell in results.cells.values() for record in cell.chosen):
        figures["over_the_run"] = growth_figure(results)
    return files_of(figures)


def scores_figure(results: Results) -> Any:
    """Mean and standard deviation of every row; full marks differ from the baseline's, diamonds are quoted."""
    study, rows = results.study, results.rows
    quoted = TABLES[study.paper] if study.paper else None
    _, first_table = columns_of(results)[0]  # the one beside which the paper's is quoted
    heads = {(task, name): head for head, task, name in first_table}
    height = 0.6 + 0.24 * len(rows)
    figure, axes = grid_of(study.title, len(study.tasks), len(study.scores), width=3.4, height=height)
    shown = False
    for task, across in zip(study.tasks, axes, strict=True):
        for name, axis in zip(study.scores, across, strict=True):
            score = score_of(study, task, name)
            for at, row in enumerate(rows):
                values = results.cells[task, row.label].values(score)
                tested = results.tested.get((task, row.label, name))
                if values:
                    mean, deviation = (unit(score) * (one or 0.0) for one in spread(values))
                    face = "black" if tested and tested.p < LEVEL else "white"
                    axis.errorbar(mean, at, xerr=deviation, fmt="o", color="black", mfc=face, ms=5, lw=1, capsize=2)
                theirs = quoted.of(row) if quoted else {}
                if (value := theirs.get(heads.get((task, name), ""))) is not None:
                    axis.plot(float(value), at, "D", color="0.55", mfc="none", ms=6)
                    shown = True
            dress(axis, f"{task}: {name}" if len(study.tasks) > 1 else name, unit_name(score))
            axis.set(ylim=(len(rows) - 0.5, -0.5))
            first = name == next(iter(study.scores))
            axis.set_yticks(range(len(rows)), [row.label if first else "" for row in rows], fontsize=8)
    note = f"full: differs from {results.baseline}, p < {LEVEL} (Holm)"
    figure.supxlabel(f"{note}{'; diamonds: quoted from the paper' if shown else ''}", fontsize=8)
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


def values_of_unswept(results: Results) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Of every panel the values of rows without a sweep, to be drawn beside one."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for (task, label), cell in results.cells.items():
        for name in results.study.scores:
            values = cell.values(score_of(results.study, task, name))
            if cell.row.sweep is None and values:
                found.setdefault((task, name), {})[label] = values
    return found


def over_rates(results: Results) -> dict[tuple[str, str], Curves]:
    """Of every panel the values at every learning rate, with the rest of the choice that dev made; rows of no sweep."""
    return {
        (task, name): {
            row.label: values_by_rate(results.cells[task, row.label], score_of(results.study, task, name))
            for row in results.rows
            if row.sweep is None
        }
        for task in results.study.tasks
        for name in results.study.scores
    }


def line_of(results: Results, row: Row) -> str:
    """The label of a row without the point of its sweep."""
    return label_of(results.study, row.adapter, row.strategy, None)


def curves_figure(
    results: Results,
    key: str,
    curves: Mapping[tuple[str, str], Curves],
    levels: Mapping[tuple[str, str], Mapping[str, Sequence[float]]],
) -> Any:
    """Means over x with bars of one standard deviation; a row with a failed seed has no point there.

    Args:
        levels: panel -> line -> values by seed of what has no x: a level line, with a band of one standard deviation.
    """
    study = results.study
    look = styles([line_of(results, row) for row in results.rows])
    figure, axes = grid_of(study.title, len(study.tasks), len(study.scores), width=3.4, height=2.4)
    lines: dict[str, Any] = {}
    for task, across in zip(study.tasks, axes, strict=True):
        for name, axis in zip(study.scores, across, strict=True):
            score = score_of(study, task, name)
            every = sorted({x for points in curves.get((task, name), {}).values() for x in points})
            for label, values in levels.get((task, name), {}).items():
                mean, deviation = (unit(score) * (one or 0.0) for one in spread(values))
                mark, grey = look[label]
                lines[label] = axis.axhline(mean, color=grey, ls=mark[1:], lw=1)
                axis.axhspan(mean - deviation, mean + deviation, color="0.93", zorder=0)
            for label, points in curves.get((task, name), {}).items():
                spreads = [(x, *(unit(score) * (one or 0.0) for one in spread(points[x]))) for x in sorted(points)]
                if spreads:
                    mark, grey = look[label]
                    xs, means, deviations = zip(*spreads, strict=True)
                    lines[label] = axis.errorbar(xs, means, deviations, fmt=mark, color=grey, ms=4, lw=1.2, capsize=2)
            if every and every[0] > 0 and every[-1] / every[0] >= 3:
                axis.set_xscale("log")
                axis.set_xticks(every, [f"{x:g}" for x in every], fontsize=7)
                axis.minorticks_off()
            title = f"{task}: {name}" if len(study.tasks) > 1 else name
            dress(axis, title, short(key).replace("_", " "), unit_name(score))
    tell_apart(figure, {label: lines[label] for label in look if label in lines})
    return figure
