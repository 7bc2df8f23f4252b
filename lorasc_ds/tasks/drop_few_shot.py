"""DROP as InstructEval has it: questions with one answer, three solved ones first (protocols 5)."""

from __future__ import annotations

import random

from lorasc_ds.errors import DataError
from lorasc_ds.tasks.answers import DROP
from lorasc_ds.tasks.base import Example, Task
from lorasc_ds.tasks.few_shot import few_shot, shot
from lorasc_ds.tasks.rows import Row, hub_rows, local_file

SHOTS = 3


def prompt_of(row: Row) -> str:
    return f"{row.text('passage').strip()} {row.text('question').strip()}\nAnswer:"


def answers_of(row: Row) -> list[str]:
    return [span.strip() for span in row.row("answers_spans").texts("spans")]


def drop_few_shot(*, data_dir: str | None, revision: str | None) -> Task:
    """
    Raises:
        DataError: rows cannot be had or used, or there are too few with one answer.
    """
    if data_dir is None:
        rows, notes = hub_rows(DROP.dataset, DROP.config, "validation", revision), ()
    else:
        rows, notes = DROP.read(local_file(data_dir, DROP.test_files), "validation")
    single = [row for row in rows if len(set(answers_of(row))) == 1]
    if len(single) <= SHOTS:
        raise DataError(
            f"{len(single)} of {len(rows)} questions have one answer, but {SHOTS} are solved first: more are needed"
        )
    solved = random.Random(0).sample(single, SHOTS)
    passages = {row.text("passage") for row in solved}
    shots = tuple(shot(prompt_of(row), answers_of(row)[0]) for row in solved)
    examples = [
        Example(row.id, prompt_of(row), references=(answers_of(row)[0],), shots=shots)
        for row in single
        if row.text("passage") not in passages
    ]
    sizes = f"{len(examples)} of {len(rows)} questions: those with one answer, and not on a passage of a demonstration"
    return few_shot("drop_few_shot", examples, max_new_tokens=8, notes=(sizes, *notes))
