"""The tables of a study in the paper's layout, as Markdown and as LaTeX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lorasc_ds.robustness_report import Sheet
from lorasc_ds.study.paper import TABLES, Quoted
from lorasc_ds.study.plan import Row, baseline_of, short, text_of
from lorasc_ds.study.results import LEVEL, RATE, Cell, Results, metric_of, score_of, spread
from lorasc_ds.study.selection import lower_is_better
from lorasc_ds.study.statistics import TEST

PLAIN_NUMBERS = {"loss", "perplexity", "mce", "ledger"}  # in the names of scores that are no shares
AT_AN_END = "†"
OF_P = (
    "in brackets p before the correction",
    "(seeds): tested over the seeds alone, since it is no mean over examples that both sides share",
)
LATEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {letter: f"\\{letter}" for letter in "&%_#${}"}
LATEX |= {
    "†": r"$\dagger$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "α": r"$\alpha$",
    "λ": r"$\lambda$",
    "<": "$<$",
    ">": "$>$",
}


def sheets(results: Results) -> list[Sheet]:
    """The tables: scores with what is quoted beside them, differences, choices, warnings, and what failed."""
    found = score_sheets(results)
    if results.study.paper is not None:
        quoted = TABLES[results.study.paper]
        same = any(column in of_row for column in found[0].head for of_row in quoted.rows.values())
        found = [beside(found[0], results.rows, quoted), *found[1:]] if same else [*found, as_sheet(quoted)]
    return [
        *found,
        *difference_sheets(results),
        choice_sheet(results),
        *warning_sheets(results),
        *failure_sheets(results),
    ]


def columns_of(results: Results) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Title and columns of every table of scores; of a column its head, the task, and the name of the score."""
    study = results.study
    if len(study.tasks) == 1 and len(study.scores) > 1:
        (task,) = study.tasks
        return [(study.title, [(name, task, name) for name in study.scores])]
    return [(f"{study.title}: {name}", [(task, task, name) for task in study.tasks]) for name in study.scores]


def score_sheets(results: Results) -> list[Sheet]:
    """Of one task a column for each of several scores; else a table for every score, with the tasks as columns."""
    seeds = results.study.seeds
    notes = (
        f"mean ± standard deviation over {len(seeds)} seeds ({', '.join(map(str, seeds))}); hyper-parameters chosen by"
        " dev",
        f"↑ ↓: higher or lower than {results.baseline}, p < {LEVEL} (below)",
        *incomplete(results),
    )

    def rows(columns: Sequence[tuple[str, str, str]]) -> list[tuple[str, ...]]:
        return [
            (row.label, *(score_text(results, task, row, name) for _, task, name in columns)) for row in results.rows
        ]

    return [
        Sheet(
            title,
            ("method", *(head for head, _, _ in columns)),
            tuple(rows(columns)),
            (*notes, *lower_better(results, columns)),
        )
        for title, columns in columns_of(results)
    ]


def lower_better(results: Results, columns: Sequence[tuple[str, str, str]]) -> list[str]:
    heads = [head for head, task, name in columns if lower_is_better(score_of(results.study, task, name))]
    which = "" if len(heads) == len(columns) else f": {', '.join(heads)}"
    return [f"the lower the better{which}"] * bool(heads)


def incomplete(results: Results) -> list[str]:
    cells = results.cells.values()
    missing, every = sum(cell.count("missing") for cell in cells), sum(len(cell.every) for cell in cells)
    return [f"INCOMPLETE: {missing} of {every} runs are not there yet; choices and numbers may change"] * bool(missing)


def score_text(results: Results, task: str, row: Row, name: str) -> str:
    """Mean and spread; or how many runs failed, where no point of the grid has all its seeds."""
    cell, score = results.cells[task, row.label], score_of(results.study, task, name)
    values = cell.values(score)
    if not values:
        return f"failed {cell.count('failed')}/{len(cell.every)}" if cell.count("failed") else "-"
    tested = results.tested.get((task, row.label, name))
    failed = f" ({cell.count('failed')} failed)" if cell.count("failed") else ""
    return spread_text(score, values) + ("" if tested is None else tested.mark) + failed


def spread_text(score: str, values: Sequence[float]) -> str:
    mean, deviation = spread(values)
    return number(score, mean) + ("" if deviation is None else f" ± {number(score, deviation)}")


def number(score: str, value: float, sign: str = "") -> str:
    """Shares in percent, all else as it is."""
    return f"{value:{sign}.3g}" if is_plain(score) else f"{100 * value:{sign}.1f}"


def is_plain(score: str) -> bool:
    return not PLAIN_NUMBERS.isdisjoint(part for one in score.split(" - ") for part in one.split("/"))


def beside(sheet: Sheet, rows_of_ours: Sequence[Row], quoted: Quoted) -> Sheet:
    """The table with the paper's row below each of ours that it has."""
    rows: list[tuple[str, ...]] = []
    for row, cells in zip(rows_of_ours, sheet.rows, strict=True):
        rows.append(cells)
        if values := quoted.of(row):
            rows.append((f"{row.label} (quoted)", *(values.get(column, "-") for column in sheet.head[1:])))
    return replace(sheet, rows=tuple(rows), notes=(*sheet.notes, *quoted_notes(quoted)))


