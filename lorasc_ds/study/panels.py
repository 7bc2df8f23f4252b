"""What the figures of a study share: panels, and marks, dashes and greys that tell rows apart without colour."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from lorasc_ds.study.tables import is_plain

MARKS = ("o-", "s--", "^:", "D-.", "v-", "P--", "X:", "*-.")
GREYS = ("0.0", "0.55", "0.3")  # as many as share no divisor with the marks: 24 rows before two are alike
LEAST_WIDTH, LETTER = 6.4, 0.1  # inches: of a figure of one panel, and of a letter of its title
LEGEND: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": 8, "title_fontsize": 8}


def styles(labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Label -> mark with dashes, and grey; by its position, so the same in every panel and figure."""
    return {label: (MARKS[at % len(MARKS)], GREYS[at % len(GREYS)]) for at, label in enumerate(dict.fromkeys(labels))}


def grid_of(title: str, down: int, across: int, *, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes, (down, across); sizes of a panel in inches."""
    from matplotlib.figure import Figure  # here, since it takes a second and is needed here only

    inches = max(LEAST_WIDTH, 1.6 + width * across)
    figure = Figure(figsize=(inches, 1.4 + height * down), layout="constrained")
    figure.suptitle(textwrap.fill(title, int(inches / LETTER)))
    return figure, figure.subplots(down, across, squeeze=False)


def dress(axis: Any, title: str, across: str, up: str = "") -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    axis.grid(color="0.9", lw=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def tell_apart(figure: Any, lines: Mapping[str, Any], note: str = "") -> None:
    """A legend below all panels, a note above it."""
    longest = max(map(len, lines), default=0)
    across = int(figure.get_figwidth() / (0.6 + 0.07 * longest))  # a mark with its margins, and letters of 8 points
    columns = max(1, min(4, len(lines), across))
    figure.legend(lines.values(), lines.keys(), title=note or None, ncols=columns, **LEGEND)


def unit(score: str) -> float:
    """What a value is multiplied by to be shown."""
    return 1.0 if is_plain(score) else 100.0


def unit_name(score: str) -> str:
    return "value" if is_plain(score) else "per cent"
