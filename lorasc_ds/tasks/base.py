"""What a task is: splits of examples, each a prompt with the full text of every candidate answer.

The field's prompt tasks fit this shape: a multiple-choice question has several candidates, a question
with a free answer has one, a plain document has one and no prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scores = dict[str, dict[str, float]]  # split -> metric -> value


@dataclass(frozen=True, slots=True)
class Example:
    """One question.

    Args:
        id: names the example in errors and records, e.g. `train.jsonl:17`.
        prompt: the text that is given; never scored.
        texts: prompt and answer together, one full text per candidate. Full texts, because an answer may
            sit inside the text (ReCoRD fills a placeholder) and because tokens may merge at the seam.
        gold: indices into `texts` of the right answers; training uses the first.
    """

    id: str
    prompt: str
    texts: tuple[str, ...]
    gold: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class Task:
    """Examples by split, and how they are trained on and scored.

    Args:
        name: as in `task.name`.
        kind: `candidates` (the answer of the highest mean log-probability is the prediction; accuracy) or
            `documents` (every token is scored; perplexity).
        loss: `lm`, cross-entropy over the answer's tokens, or `classification`, cross-entropy over the
            candidates with their mean log-probabilities as logits (MeZO's two modes).
        splits: `train`, `dev` (what selection looks at), then every split that is only reported.
    """

    name: str
    kind: Literal["candidates", "documents"]
    loss: Literal["lm", "classification"]
    splits: dict[str, list[Example]]

    @property
    def evaluation_splits(self) -> list[str]:
        return [split for split in self.splits if split != "train"]
