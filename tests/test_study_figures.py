"""The figures of a study, of hand-made results: what is drawn where, and that it can be read in grey."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from PIL import Image
from study_cases import YAML, good, parse, written

from lorasc_ds.study import figures
from lorasc_ds.study.comparison_figures import differences_figure, growth_figure, trade_off_figure
from lorasc_ds.study.options import StudyOptions
from lorasc_ds.study.panels import styles
from lorasc_ds.study.records import Record
from lorasc_ds.study.results import results_of
from lorasc_ds.study.study import read

Parsed = Callable[..., StudyOptions]


@pytest.fixture
def parsed(tmp_path: Path) -> Parsed:
    return partial(parse, tmp_path)


def test_figures_can_be_read_in_grey_and_are_the_same_at_every_call(parsed: Parsed) -> None:
    options = parsed(change=("grid: {training", "sweep: {training.epochs: [1, 2]}\ngrid: {training"))
    written(options, good)
    results = results_of(options.study, read(options))
    drawn = figures.draw(results)
    names = ("scores", "over_epochs")  # all rows are swept: over the rates there is nothing to draw
    assert drawn.keys() == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert drawn == figures.draw(results)
    for name in names:
        pixels = np.asarray(Image.open(io.BytesIO(drawn[f"{name}.png"])).convert("L"))
        assert (pixels < 60).any()
        assert (pixels > 200).any()
        colours = {*re.findall(r"(?:fill|stroke): ?#([0-9a-f]{6})", drawn[f"{name}.svg"].decode())}
        assert colours
        assert all(colour[:2] == colour[2:4] == colour[4:] for colour in colours), "no colour in what is not converted"
    looks = styles([f"row {at}" for at in range(24)]).values()
    assert len({*looks}) == 24, "no two rows have one mark, dashes and grey"
    assert all(float(two) - float(one) > 0.2 for one, two in pairwise(sorted({grey for _, grey in looks})))


def test_differences_are_drawn_with_their_intervals_where_tasks_are_many_and_rows_few(parsed: Parsed) -> None:
    two = parsed()
    written(two, good)
    assert "differences.png" not in figures.draw(results_of(two.study, read(two)))
    three = parsed(change=("  one: {}", "  one: {}\n  half: {set: {task.label_noise: 0.5}}"))
    written(replace(three, runs=tuple(run for run in three.runs if run.task == "half")), good)
    results = results_of(three.study, read(three))
    assert "differences.png" in figures.draw(results)
    figure = differences_figure(results, [row for row in results.rows if row.label == "Slow"])
    for axis in figure.axes:
        assert len(axis.containers) == 3
        for mark in axis.containers:
            line, _, (bar,) = mark.lines
            ((left, _), (right, _)) = bar.get_segments()[0]
            expected = scipy.stats.ttest_1samp([60.0, 60.0, 62.0], 0.0).confidence_interval(0.95)  # of `good`, by seed
            assert line.get_xdata() == pytest.approx([182 / 3])
            assert (left, right) == pytest.approx((expected.low, expected.high))


def by_rate(task: str, row: str, choice: Any, seed: int) -> tuple[float, list[float]]:
    """Right of 10: LoRA on 2 and 8 at the two rates, Slow on 5 and 6; dev is for the higher one and α = 0.8."""
    high = choice["training.learning_rate"] == 0.01
    dev = 0.5 * high + 0.1 * choice.get("cascade.slow_retention", 0.0)
    right = (8 if high else 2) if row == "LoRA" else (6 if high else 5)
    return dev, [1.0] * right + [0.0] * (10 - right)


def test_a_trade_off_is_drawn_over_the_rates_with_the_rest_as_dev_chose_it(parsed: Parsed) -> None:
    options = parsed(change=("seeds:", "trade_off: [old, new]\nseeds:"))
    written(options, by_rate)
    results = results_of(options.study, read(options))
    assert {"trade_off.svg", "over_learning_rate.png"} <= figures.draw(results).keys()
    panel = trade_off_figure(results, "old", "new").axes[0]
    assert (panel.get_title(), panel.get_xlabel(), panel.get_ylabel()) == ("one", "old, per cent", "new, per cent")
    lines = [(list(line.get_xdata()), list(line.get_ydata()), line.get_mfc()) for line in panel.lines]
    assert [xs for xs, _, _ in lines] == [pytest.approx(xs) for xs in ([20, 80], [80], [50, 60], [60])]
    assert all(xs == ys for xs, ys, _ in lines), "the hand-made runs score alike on both"
    assert [face == "white" for _, _, face in lines] == [True, False, True, False]


def test_a_trade_off_has_the_rows_of_a_sweep_and_leaves_out_what_is_not_there(parsed: Parsed) -> None:
    sweep = ("grid: {cascade.slow_retention: [0.5, 0.8]}", "sweep: {cascade.slow_retention: [0.5, 0.8]}")
    options = parsed(text=YAML.replace("seeds:", "trade_off: [old, new]\nseeds:"), change=sweep)
    written(options, by_rate)
    failing = next(run for run in options.runs if run.row.label == "LoRA" and run.choice[0][1] == 1e-3)
    shutil.rmtree(options.directory(failing))
    results = results_of(options.study, read(options))
    drawn = trade_off_figure(results, "old", "new").axes[0].lines
    assert [list(line.get_xdata()) for line in drawn] == [
        pytest.approx(xs) for xs in ([80], [80], *([50, 60], [60]) * 2)
    ]
    over = figures.curves_figure(
        results,
        "cascade.slow_retention",
        figures.swept(results, "cascade.slow_retention"),
        figures.values_of_unswept(results),
    )
    level, *_ = over.axes[0].lines
    assert list(level.get_ydata()) == pytest.approx([80, 80]), "LoRA, as dev chose it, beside the sweep"


def test_the_growth_of_ranks_is_drawn_for_every_point_of_a_sweep(parsed: Parsed) -> None:
    """Of experts 1 and 2, seed s, Slow at epochs e: ranks e + s and 2·e + s; the mean over seeds 0 to 2 adds 1."""
    text = YAML.replace(
        "new: new_domain/accuracy, old: old_domain/accuracy", "new: new_domain/accuracy, rank: ledger/rank"
    )
    options = parsed(
        "--tasks=one", text=text, change=("grid: {training", "sweep: {training.epochs: [1, 4]}\ngrid: {training")
    )
    written(options, good)

    def inspected(record: Record) -> Record:
        epochs, seed = record.run.config.training.epochs, record.run.seed
        once = record.run.row.strategy == "LoRA"
        experts = (
            {"expert": [1], "rank": [8.0]} if once else {"expert": [1, 2], "rank": [epochs + seed, 2 * epochs + seed]}
        )
        return replace(record, experts=experts)

    results = results_of(options.study, [inspected(one) for one in read(options)])
    assert "over_the_run.png" in figures.draw(results)
    one, four = growth_figure(results).axes
    assert (one.get_title(), four.get_title()) == ("epochs 1: rank", "epochs 4: rank")
    for axis, epochs in ((one, 1), (four, 4)):
        lines = [[list(line.get_xdata()), list(line.get_ydata())] for line in axis.lines]
        assert lines == [[[1.0], [8.0]], [[0.5, 1.0], [epochs + 1.0, 2 * epochs + 1.0]]]
