"""The curves of one run, from its `metrics.jsonl`: losses and scores over the steps, with the boundaries marked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from lorasc_ds.errors import ConfigError

STYLES = ("o-", "s--", "^:", "D-.", "v-", "P--", "X:")  # marks and dashes, so that colour is not needed
GREYS = ("0.0", "0.4", "0.0", "0.4", "0.6", "0.2", "0.6")
LINES = 60  # boundaries that are lines; of more, ticks at the lower edge
MARKS = 40  # scores that are marked one by one

Event = dict[str, Any]


def read_events(path: Path) -> list[Event]:
    """
    Raises:
        ConfigError: a line is none; the last one may be cut short, as of a run that goes on.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines[:-1]]
    except ValueError as error:
        raise ConfigError(f"{path} holds a line that is no JSON ({error}): remove that line, or the file") from error


def draw(events: Sequence[Event], title: str) -> Any:
    """A matplotlib figure: the losses above, the first other metric of every split below.

    Args:
        events: in their order, with at least one evaluation or record of the loss.
    """
    from matplotlib.figure import Figure  # here, since it takes a second and is needed here only

    steps = [one for one in events if one["event"] == "step"]
    scored = {one["step"]: one["scores"] for one in events if one["event"] == "eval"}
    metric = next((key for of in scored.values() for split in of.values() for key in split if key != "loss"), None)
    figure = Figure(figsize=(9, 7.2 if metric else 4.2), layout="constrained")
    figure.suptitle(title)
    axes: Any = figure.subplots(2 if metric else 1, sharex=True, squeeze=False)[:, 0]
    draw_losses(axes[0], steps, scored)
    draw_signs(axes[0], [one for one in events if one["event"] == "warning" and "sign" in one])
    if metric:
        draw_scores(axes[1], scored, metric)
    closed = [one["step"] for one in events if one["event"] == "close"]
    for at, axis in enumerate(axes):
        draw_boundaries(axis, closed, "_" if at else "expert merged")
        axis.grid(axis="y", color="0.9", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    axes[-1].set_xlabel("optimizer step")
    return figure


def draw_losses(axis: Any, steps: Sequence[Event], scored: dict[int, Any]) -> None:
    """The recorded training loss, and the dev loss of what would have shipped."""
    known = [one for one in steps if one["loss"] is not None]
    axis.plot([one["step"] for one in known], [one["loss"] for one in known], color="0.65", lw=1, label="training")
    dev = {step: scores["dev"]["loss"] for step, scores in scored.items() if "dev" in scores}
    if dev:
        draw_line(axis, dev, STYLES[0], GREYS[0], "dev")
    axis.set(ylabel="loss", ylim=(0, None))


def draw_scores(axis: Any, scored: dict[int, Any], metric: str) -> None:
    splits = dict.fromkeys(split for scores in scored.values() for split in scores)
    for split, style, grey in zip(splits, cycle(STYLES), cycle(GREYS)):
        values = {step: scores[split].get(metric) for step, scores in scored.items() if split in scores}
        draw_line(axis, values, style, grey, split.replace("_", " "))
    axis.set_ylabel(metric.replace("_", " "))


def draw_line(axis: Any, values: dict[int, float | None], style: str, grey: str, label: str) -> None:
    """A curve with at most about `MARKS` marks; what is None is left out."""
    known = {step: value for step, value in values.items() if value is not None}
    every = 1 + len(known) // MARKS
    axis.plot([*known], [*known.values()], style, color=grey, mfc="white", ms=4.5, lw=1.2, label=label, markevery=every)


def draw_boundaries(axis: Any, closed: Sequence[int], label: str) -> None:
    """Where experts were merged; a label that begins with _ is not in the legend."""
    if len(closed) <= LINES:
        look = {"color": "0.6", "lw": 0.7, "ls": ":", "zorder": 0, "label": label}
        axis.vlines(closed, 0, 1, transform=axis.get_xaxis_transform(), **look)
    else:
        heights = [0.0] * len(closed)
        axis.plot(closed, heights, "|", color="0.3", ms=8, transform=axis.get_xaxis_transform(), label=label)


def draw_signs(axis: Any, warnings: Sequence[Event]) -> None:
    """What went wrong, at the upper edge."""
    for at, one in enumerate(warnings):
        place = {"xy": (one["step"], 1), "xycoords": axis.get_xaxis_transform()}
        words = one["sign"].replace("_", " ")
        axis.annotate(
            words, **place, xytext=(0, 6 + 12 * (at % 2)), textcoords="offset points", ha="center", fontsize=8
        )
        axis.plot([one["step"]], [1], "kv", ms=6, transform=axis.get_xaxis_transform(), clip_on=False)
