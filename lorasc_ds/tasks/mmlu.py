"""MMLU: questions with four answers on 57 subjects, five solved ones first (protocols 5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorasc_ds.errors import DataError
from lorasc_ds.tasks.base import Example, Task
from lorasc_ds.tasks.few_shot import check_subjects, few_shot, of_all, shot
from lorasc_ds.tasks.rows import Row, hub_rows, local_file, read_table

LETTERS = ("A", "B", "C", "D")
SHOTS = 5
SUBJECTS = 57


def prompt_of(row: Row) -> str:
    choices = row.texts("choices")
    if len(choices) != len(LETTERS):
        row.refuse("choices", "a list of four texts")
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
    return "\n".join([row.text("question"), *lines, "Answer:"])


def answer_of(row: Row) -> str:
    return LETTERS[row.choice("answer", LETTERS)]


def examples(subject: str, dev: Sequence[Row], test: Sequence[Row]) -> list[Example]:
    """The questions of a subject, which is named after two spaces, as InstructEval has it."""
    header = f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}.\n\n"
    shots = tuple(shot(prompt_of(row), answer_of(row)) for row in dev[:SHOTS])
    return [
        Example(row.id, prompt_of(row), references=(answer_of(row),), header=header, shots=shots, group=subject)
        for row in test
    ]


def read_csv(path: Path) -> list[Row]:
    """A file of the release: question, four choices, a letter; or with a heading, and an index from 0.

    Raises:
        DataError: with `FILE:LINE`.
    """
    table = read_table(path, "task.data_dir")
    if table and table[0][1][-1] == "answer":
        del table[0]
    for where, cells in table:
        if len(cells) != 6:
            raise DataError(f"{where}: {len(cells)} cells; a question, four choices and an answer are needed")
    return [Row(where, {"question": q, "choices": choices, "answer": a}) for where, (q, *choices, a) in table]


def released(data_dir: str, subjects: Sequence[str] | None) -> dict[str, tuple[list[Row], list[Row]]]:
    """By subject the rows of dev and test, from `dev/SUBJECT_dev.csv` and `test/SUBJECT_test.csv`.

    Raises:
        ConfigError: a subject has no file.
        DataError: there is none, or one cannot be used.
    """
    found = sorted(path.name.removesuffix("_test.csv") for path in Path(data_dir).glob("test/*_test.csv"))
    if not found:
        raise DataError(
            f"task.data_dir {data_dir!r} has no test/SUBJECT_test.csv: give the folder of MMLU's release that holds"
            " dev and test, or leave task.data_dir out to read from the hub"
        )
    check_subjects(subjects, found)
    return {
        subject: (
            read_csv(local_file(data_dir, [f"dev/{subject}_dev.csv"])),
            read_csv(local_file(data_dir, [f"test/{subject}_test.csv"])),
        )
        for subject in subjects or found
    }


def from_hub(revision: str | None, subjects: Sequence[str] | None) -> dict[str, tuple[list[Row], list[Row]]]:
    """As `released`."""
    dev, test = (hub_rows("cais/mmlu", "all", split, revision) for split in ("dev", "test"))
    found: dict[str, tuple[list[Row], list[Row]]] = {}
    for which, rows in enumerate((dev, test)):
        for row in rows:
            found.setdefault(row.text("subject"), ([], []))[which].append(row)
    check_subjects(subjects, found)
    return {subject: found[subject] for subject in subjects or found}


def mmlu(*, data_dir: str | None, revision: str | None, subjects: Sequence[str] | None) -> Task:
    """
    Raises:
        ConfigError: a subject is not known.
        DataError: rows cannot be had or used.
    """
    rows = from_hub(revision, subjects) if data_dir is None else released(data_dir, subjects)
    return few_shot(
        "mmlu",
        [example for subject, (dev, test) in rows.items() for example in examples(subject, dev, test)],
        max_new_tokens=2,
        notes=("the heading has two spaces before the subject", of_all(len(rows), SUBJECTS, "mean over questions")),
    )
