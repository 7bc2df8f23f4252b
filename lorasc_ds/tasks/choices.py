"""The nine tasks with candidates, by MeZO's prompts; the best mean log-probability is the prediction (protocols 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lorasc_ds.tasks import passages, sentences
from lorasc_ds.tasks.base import Example, Task
from lorasc_ds.tasks.mezo import MAX_LENGTH, Request, Source, draw, superglue
from lorasc_ds.tasks.rows import Row

Loss = Literal["lm", "classification"]


@dataclass(frozen=True, slots=True)
class Choice:
    """A task: where its rows are, its prompt, its loss, and what a reader may not expect of it."""

    source: Source
    example: Callable[[Row], Example]
    loss: Loss = "classification"
    notes: tuple[str, ...] = ()


SST2 = Source("nyu-mll/glue", "sst2", ("SST-2/train.tsv", "train.tsv"), ("SST-2/dev.tsv", "dev.tsv"))
BOOLQ = Source(
    "google/boolq",
    None,
    ("BoolQ/train.jsonl", "train.jsonl"),
    ("BoolQ/dev.jsonl", "dev.jsonl", *superglue("boolq", "BoolQ").test_files),
    passages.read_boolq,
)
CHOICES = {
    "sst2": Choice(SST2, sentences.sst2),
    "rte": Choice(superglue("rte", "RTE"), sentences.rte),
    "cb": Choice(superglue("cb", "CB", dev=100), sentences.cb),
    "boolq": Choice(BOOLQ, passages.boolq),
    "wsc": Choice(superglue("wsc.fixed", "WSC", sentences.read_wsc), sentences.wsc),
    "wic": Choice(superglue("wic", "WiC"), sentences.wic),
    "multirc": Choice(
        superglue("multirc", "MultiRC", passages.read_multirc),
        passages.multirc,
        notes=("question-answer pairs are drawn and scored each by itself: accuracy, not F1 over the answers",),
    ),
    "copa": Choice(
        superglue("copa", "COPA", dev=100),
        sentences.copa,
        "lm",
        ("the first word of a choice is in lower case, a name too, but not `I`",),
    ),
    "record": Choice(
        superglue("record", "ReCoRD", passages.read_record),
        passages.record,
        "lm",
        ("an entity's score is that of the whole sentence it fills; any right entity counts, the first is trained on",),
    ),
}


def choices(name: str, loss: Loss | None, request: Request) -> Task:
    """
    Args:
        loss: in place of MeZO's.

    Raises:
        DataError: rows cannot be had, or one of those drawn cannot be used.
    """
    choice = CHOICES[name]
    drawn = draw(choice.source, request)
    notes = [*drawn.notes, *choice.notes]
    if loss not in (None, choice.loss):
        notes.append(f"loss {loss} in place of MeZO's {choice.loss}")
    splits = drawn.examples(choice.example)
    for split, examples in splits.items():
        added = sum(passages.UNCHOSEN in example.gold for example in examples)
        if added:
            notes.append(
                f"the first answer of {added} of {len(examples)} rows of {split} is no entity: the loss is that of"
                " its sentence, and to choose it is wrong"
            )
    return Task(
        name=name,
        kind="candidates",
        loss=loss or choice.loss,
        splits=splits,
        headline="accuracy",
        notes=tuple(notes),
        max_length=MAX_LENGTH,
    )
