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


def draw(path: Path, results: Sequence[Result]) -> None:
    """A bar for every result with a target that is no zero: how many times as good as it, quartiles as a whisker."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [
        (one, one.target, one.value)
        for one in results
        if one.target is not None and one.target.bound > 0 and one.target.sign != "==" and (one.value or 0) > 0
    ]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.36 * max(1, len(shown))), layout="constrained")
    for at, (one, target, value) in enumerate(shown):
        good = advantage(target, value)
        style = {"met": ("0.35", ""), "missed": ("1.0", "////")}.get(one.verdict, ("0.85", ""))
        axes.barh(at, good - 1, left=1, color=style[0], hatch=style[1], edgecolor="black", height=0.66)
        if one.low is not None and one.high is not None and one.low > 0:
            ends = [advantage(target, one.low), advantage(target, one.high)]
            axes.plot(ends, [at, at], color="black", linewidth=1.2)
        axes.annotate(
            f"{value:.3g} ({target})",
            (max(good, 1), at),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.axvline(1, color="black", linewidth=1.5)
    axes.set_xscale("log")
    axes.set_yticks(range(len(shown)), [f"{one.row}  {one.measure}" for one, _, _ in shown], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("times as good as the target (dark: met, hatched: missed, pale: not judged)")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