def as_sheet(quoted: Quoted) -> Sheet:
    """The paper's table by itself, where ours is of other tasks."""
    columns = tuple(next(iter(quoted.rows.values())))
    rows = tuple((f"{label} (quoted)", *values.values()) for label, values in quoted.rows.items())
    return Sheet("quoted, other model and data", ("method", *columns), rows, tuple(quoted_notes(quoted)))


def quoted_notes(quoted: Quoted) -> list[str]:
    return [f"quoted: the paper's {quoted.title}", *([quoted.note] if quoted.note else [])]


def difference_sheets(results: Results) -> list[Sheet]:
    """What the marks mean: the difference of every row to its baseline, with p."""
    if not results.tested:
        return []

    found = []
    for title, columns in columns_of(results):
        rows = [row for row in results.rows if row != baseline_of(results.rows, row)]
        cells = [
            (row.label, *(difference_text(results, task, row.label, name) for _, task, name in columns)) for row in rows
        ]
        head = ("method", *(column for column, _, _ in columns))
        found.append(Sheet(f"differences to {results.baseline}, {title}", head, tuple(cells), (TEST, *OF_P)))
    return found


def difference_text(results: Results, task: str, label: str, name: str) -> str:
    tested = results.tested.get((task, label, name))
    if tested is None:
        return "-"
    difference = number(score_of(results.study, task, name), tested.comparison.difference, "+")
    only = " (seeds)" if tested.comparison.p_examples is None else ""
    return f"{difference}, p {tested.p:.2g} ({tested.comparison.p:.2g}){only}"


def choice_sheet(results: Results) -> Sheet:
    """What dev chose, and what it saw there."""
    study = results.study

    def text(cell: Cell, task: str) -> str:
        if cell.choice is None:
            return "-"
        metric = metric_of(results.study, task)
        return f"{choice_text(cell)} (dev {spread_text(metric, cell.dev(metric))})".strip()

    rows = [(row.label, *(text(results.cells[task, row.label], task) for task in study.tasks)) for row in results.rows]
    notes = [f"{AT_AN_END}: the lowest or highest that was tried; beyond there may be a better one"]
    notes = notes if any(AT_AN_END in text for row in rows for text in row) else []
    notes.append("a point of the grid with a run that failed is not chosen")
    return Sheet("chosen by dev", ("method", *study.tasks), tuple(rows), tuple(notes))


def choice_text(cell: Cell) -> str:
    """With a mark at a learning rate that is the lowest or the highest of those tried."""
    rates = {choice[RATE] for choice in (dict(one.run.choice) for one in cell.every) if RATE in choice}

    def mark(key: str, value: Any) -> str:
        return AT_AN_END if key == RATE and len(rates) > 1 and value in (min(rates), max(rates)) else ""

    return ", ".join(f"{short(key)} {text_of(value)}{mark(key, value)}" for key, value in cell.choice or ())


def warning_sheets(results: Results) -> list[Sheet]:
    """Which signs of going wrong the chosen runs warned of, where any did."""

    def text(task: str, row: Row) -> str:
        facts = [one.facts for one in results.cells[task, row.label].chosen if one.facts and "warnings" in one.facts]
        signs = Counter(sign for one in facts for sign in one["warnings"])
        told = ", ".join(f"{sign} {count}/{len(facts)}" for sign, count in sorted(signs.items()))
        return told or ("-" if facts else "?")

    rows = [(row.label, *(text(task, row) for task in results.study.tasks)) for row in results.rows]
    notes = (
        "of so many of the runs that dev chose and that say it; their logs have what was measured and the flag to turn",
    )
    told = tuple(row for row in rows if not {*row[1:]} <= {"-", "?"})
    return [Sheet("warnings of the chosen runs", ("method", *results.study.tasks), told, notes)] if told else []


def failure_sheets(results: Results) -> list[Sheet]:
    failed = [one for cell in results.cells.values() for one in cell.every if one.state == "failed"]
    rows = tuple((one.run.title, str(one.exit_code), one.message) for one in failed)
    return [Sheet(f"{len(rows)} runs failed", ("run", "exit code", "why"), rows)] if rows else []


def latex(sheet: Sheet) -> str:
    """A table for the packages booktabs and, where it is wide, graphicx."""
    lines = [" & ".join(map(escaped, row)) + r" \\" for row in (sheet.head, *sheet.rows)]
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    tabular = [rf"\begin{{tabular}}{{l{'r' * (len(sheet.head) - 1)}}}", *body, r"\end{tabular}"]
    if len(sheet.head) > 6:
        tabular = [r"\resizebox{\textwidth}{!}{%", *tabular[:-1], tabular[-1] + "}"]
    caption = ". ".join(escaped(text) for text in (sheet.title, *sheet.notes))
    return "\n".join([r"\begin{table}", r"\centering", *tabular, rf"\caption{{{caption}}}", r"\end{table}", ""])


def escaped(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)
