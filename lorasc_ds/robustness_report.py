"""The scores on ImageNet and its robustness sets as the paper's Table 3 has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLUMNS = {  # task -> its column in the paper's Table 3
    "imagenet": "ImageNet",
    "imagenet_v2": "IN-V2",
    "imagenet_c": "IN-C",
    "imagenet_r": "IN-R",
    "imagenet_a": "IN-A",
    "imagenet_sketch": "IN-SK",
    "imagenet_stylized": "IN-ST",
}
QUOTED = {  # rows of that table, CLIP ViT-bigG/14
    "LoRA (quoted)": ("87.1", "77.7", "66.2", "87.1", "72.6", "64.9", "24.1"),
    "LoRASC (quoted)": ("87.8", "78.4", "66.8", "88.7", "73.4", "65.5", "24.4"),
}
CORRUPTED = ("imagenet_c", "corrupted_images")


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table: its title, a heading, rows of as many cells, and what is to be known of it, a line each."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def tell(folder: Path, summary: Mapping[str, Any]) -> None:
    """Print the tables of a summary and write them to `robustness.md`, where there is one."""
    tables = sheets(summary)
    if tables:
        print(as_text(tables))
        (folder / "robustness.md").write_text(as_markdown(tables), encoding="utf-8")


def sheets(summary: Mapping[str, Any]) -> list[Sheet]:
    """The tables of what was scored: the seven sets, then every set of corruptions.

    Args:
        summary: of an evaluation: `description`, `limit` and `tasks`, each with `metrics` by split.
    """
    scores = {name: task["metrics"].get("test", {}) for name, task in summary["tasks"].items()}
    scores = {name: metrics for name, metrics in scores.items() if "accuracy" in metrics}
    found = [] if scores.keys().isdisjoint(COLUMNS) else [table_3(summary["description"], summary["limit"], scores)]
    return found + [by_severity(name, summary["limit"], scores[name]) for name in CORRUPTED if name in scores]


def table_3(subject: str, limit: int | None, scores: Mapping[str, Mapping[str, float]]) -> Sheet:
    """A row for the subject, and the paper's below it."""
    own = (percent(scores[name]["accuracy"]) if name in scores else "-" for name in COLUMNS)
    notes = ["quoted: the paper's Table 3, CLIP ViT-bigG/14, LoRA and +++ Noise Tuning"]
    absent = [name for name in COLUMNS if name not in scores]
    notes += [f"-: not scored ({', '.join(absent)})"] if absent else []
    notes += limited(limit, "this is not comparable with the quoted rows")
    mce = scores.get("imagenet_c", {}).get("mce")
    notes += [] if mce is None else [f"mCE {percent(mce)}: ImageNet-C's errors, each in percent of AlexNet's"]
    rows = (subject, *own), *((name, *values) for name, values in QUOTED.items())
    return Sheet("robustness, top-1 in percent", ("subject", *COLUMNS.values()), rows, tuple(notes))


def by_severity(task: str, limit: int | None, metrics: Mapping[str, float]) -> Sheet:
    """A row for every corruption, a column for every severity, and the means."""
    named = [name.split("/")[1:] for name in metrics if name.startswith("accuracy/")]
    corruptions = dict.fromkeys(parts[0] for parts in named)
    severities = sorted({parts[1] for parts in named if len(parts) == 2}, key=int)

    def cell(*parts: str) -> str:
        name = "/".join(("accuracy", *parts))
        return percent(metrics[name]) if name in metrics else "-"

    rows = [(one, *(cell(one, severity) for severity in severities), cell(one)) for one in corruptions]
    rows.append(("mean", *("" for _ in severities), cell()))
    head = ("corruption", *severities, "mean")
    return Sheet(f"by severity, top-1 in percent: {task}", head, tuple(rows), tuple(limited(limit)))


def limited(limit: int | None, *more: str) -> list[str]:
    """A note where not all images were scored."""
    text = f"limited: at most {limit} images of every class, and of every corruption and severity"
    return [] if limit is None else ["; ".join((text, *more))]


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def as_text(tables: Sequence[Sheet]) -> str:
    """For a terminal."""
    return "\n".join(line for one in tables for line in text_lines(one))


def text_lines(sheet: Sheet) -> list[str]:
    lines = [sheet.head, *sheet.rows]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    aligned = [
        "  ".join((f"  {name:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(cells, others, strict=True))))
        for name, *cells in lines
    ]
    return [sheet.title, *aligned, *(f"  {note}" for note in sheet.notes)]


def as_markdown(tables: Sequence[Sheet]) -> str:
    """For `robustness.md`."""
    return "\n\n".join(markdown(one) for one in tables) + "\n"


def markdown(sheet: Sheet) -> str:
    rule = ("---", *("---:" for _ in sheet.head[1:]))
    lines = [f"| {' | '.join(escaped(cell) for cell in row)} |" for row in (sheet.head, rule, *sheet.rows)]
    title = escaped(f"## {sheet.title[0].upper()}{sheet.title[1:]}")
    return "\n".join([title, "", *lines, *(line for note in sheet.notes for line in ("", escaped(note)))])


def escaped(text: str) -> str:
    """What Markdown shows as this text in a cell."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("_", "\\_")
