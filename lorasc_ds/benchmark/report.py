"""The results as JSON, as a Markdown table and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasc_ds.benchmark.results import Result, Target, table

FORMAT = 1


def write(directory: Path, results: Sequence[Result], about: dict[str, Any]) -> None:
    """`benchmark.json`, `benchmark.md` and `benchmark.png`."""
    content = {"format": FORMAT, "about": about, "results": [one.as_json() for one in results]}
    (directory / "benchmark.json").write_text(json.dumps(content, indent=2) + "\n")
    lines = [f"* {key}: {told(value)}" for key, value in about.items() if key != "options"]
    (directory / "benchmark.md").write_text(f"{table(results)}\n" + "\n".join(lines) + "\n")
    draw(directory / "benchmark.png", results)


def told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {told(one)}" for key, one in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def advantage(target: Target, value: float) -> float:
    """How many times as good as the target: 1 meets it, 2 is twice as good."""
    return value / target.bound if target.sign == ">=" else target.bound / value


MARKS = {  # verdict -> colour of a mark, in grey
    "met": "black",
    "missed": "white",
    "not judged: small shapes": "0.7",
}
FURTHEST = 30.0  # times as good, or as bad, as the picture shows


def draw(path: Path, results: Sequence[Result]) -> None:
    """A mark for every ratio or number with a target above zero: how many times as good as it, with its quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [one for one in results if one.value and one.target and one.target.bound > 0]
    figure, axes = pyplot.subplots(figsize=(11, 1.6 + 0.3 * max(1, len(shown))), layout="constrained")

    def place(one: Result, value: float | None) -> float:
        assert one.target is not None
        return min(FURTHEST, max(1 / FURTHEST, advantage(one.target, value or one.value or 1.0)))

    for at, one in enumerate(shown):
        axes.plot([place(one, one.low), place(one, one.high)], [at, at], color="0.45", linewidth=3)
        axes.plot([1, place(one, None)], [at, at], color="black", linewidth=0.8)
        axes.annotate(f"{one.value:.3g} ({one.target})", (1.3 * FURTHEST, at), va="center", fontsize=8)
    for verdict, colour in MARKS.items():
        places = [(place(one, None), at) for at, one in enumerate(shown) if one.verdict == verdict]
        if places:
            axes.scatter(*zip(*places, strict=True), color=colour, edgecolor="black", zorder=3, label=verdict)
    axes.axvline(1, color="black", linewidth=1.5)
    axes.set_xscale("log")
    axes.set_xlim(0.7 / FURTHEST, 8 * FURTHEST)
    axes.set_xticks([0.1, 1, 10], ["10 times short", "target", "10 times as good"])
    axes.minorticks_off()
    axes.set_yticks(range(len(shown)), [f"{one.row}  {one.measure}" for one in shown], fontsize=8)
    axes.invert_yaxis()
    if shown:
        figure.legend(loc="outside lower center", ncols=len(MARKS), frameon=False, fontsize=8)
    axes.set_title("measured against the targets; numbers: result (target); bars: quartiles", fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
