"""Task `image_text`: questions about images, or captions of them; an answer is generated, exact match."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lorasc_ds.errors import ConfigError
from lorasc_ds.tasks.base import Example, Generation, Task
from lorasc_ds.tasks.images import FileImage
from lorasc_ds.tasks.instructions import hold_out
from lorasc_ds.tasks.metrics import normalize
from lorasc_ds.tasks.rows import Row, read_rows

IMAGE = "<image>"  # an image's place in a text; the model's own token comes there
TEMPLATE = "{image}\n{question}\n"
FIELD = re.compile(r"\{(image|question)\}")
MOST_HELD_OUT = 1000


def score(answer: str, example: Example) -> dict[str, float]:
    """Whether the answer is one of the right ones in lower case, without articles, punctuation and extra blanks.

    A right answer of which that leaves nothing (`A`) is compared as it stands, but for its case.
    """

    def same(gold: str) -> bool:
        bare = normalize(gold)
        return normalize(answer) == bare if bare else answer.strip().lower() == gold.strip().lower()

    return {"exact_match": float(any(map(same, example.references)))}


def images_of(row: Row, folder: Path) -> tuple[FileImage, ...]:
    """The images of a row, which lie in `folder` or below.

    Raises:
        DataError: there is none, or a path leads elsewhere or to no file.
    """
    paths = row.texts("image") if isinstance(row.fields.get("image"), list) else (row.text("image"),)
    found = []
    for path in paths:
        resolved = (folder / path).resolve() if "\0" not in path else folder
        if not resolved.is_relative_to(folder.resolve()):
            row.refuse("image", f"paths that stay in {str(folder)!r}")
        if not resolved.is_file():
            row.refuse("image", f"paths of files from {str(folder)!r}")
        found.append(FileImage(path, str(resolved)))
    return tuple(found)


def answers_of(row: Row) -> tuple[str, ...]:
    """The right answers, without blanks around them.

    Raises:
        DataError: there is none, or one of them is empty or marks an image's place.
    """
    answers = row.texts("answer") if isinstance(row.fields.get("answer"), list) else (row.text("answer"),)
    if not all(answer.strip() and IMAGE not in answer for answer in answers):
        row.refuse("answer", f"texts with something in them, and no {IMAGE}")
    return tuple(answer.strip() for answer in answers)


def question_of(row: Row, images: int) -> str:
    """The question; empty where a caption is asked for. It may mark the places of all its images itself.

    Raises:
        DataError: it is no text, or marks some of them alone.
    """
    question = "" if row.fields.get("question") is None else row.text("question").strip()
    if question.count(IMAGE) not in (0, images):
        row.refuse("question", f"a text with {IMAGE} for every image of the row ({images}), or for none")
    return question


def filled(template: str, places: str, question: str) -> str:
    values = {"image": places, "question": question}
    return FIELD.sub(lambda field: values[field.group(1)], template)


def example_of(row: Row, folder: Path, template: str | None, use_images: bool) -> Example:
    """A row as an example; its chat is there where the template is left to the processor.

    Args:
        folder: that the row's images lie in.
        template: as in `task.template`.
        use_images: whether they are shown.

    Raises:
        DataError: a field is missing or of another kind, or an image is not in the folder.
    """
    images, answers = images_of(row, folder), answers_of(row)
    question = question_of(row, len(images))
    places = "" if IMAGE in question else IMAGE * len(images)
    if not use_images:
        images, question, places = (), " ".join(question.replace(IMAGE, " ").split()), ""
    prompt = filled(template or TEMPLATE, places, question).lstrip()
    if template is None and not question:
        prompt = f"{places}\n"
    asked = {"role": "user", "content": places + question}, {"role": "assistant", "content": answers[0]}
    return Example(
        row.id,
        prompt,
        (prompt + answers[0],),
        references=answers,
        messages=asked if template is None else (),
        images=images,
    )


def image_text(
    *,
    train_file: str,
    eval_file: str | None,
    test_file: str | None,
    dev_examples: int | None,
    sample_seed: int,
    template: str | None,
    use_images: bool,
    max_new_tokens: int,
    unreadable: Literal["skip", "refuse"],
) -> Task:
    """Splits: `train`, `dev` (`eval_file`, or rows held out) and, with `test_file`, `test`.

    Every row has one image at least: processes that are to gather the weights of a vision tower together must all
    pass through it at every step.

    Raises:
        ConfigError: the template has no place for the images, or nothing would be left to train on.
        DataError: a file cannot be read, or a row of it cannot be used.
    """
    if template is not None and "{image}" not in template:
        raise ConfigError(f"task.template is {template!r}: {{image}} is needed in it, where the images stand")

    def examples(file: str, key: str) -> list[Example]:
        path = Path(file)
        return [example_of(row, path.parent, template, use_images) for row in read_rows(path, f"task.{key}")]

    train: Sequence[Example] = examples(train_file, "train_file")
    if eval_file is None:
        held_out = dev_examples or min(MOST_HELD_OUT, max(1, round(len(train) / 10)))
        train, dev, note = hold_out(train, held_out, sample_seed)
    else:
        dev, note = examples(eval_file, "eval_file"), f"dev is {eval_file}"
    test = {} if test_file is None else {"test": examples(test_file, "test_file")}
    notes = [note, "exact match in lower case, without articles, punctuation and extra blanks"]
    if not use_images:
        notes.append("the images are left out (task.use_images false): a baseline that has to guess")
    return Task(
        name="image_text",
        kind="generation",
        loss="lm",
        splits={"train": train, "dev": dev, **test},
        headline="exact_match",
        notes=tuple(notes),
        generation=Generation(max_new_tokens, score),
        ends=True,
        unreadable=unreadable,
    )
