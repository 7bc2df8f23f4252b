"""GSM8K: trained on zero-shot, scored with eight demonstrations as in open-instruct (protocols 4, appendix B)."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lorasc_ds.tasks.base import Example, Generation, Task
from lorasc_ds.tasks.metrics import same_but_for_punctuation
from lorasc_ds.tasks.mezo import MAX_LENGTH, Request, Source, public_split, question, rows_to_train
from lorasc_ds.tasks.rows import Row

SOURCE = Source("openai/gsm8k", "main", ("train.jsonl",), ("test.jsonl",), test_split="test")
SUBSET = 200  # of the test questions, drawn with seed 42
RELEASED = 1319  # test questions
HEADER = "Answer the following questions.\n\n"
NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")
ENDS = {"line": "\n", "raw": "\n\n"}  # of an answer, by what is trained on


@dataclass(frozen=True, slots=True)
class Shot:
    """A demonstration of the chain-of-thought paper (arXiv 2201.11903, table 20)."""

    question: str
    rationale: str
    number: str

    def text(self, mode: str, misspelt: bool) -> str:
        if mode == "direct":
            return f"{'Quesion' if misspelt else 'Question'}: {self.question}\nAnswer: {self.number}\n\n"
        return f"Question: {self.question}\nAnswer: {concluded(self.rationale, self.number)}\n\n"


def concluded(rationale: str, number: str) -> str:
    return f"{rationale} So the answer is {number}."


def without_commas(text: str) -> str:
    """Numbers without the commas between thousands."""
    return re.sub(r"(\d),(\d)", r"\1\2", text)


def solution(row: Row) -> tuple[str, str]:
    """The rationale on one line without the calculator's marks, and the number."""
    rationale, mark, number = row.text("answer").rpartition("####")
    if not mark or not number.strip():
        row.refuse("answer", "a text that ends in `#### NUMBER`")
    return " ".join(re.sub(r"<<.*?>>", "", rationale).rstrip("\n").split("\n")), without_commas(number.strip())


def example(row: Row, target: str) -> Example:
    rationale, number = solution(row)
    prompt = f"Question: {row.text('question').strip()}\nAnswer:"
    answer = row.text("answer") if target == "raw" else concluded(rationale, number)
    return replace(question(row, prompt, [f"{prompt} {answer}{ENDS[target]}"]), references=(number,))


def extracted(answer: str) -> str:
    """The last number in an answer, else all of it. A sign counts only before a decimal fraction."""
    answer = without_commas(answer)
    return (NUMBER.findall(answer) or [answer])[-1]


def score(answer: str, example: Example) -> dict[str, float]:
    return {"exact_match": same_but_for_punctuation(extracted(answer), example.references[0])}


def subset(count: int) -> list[int]:
    """The test questions that open-instruct scores: `random.seed(42)`, then a sample of 200."""
    return random.Random(42).sample(range(count), min(SUBSET, count))


def questions_to_test(request: Request, questions: str, target: str) -> tuple[list[Example], str]:
    """In the order of the sample; or all in that of the file, the sample a group of its own. And which they are."""
    rows, *_ = public_split(SOURCE, request, "test")
    chosen = subset(len(rows))
    sample = f"the {SUBSET} of open-instruct"
    if len(rows) != RELEASED:
        sample = f"{len(chosen)} of {len(rows)} rows, drawn as open-instruct draws {SUBSET} of {RELEASED}"
    if questions == "subset":
        found = [example(rows[at], target) for at in chosen]
    else:
        groups = ["subset" if at in set(chosen) else "rest" for at in range(len(rows))]
        found = [replace(example(row, target), group=group) for row, group in zip(rows, groups, strict=True)]
    kept = found[: request.test_examples]
    cut = len(kept) < len(found)
    if questions == "subset":
        of = f"the first of {sample}" if cut else sample
    else:
        of = f"the first of {len(found)}; group subset is from {sample}" if cut else f"all; group subset is {sample}"
    return kept, f"test is {len(kept)} questions: {of}"


def gsm8k(
    *,
    mode: Literal["cot", "direct"],
    target: Literal["line", "raw"],
    questions: Literal["subset", "full"],
    misspelt: bool,
    shots: int,
    max_new_tokens: int,
    request: Request,
) -> Task:
    """
    Raises:
        DataError: rows cannot be had, or one of those drawn cannot be used.
    """
    drawn = rows_to_train(SOURCE, request)
    demonstrations = tuple(shot.text(mode, misspelt) for shot in SHOTS[:shots])
    splits: dict[str, Sequence[Example]] = {
        split: [example(row, target) for row in rows] for split, rows in drawn.splits.items()
    }
    of_test = []
    if "test" in request.splits:
        splits["test"], note = questions_to_test(request, questions, target)
        of_test.append(note)
    for split in {"dev", "test"} & set(splits):
        header = HEADER if shots else ""
        splits[split] = [replace(one, header=header, shots=demonstrations) for one in splits[split]]
    notes = [*drawn.notes, f"{shots} demonstrations, mode {mode}, when an answer is generated; none in the loss"]
    if mode == "direct" and misspelt and shots:
        notes.append("demonstrations begin with `Quesion:`, as in open-instruct")
    if target == "raw":
        notes.append("trained on answers as released, and an answer ends at an empty line")
    return Task(
        name="gsm8k",
        kind="generation",
        loss="lm",
        splits=splits,
        headline="exact_match",
        notes=(*notes, *of_test),
        generation=Generation(max_new_tokens=max_new_tokens, score=score, stop=(ENDS[target],)),
        max_length=MAX_LENGTH,
    )


SHOTS = (
    Shot(
        "There are 15 trees in the grove. Grove workers will plant trees in the grove today. After they are "
        "done, there will be 21 trees. How many trees did the grove workers plant today?",
        "There are 15 trees originally. Then there were 21 trees after some more were planted. So there must "
        "have been 21 - 15 = 6.",
        "6",
    ),
    Shot(
        "If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the parking lot?",
        "There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5.",
        "5",
    ),
    Shot(
        "Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they have left in total?",
        "Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 + 42 = 74. After "
        "eating 35, they had 74 - 35 = 39.",
        "39",
    ),
    Shot(
        "Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 lollipops. How many lollipops"
        " did Jason give to Denny?",
        "Jason started with 20 lollipops. Then he had 12 after giving some to Denny. So he gave Denny 20 - 12 = 8.",
        "8",
    ),
    Shot(
        "Shawn has five toys. For Christmas, he got two toys each from his mom and dad. How many toys does he"
        " have now?",
        "Shawn started with 5 toys. If he got 2 toys each from his mom and dad, then that is 4 more toys. 5 + 4 = 9.",
        "9",
    ),
    Shot(
        "There were nine computers in the server room. Five more computers were installed each day, from "
        "monday to thursday. How many computers are now in the server room?",
        "There were originally 9 computers. For each of 4 days, 5 more computers were added. So 5 * 4 = 20 "
        "computers were added. 9 + 20 is 29.",
        "29",
    ),
    Shot(
        "Michael had 58 golf balls. On tuesday, he lost 23 golf balls. On wednesday, he lost 2 more. How many"
        " golf balls did he have at the end of wednesday?",
        "Michael started with 58 golf balls. After losing 23 on tuesday, he had 58 - 23 = 35. After losing 2 "
        "more, he had 35 - 2 = 33 golf balls.",
        "33",
    ),
    Shot(
        "Olivia has $23. She bought five bagels for $3 each. How much money does she have left?",
        "Olivia had 23 dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 dollars. So she has 23 - 15 "
        "dollars left. 23 - 15 is 8.",
        "8",
    ),
)
