"""What MMLU, BBH and DROP share in InstructEval: solved questions first, an answer that begins with the right one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from lorasc_ds.errors import ConfigError
from lorasc_ds.tasks.base import Example, Generation, Task

MAX_PROMPT = 2048  # tokens


def score(answer: str, example: Example) -> dict[str, float]:
    """Case, brackets and all: `42` is right where `4` is, `A` is not where `(A)` is."""
    return {"accuracy": float(answer.strip().startswith(example.references))}


def shot(prompt: str, answer: str) -> str:
    """A solved question."""
    return f"{prompt} {answer}\n\n"


def few_shot(
    name: str,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    average: Literal["micro", "macro"] = "micro",
    notes: Sequence[str],
) -> Task:
    return Task(
        name=name,
        kind="generation",
        loss="lm",
        splits={"test": examples},
        headline="accuracy",
        notes=(*notes, "an answer is right if it begins with the right one; greedy, up to InstructEval's lengths"),
        generation=Generation(max_new_tokens, score, max_length=MAX_PROMPT),
        average=average,
    )


def check_subjects(subjects: Collection[str] | None, known: Collection[str]) -> None:
    """
    Raises:
        ConfigError: one of `task.subjects` is not known.
    """
    unknown = [subject for subject in subjects or () if subject not in known]
    if unknown:
        raise ConfigError(f"task.subjects has {unknown[0]!r}, which is none of {', '.join(known)}")


def of_all(found: int, all: int, average: str) -> str:
    return f"the accuracy is the {average} over {'all' if found == all else f'{found} of'} {all} subjects"
