"""SQuAD and DROP: an answer is generated; F1 over the right ones (protocols 1)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from lorasc_ds.tasks.base import Example, Generation, Task
from lorasc_ds.tasks.metrics import exact_match, f1
from lorasc_ds.tasks.mezo import DATA_DIR, MAX_LENGTH, Released, Request, Source, draw, question, with_fields
from lorasc_ds.tasks.rows import Row, read_rows, read_under


def score(answer: str, example: Example) -> dict[str, float]:
    """Spaces around an answer do not count: both metrics normalise."""
    return {"f1": f1(answer, example.references), "exact_match": exact_match(answer, example.references)}


GENERATION = Generation(max_new_tokens=50, score=score, stop=("\n",))


def answerable(row: Row, prompt: str, answers: tuple[str, ...]) -> Example:
    """Trained on is the first answer with the newline that ends it."""
    return replace(question(row, prompt, [f"{prompt} {answers[0]}\n"]), references=answers)


def squad(row: Row) -> Example:
    asked = row.text("question").strip()
    prompt = f"Title: {row.text('title')}\nContext: {row.text('context')}\nQuestion: {asked}\nAnswer:"
    return answerable(row, prompt, row.row("answers").texts("text"))


def read_squad(path: Path, split: str) -> Released:
    """Version 1.1: a row per question of a paragraph of an article."""
    rows = []
    for article in read_under(path, DATA_DIR, "data"):
        for paragraph in article.rows("paragraphs"):
            common = {"title": article.text("title"), "context": paragraph.text("context")}
            for asked in paragraph.rows("qas"):
                found = [answer.text("text") for answer in asked.rows("answers")]
                rows.append(with_fields(asked, **common, answers={"text": found}))
    return rows, ()


def drop(row: Row) -> Example:
    prompt = f"Passage: {row.text('passage')}\nQuestion: {row.text('question').strip()}\nAnswer:"
    return answerable(row, prompt, row.row("answers_spans").texts("spans"))


def read_drop(path: Path, split: str) -> Released:
    """The original release, or the prompt form of its dev split."""
    prompts = path.name.removesuffix(".gz").endswith(".jsonl")
    return read_prompts(path) if prompts else read_sections(path, split)


def read_sections(path: Path, split: str) -> Released:
    """A row per question on a passage. Its spans are those of all its answers, one after another.

    The answers are the one it was written with in training data, else those that were validated, in a file that has
    them. A question without an answer, or with one that is of two kinds, is left out, as on the
    hub (9 of the training split, 1 of validation).
    """
    rows, left_out = [], 0
    for section in read_under(path, DATA_DIR):
        for asked in section.rows("qa_pairs"):
            validated = split != "train" and "validated_answers" in asked.fields
            answers = asked.rows("validated_answers") if validated else [asked.row("answer")]
            spans = [list(spans_of(answer)) for answer in answers]
            if not any(spans) or any(len(kinds_of(answer)) > 1 for answer in answers):
                left_out += 1
                continue
            found = {"spans": [span for of_answer in spans for span in of_answer]}
            rows.append(with_fields(asked, passage=section.text("passage"), answers_spans=found))
    return rows, (f"{left_out} questions of {split} without one kind of answer are left out",) if left_out else ()


def date_of(answer: Row) -> str:
    """Day, month and year, those that there are."""
    parts = answer.fields.get("date") or {}
    return " ".join(str(parts.get(part, "")) for part in ("day", "month", "year")).strip()


def kinds_of(answer: Row) -> list[str]:
    """Which of a number, a date and spans the answer is."""
    given = {
        "number": str(answer.fields.get("number", "")),
        "date": date_of(answer),
        "spans": answer.fields.get("spans"),
    }
    return [kind for kind, value in given.items() if value]


def spans_of(answer: Row) -> Iterator[str]:
    kinds = kinds_of(answer)
    if "number" in kinds:
        yield str(answer.fields["number"])
    if "date" in kinds:
        yield date_of(answer)
    if "spans" in kinds:
        yield from answer.texts("spans")


PROMPT = re.compile(r"Passage: (?P<passage>.*)\nQuestion: (?P<question>.*)\nAnswer:", re.DOTALL)


def read_prompts(path: Path) -> Released:
    """Rows of `context`, the prompt, and `ref_text`, the alternatives between bars."""
    rows = []
    for row in read_rows(path, DATA_DIR):
        found = PROMPT.fullmatch(row.text("context"))
        if found is None:
            row.refuse("context", "a text `Passage: ...\\nQuestion: ...\\nAnswer:`")
            continue
        rows.append(with_fields(row, **found.groupdict(), answers_spans={"spans": row.text("ref_text").split("|")}))
    return rows, ("the prompt form of DROP: the spans of an answer are one text, joined by `and`",)


SQUAD = Source(
    "rajpurkar/squad",
    None,
    ("train-v1.1.json", "train-v1.1.rebuilt.json"),
    ("dev-v1.1.json", "dev-v1.1.rebuilt.json"),
    read_squad,
)
DROP = Source(
    "ucinlp/drop", None, ("drop_dataset_train.json",), ("drop_dataset_dev.json", "drop_v0_dev.jsonl"), read_drop
)
ANSWERS: dict[str, tuple[Source, Callable[[Row], Example], tuple[str, ...]]] = {
    "squad": (SQUAD, squad, ()),
    "drop": (DROP, drop, ("F1 takes the spans of an answer as alternatives: not DROP's official metric",)),
}


def answers(name: str, request: Request) -> Task:
    """
    Raises:
        DataError: rows cannot be had, or one of those drawn cannot be used.
    """
    source, example, notes = ANSWERS[name]
    drawn = draw(source, request)
    return Task(
        name=name,
        kind="generation",
        loss="lm",
        splits=drawn.examples(example),
        headline="f1",
        notes=(*drawn.notes, *notes),
        generation=GENERATION,
        max_length=MAX_LENGTH,
    )
