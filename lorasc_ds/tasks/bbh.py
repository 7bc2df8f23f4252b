"""BIG-Bench Hard: 27 tasks that are hard for language models, three solved questions first (protocols 5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorasc_ds.tasks.base import Example, Task
from lorasc_ds.tasks.few_shot import check_subjects, few_shot, of_all, shot
from lorasc_ds.tasks.rows import Row, hub_rows, local_file, read_under

SHOTS = 3
SUBJECTS = (
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
)


def prompt_of(row: Row) -> str:
    return f"{row.text('input')}\nAnswer:"


def examples(subject: str, rows: Sequence[Row]) -> list[Example]:
    """The questions of a task but the first three, which are solved before every other."""
    shots = tuple(shot(prompt_of(row), row.text("target")) for row in rows[:SHOTS])
    return [
        Example(row.id, prompt_of(row), references=(row.text("target"),), shots=shots, group=subject)
        for row in rows[SHOTS:]
    ]


def read(path: Path) -> list[Row]:
    return read_under(path, "task.data_dir", "examples")


def released(data_dir: str, subjects: Sequence[str] | None) -> dict[str, list[Row]]:
    """The rows by task, from `TASK.json`.

    Raises:
        DataError: a file cannot be had or used, or there is none.
    """
    here = [subject for subject in SUBJECTS if list(Path(data_dir).glob(f"{subject}.json*"))]
    files = {subject: local_file(data_dir, [f"{subject}.json"]) for subject in subjects or here or SUBJECTS}
    return {subject: read(path) for subject, path in files.items()}


def bbh(*, data_dir: str | None, revision: str | None, subjects: Sequence[str] | None) -> Task:
    """
    Raises:
        ConfigError: a task is not known.
        DataError: rows cannot be had or used.
    """
    check_subjects(subjects, SUBJECTS)
    if data_dir is None:
        revision = revision or "refs/convert/parquet"  # the main branch is a script, which `datasets` no longer runs
        rows = {one: hub_rows("lukaemon/bbh", one, "test", revision) for one in subjects or SUBJECTS}
    else:
        rows = released(data_dir, subjects)
    return few_shot(
        "bbh",
        [example for subject in rows for example in examples(subject, rows[subject])],
        max_new_tokens=32,
        average="macro",
        notes=(of_all(len(rows), len(SUBJECTS), "mean of the means"),),
    )
