"""The figure of an inspection: four panels that can be told apart in grey."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasc_ds.inspection_rows import Row

GREYS = (0.72, 0.0)  # of the first expert's spectrum, of the last one's
STYLES = (("o-", "0.0"), ("s--", "0.55"), ("^:", "0.3"))  # marks, dashes and greys


def draw(rows: Sequence[Row], title: str) -> Any:
    """A matplotlib figure of the rows: spectra, ranks, overlaps of successive experts, noise against signal."""
    from matplotlib.figure import Figure  # here, since it takes a second and is needed here only

    figure = Figure(figsize=(10, 7.5), layout="constrained")
    figure.suptitle(title)
    axes: Any = figure.subplots(2, 2)
    draw_spectra(axes[0, 0], rows)
    experts = [row.expert for row in rows]
    bound = [row.bound for row in rows]
    axes[0, 1].plot(experts, bound, "o-", color="0.7", ms=9, lw=4, label="at most")
    draw_curves(
        axes[0, 1],
        experts,
        {
            "numerical rank": [row.numerical_rank for row in rows],
            "effective rank": [row.effective_rank for row in rows],
            "stable rank": [row.stable_rank for row in rows],
        },
    )
    axes[0, 1].set(title="rank of the total update", ylabel="rank", ylim=(0, 1.3 * max(bound)))
    draw_curves(
        axes[1, 0],
        experts,
        {
            "cosine of the two updates": [row.overlap for row in rows],
            "shared part of the column spaces": [row.column_overlap for row in rows],
            "shared part of the row spaces": [row.row_overlap for row in rows],
        },
    )
    axes[1, 0].set(title="overlap with the expert before", ylabel="1: the same, 0: orthogonal")
    draw_curves(
        axes[1, 1],
        experts,
        {
            "noise before the expert / its update": [row.noise for row in rows],
            "all noise so far / total update": [row.total_noise for row in rows],
        },
    )
    axes[1, 1].set(title="noise against signal", ylabel="ratio of Frobenius norms")
    if len(rows) == 1 and rows[0].overlap is None:
        leave_out(axes[1, 0], "there is one expert")
    if not any(row.total_noise for row in rows):
        leave_out(axes[1, 1], "there was no noise")
    for axis in (one for one in axes.flat if one.get_lines()):
        axis.grid(color="0.9", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        # Ranks grow from corner to corner, so room is made above them; elsewhere the best place is found.
        place = {"loc": "upper left", "ncols": 2} if axis is axes[0, 1] else {"loc": "best"}
        axis.legend(framealpha=0.85, edgecolor="none", **place)
    return figure


def draw_curves(axis: Any, experts: Sequence[int], curves: dict[str, Sequence[float | None]]) -> None:
    """A curve per label over the experts; what is None is left out."""
    for (label, values), (style, colour) in zip(curves.items(), STYLES, strict=False):
        known = [(x, y) for x, y in zip(experts, values, strict=True) if y is not None]
        axis.plot([x for x, _ in known], [y for _, y in known], style, color=colour, label=label, ms=4, lw=1.2)
    axis.set(xlabel="expert", xlim=(experts[0] - 0.5, experts[-1] + 0.5))
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def leave_out(axis: Any, reason: str) -> None:
    """A panel without anything to show says why."""
    for line in axis.get_lines():
        line.remove()
    axis.set(xticks=[], yticks=[], xlabel="", ylabel="")
    axis.spines[:].set_visible(False)
    axis.text(0.5, 0.5, reason, transform=axis.transAxes, ha="center", color="0.4")


def draw_spectra(axis: Any, rows: Sequence[Row]) -> None:
    """Singular values of the total update after every expert, the later the darker."""
    for position, row in enumerate(rows):
        part = position / (len(rows) - 1) if len(rows) > 1 else 1.0
        ends = position in (0, len(rows) - 1)
        values = [value for value in row.singular_values if value > 1e-6 * row.singular_values[0]]
        axis.plot(
            range(1, len(values) + 1),
            values,
            color=str(GREYS[0] + part * (GREYS[1] - GREYS[0])),
            lw=1.8 if ends else 0.8,
            label=f"after expert {row.expert}" if ends else None,
        )
    axis.set(title="spectrum of the total update", xlabel="index", ylabel="singular value", yscale="log")
    axis.xaxis.get_major_locator().set_params(integer=True)
