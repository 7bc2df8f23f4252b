"""What a task is: splits of examples, each a prompt with the full text of every candidate answer.

The field's prompt tasks fit this shape: a multiple-choice question has several candidates, a question
with a free answer has one, a plain document has one and no prompt, a benchmark's question has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Scores = dict[str, dict[str, float]]  # split -> metric -> value
Message = dict[str, str]  # of a chat: role and content


class ImageSource(Protocol):
    """Where an encoded image (JPEG, PNG, ...) is to be had; it goes to the processes that decode it."""

    @property
    def name(self) -> str:
        """Says in errors and records which image it is: a path, or a data set and its row."""
        ...

    def read(self) -> bytes:
        """The file as it is.

        Raises:
            OSError: it cannot be read.
        """
        ...


@dataclass(frozen=True, slots=True)
class Example:
    """One question.

    Args:
        id: names the example in errors and records, e.g. `train.jsonl:17`.
        prompt: the text that is given; never scored. An answer is generated from `header`, `shots` and this.
        texts: prompt and answer together, one full text per candidate. Full texts, because an answer may
            sit inside the text (ReCoRD fills a placeholder) and because tokens may merge at the seam.
            Empty where nothing is trained on and no loss is wanted.
        gold: indices into `texts` of the right answers; training uses the first. A first one of -1 is the last text
            and is trained on, but to choose it is not right: no candidate of the question is (ReCoRD).
        references: the right answers that a generated one is compared with.
        header, shots: what stands before the prompt where an answer is generated: a heading, and solved questions,
            of which the last are left out until the prompt fits.
        messages: a chat, in place of `prompt` and `texts`; the tokenizer's chat template makes the text. Where these
            are given too, they are for a tokenizer or processor without a template.
        group: the subject, source or subset it belongs to; each is reported on its own.
        details: what else the score of an answer needs (HumanEval: its tests).
        images: what the question is about: the image whose class is `gold` (kind `classes`), or those whose places in
            the texts a placeholder marks.
    """

    id: str
    prompt: str
    texts: tuple[str, ...] = ()
    gold: tuple[int, ...] = (0,)
    references: tuple[str, ...] = ()
    header: str = ""
    shots: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()
    group: str = ""
    details: Mapping[str, str] = field(default_factory=dict)
    images: tuple[ImageSource, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """How answers are generated, and scored.

    Args:
        max_new_tokens: longest answer.
        score: the metrics of an answer, each from 0 to 1, the same names for every example; given the text that was
            generated up to the first of `stop`, special tokens left out, and the example.
        stop: texts that end an answer.
        temperature: of sampling; 0: the most probable token (greedy).
        max_length: longest prompt in tokens; None: what the model and `max_new_tokens` leave.
    """

    max_new_tokens: int
    score: Callable[[str, Example], dict[str, float]]
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    max_length: int | None = None


@dataclass(frozen=True, slots=True)
class Classes:
    """What an image may show, and how the classifier is made (protocols section 6).

    Args:
        names: of all classes, in the order in which the task counts them, as a text encoder reads them.
        templates: of the prompts that a class's prototype is the mean of; `{}` is the name.
        subset: the classes that may be chosen on this task, by their index; `gold` counts in it. None: all.
        head: `prototypes` of a text tower that are kept, `text`: the same made anew at every forward pass, so that a
            text tower can be trained, or the `classifier` that belongs to the model; `auto`: prototypes where the
            model has a text tower.
        train_head: whether prototypes or the classifier are trained, outside the cascade.
        crop_scale: share of the area that the random crop of a training image has, from and to; None: no random crop,
            the geometry of an evaluation.
        unreadable: what an image that cannot be decoded does: it is left out and counted (`skip`), or ends the run
            (`refuse`).
        outputs: of every class, the output of the classifier that stands for it; None: the one at its own place.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...] = ("a photo of a {}.",)
    subset: tuple[int, ...] | None = None
    head: Literal["auto", "prototypes", "text", "classifier"] = "auto"
    train_head: bool = False
    crop_scale: tuple[float, float] | None = None
    unreadable: Literal["skip", "refuse"] = "skip"
    outputs: tuple[int, ...] | None = None

    @property
    def by_output(self) -> tuple[str, ...]:
        """The names in the order of the classifier's outputs."""
        named = dict(zip(self.outputs or range(len(self.names)), self.names, strict=True))
        return tuple(named[output] for output in range(len(self.names)))

    @property
    def chosen(self) -> tuple[int, ...] | None:
        """The outputs that are told apart, in the order in which `gold` counts; None: all, as they come."""
        if self.outputs is None or self.subset is None:
            return self.subset if self.outputs is None else self.outputs
        return tuple(self.outputs[at] for at in self.subset)


@dataclass(frozen=True, slots=True)
class Task:
    """Examples by split, and how they are trained on and scored.

    Args:
        name: as in `task.name`.
        kind: `candidates` (the answer of the highest mean log-probability is the prediction; accuracy), `generation`
            (an answer is generated; the metrics of `generation`), `sequences` (every row by itself; perplexity),
            `documents` (rows end to end in blocks, every token scored; perplexity) or `classes` (of images; accuracy).
        loss: `lm`, cross-entropy over the answer's tokens, or `classification`, cross-entropy over the
            candidates with their mean log-probabilities as logits (MeZO's two modes).
        splits: `train`, `dev` (what selection looks at), then every split that is only reported. A benchmark has
            `test` alone.
        headline: the metric that is shown in one line.
        notes: what the task does that a reader may not expect: quirks of a protocol, variants that were chosen.
        generation: of kind `generation`.
        average: over all examples (`micro`), or of the means of the groups (`macro`).
        max_length: longest sequence in tokens where `training.max_length` is null; None: the model's limit, and
            longer is an error.
        cut: which end of a sequence that is too long is cut away; the first special token stays.
        ends: whether a sequence that is not cut is closed by the end-of-text token; a chat is left to its template.
        mask_prompt: of kind `sequences`: whether the prompt, and what others than the assistant say in a chat, is left
            out of the loss.
        weights: shares of the groups in the training examples; None: as many as there are.
        classes: of kind `classes`.
        unreadable: what an image that cannot be decoded does to a row of `images` and texts: the row is left out and
            named (`skip`), or ends the run (`refuse`).
        combine: metrics of a split made of its accuracy in every group, in place of their mean (ImageNet-C's).
    """

    name: str
    kind: Literal["candidates", "generation", "sequences", "documents", "classes"]
    loss: Literal["lm", "classification"]
    splits: Mapping[str, Sequence[Example]]
    headline: str
    notes: tuple[str, ...] = ()
    generation: Generation | None = None
    average: Literal["micro", "macro"] = "micro"
    max_length: int | None = None
    cut: Literal["beginning", "end"] = "beginning"
    ends: bool = False
    mask_prompt: bool = False
    weights: Mapping[str, float] | None = None
    classes: Classes | None = None
    unreadable: Literal["skip", "refuse"] = "refuse"
    combine: Callable[[Mapping[str, float]], dict[str, float]] | None = None

    @property
    def counted(self) -> str:
        """What the speed of a run is counted in."""
        return "images" if self.kind == "classes" else "tokens"

    @property
    def evaluation_splits(self) -> list[str]:
        return [split for split in self.splits if split != "train"]
