"""BoolQ, MultiRC and ReCoRD: prompts on a passage (protocols 1.3)."""

from __future__ import annotations

from pathlib import Path

from lorasc_ds.tasks.base import Example
from lorasc_ds.tasks.mezo import BOOLEAN, DATA_DIR, Released, labelled, question, with_fields
from lorasc_ds.tasks.rows import Row, read_rows


def boolq(row: Row) -> Example:
    asked = row.text("question")
    asked = asked if asked.endswith("?") else f"{asked}?"
    prompt = f"{row.text('passage')} {asked[:1].upper()}{asked[1:]}\n"
    return labelled(row, prompt, ("Yes", "No"), 1 - row.choice("answer", BOOLEAN))


def read_boolq(path: Path, split: str) -> Released:
    """The original release, or SuperGLUE's copy, whose answers are labels."""
    rows = read_rows(path, DATA_DIR)
    if "label" not in rows[0].fields:
        return rows, ()
    rows = [with_fields(row, answer=bool(row.choice("label", BOOLEAN))) for row in rows]
    return rows, ("passages are SuperGLUE's, which begin with the article's title; google/boolq's do not",)


def multirc(row: Row) -> Example:
    prompt = (
        f"{row.text('paragraph')}\nQuestion: {row.text('question')}\n"
        f'I found this answer "{row.text("answer")}". Is that correct? Yes or No?\n'
    )
    return labelled(row, prompt, ("No", "Yes"), row.choice("label", BOOLEAN))


def read_multirc(path: Path, split: str) -> Released:
    """Question-answer pairs in the order of the file."""
    pairs = [
        with_fields(
            answer,
            paragraph=passage.text("text"),
            question=asked.text("question"),
            answer=answer.text("text"),
        )
        for passage in (row.row("passage") for row in read_rows(path, DATA_DIR))
        for asked in passage.rows("questions")
        for answer in asked.rows("answers")
    ]
    return pairs, ()


UNCHOSEN = -1  # the last candidate, as the loss finds it; the number of the one that is chosen never equals it


def record(row: Row) -> Example:
    """One candidate per entity: the whole sentence that it fills. Trained on is the alphabetically first answer.

    Where that is no entity it is one more candidate, the last: the loss is its own as in MeZO, and choosing it is
    wrong, as is every choice where no answer is an entity.
    """
    passage = row.text("passage").replace("@highlight\n", "- ")
    entities, query = row.texts("entities"), row.text("query")
    answers = row.texts("answers")
    gold = [entities.index(answer) for answer in answers if answer in entities]
    if answers[0] not in entities:
        entities, gold = (*entities, answers[0]), [UNCHOSEN, *gold]
    texts = [f"{passage}\n- {query.replace('@placeholder', entity)}" for entity in entities]
    return question(row, f"{passage}\n-", texts, gold)


def read_record(path: Path, split: str) -> Released:
    """A row per query; entities and answers each once and sorted, as the hub has them."""
    rows = []
    for row in read_rows(path, DATA_DIR):
        passage = row.row("passage")
        text = passage.text("text")
        spans = [(entity.integer("start"), entity.integer("end") + 1) for entity in passage.rows("entities")]
        entities = sorted({text[start:end] for start, end in spans})
        for query in row.rows("qas"):
            answers = sorted({answer.text("text") for answer in query.rows("answers")})
            rows.append(with_fields(query, passage=text, entities=entities, answers=answers))
    return rows, ()
