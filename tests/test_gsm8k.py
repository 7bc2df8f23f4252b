"""GSM8K: what is trained on, the eight demonstrations, the 200 questions, extraction."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from lorasc_ds.errors import DataError
from lorasc_ds.task_config import Gsm8kConfig
from lorasc_ds.tasks import Example, Task, load_task
from lorasc_ds.tasks.gsm8k import extracted, score, subset
from lorasc_ds.tasks.rows import read_rows

JANET = (
    "Question: Janet’s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for her"
    " friends every day with four. She sells the remainder at the farmers' market daily for $2 per fresh duck egg. How"
    " much in dollars does she make every day at the farmers' market?\nAnswer:"
)
JANETS_ANSWER = (
    " Janet sells 16 - 3 - 4 = 9 duck eggs a day. She makes 9 * 2 = $18 every day at the farmer’s market. So the answer"
    " is 18.\n"
)


def load(shared_data: Path, *splits: str, **settings: Any) -> Task:
    return load_task(Gsm8kConfig(name="gsm8k", data_dir=str(shared_data / "gsm8k"), **settings), 0, splits or ("test",))


def test_the_subset() -> None:
    state = random.getstate()
    chosen = subset(1319)
    assert random.getstate() == state
    assert chosen[:20] == [
        1309, 228, 51, 563, 501, 457, 285, 209, 1116, 178, 1209, 864, 65, 61, 191, 447, 476, 1034, 1232, 54
    ]  # fmt: skip
    assert (len(set(chosen)), sum(chosen)) == (200, 130_924)
    digest = hashlib.sha256(",".join(map(str, chosen)).encode()).hexdigest()
    assert digest == "2d58f22b994a781f5eaeebb877f58a9ab231cd57437017f3056523e2a5a25e71"


def test_splits_of_the_real_files(shared_data: Path) -> None:
    task = load(shared_data, "train", "dev", "test")
    assert {split: len(examples) for split, examples in task.splits.items()} == {"train": 1000, "dev": 500, "test": 200}
    assert (task.kind, task.loss, task.headline, task.max_length) == ("generation", "lm", "exact_match", 2048)
    ids = {split: [int(e.id.rpartition(":")[2]) - 1 for e in examples] for split, examples in task.splits.items()}
    assert not set(ids["train"]) & set(ids["dev"])
    assert ids["test"] == subset(1319)
    assert task.generation is not None
    assert (task.generation.max_new_tokens, task.generation.stop, task.generation.temperature) == (512, ("\n",), 0)


def test_texts_of_a_question(shared_data: Path) -> None:
    line = load(shared_data, questions="full").splits["test"][0]
    assert (line.prompt, line.texts, line.references) == (JANET, (JANET + JANETS_ANSWER,), ("18",))
    raw = load(shared_data, questions="full", target="raw")
    assert raw.splits["test"][0].texts == (
        f"{JANET} Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\n"
        "She makes 9 * 2 = $<<9*2=18>>18 every day at the farmer’s market.\n#### 18\n\n",
    )
    assert raw.generation is not None
    assert raw.generation.stop == ("\n\n",)


@pytest.mark.parametrize(
    ("settings", "digest"),
    [
        ({}, "bc98d2864d2c74ae324561ed4fa497c577cd251cc06aeae2c2a23bd5ef60c404"),
        ({"mode": "direct"}, "ccf7378f18f8258bce275e1945593676b316d32a443c53584e2928ca12b27601"),
    ],
)
def test_demonstrations_are_those_of_the_paper(shared_data: Path, settings: dict[str, str], digest: str) -> None:
    """sha256 of the demonstrations as protocols.md, appendix B, prints them."""
    splits = load(shared_data, "train", "dev", "test", **settings).splits
    for example in (splits["dev"][0], splits["test"][0]):
        assert len(example.shots) == 8
        assert hashlib.sha256((example.header + "".join(example.shots)).encode()).hexdigest() == digest
    assert not any(example.header or example.shots for example in splits["train"])


def test_a_whole_prompt(shared_data: Path) -> None:
    example = load(shared_data, questions="full").splits["test"][0]
    prompt = example.header + "".join(example.shots) + example.prompt
    assert prompt.startswith("Answer the following questions.\n\nQuestion: There are 15 trees in the grove. ")
    assert "there must have been 21 - 15 = 6. So the answer is 6.\n\nQuestion: If there are 3 cars" in prompt
    assert prompt.endswith(f"23 - 15 is 8. So the answer is 8.\n\n{JANET}")
    direct = load(shared_data, questions="full", mode="direct").splits["test"][0]
    assert direct.shots[1].startswith("Quesion: If there are 3 cars ")
    assert direct.shots[1].endswith(" are in the parking lot?\nAnswer: 5\n\n")
    spelt = load(shared_data, questions="full", mode="direct", misspelt=False).splits["test"][0]
    assert spelt.shots[1] == direct.shots[1].replace("Quesion", "Question")


def test_all_questions_with_the_200_as_a_group(shared_data: Path) -> None:
    examples = load(shared_data, questions="full").splits["test"]
    assert len(examples) == 1319
    groups = [example.group for example in examples]
    assert sorted(subset(1319)) == [at for at, group in enumerate(groups) if group == "subset"]
    assert set(groups) == {"subset", "rest"}
    assert len(load(shared_data, test_examples=10).splits["test"]) == 10


def test_every_target_ends_in_its_number(shared_data: Path) -> None:
    """The gold, by open-instruct's way to it, is what extraction finds in every answer that is trained on."""
    rows = read_rows(shared_data / "gsm8k" / "test.jsonl", "key")
    for target in ("line", "raw"):
        examples = load(shared_data, questions="full", target=target).splits["test"]
        for row, example in zip(rows, examples, strict=True):
            gold = row.text("answer").split("####")[1].strip().replace(",", "")
            answer = example.texts[0].removeprefix(example.prompt)
            assert example.references == (gold,)
            assert score(answer, example) == {"exact_match": 1.0}
            if target == "line":
                assert "<<" not in answer
                assert answer.count("\n") == 1
                assert answer.endswith(f" So the answer is {gold}.\n")


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (" -7", "7"),
        (" -7.5", "-7.5"),
        ("$1,234.50", "1234.50"),
        ("18.00", "18.00"),
        ("1,234,567 people", "1234567"),
        ("It is 3, 4 or 5. So the answer is 6.", "6"),
        ("so .5 it is", ".5"),
        ("1,2,3", "3"),  # one pass: 12,3
        ("no idea, sorry", "no idea, sorry"),
        ("", ""),
    ],
)
def test_extraction(answer: str, number: str) -> None:
    assert extracted(answer) == number


def test_scores() -> None:
    example = Example("1", "", references=("35",))
    assert score("It is 3.5", example) == {"exact_match": 1.0}, "the point is punctuation"
    assert score("35.00", example) == {"exact_match": 0.0}
    assert score("thirty-five", example) == {"exact_match": 0.0}


def test_the_run_says_which_variant(shared_data: Path) -> None:
    assert load(shared_data, "train", "dev", "test").notes == (
        "seed 0 draws 1000 train and 500 dev of 7473 rows of train.jsonl",
        "8 demonstrations, mode cot, when an answer is generated; none in the loss",
        "test is 200 questions: the 200 of open-instruct",
    )
    notes = load(shared_data, mode="direct", target="raw", questions="full").notes
    assert notes == (
        "8 demonstrations, mode direct, when an answer is generated; none in the loss",
        "demonstrations begin with `Quesion:`, as in open-instruct",
        "trained on answers as released, and an answer ends at an empty line",
        "test is 1319 questions: all; group subset is the 200 of open-instruct",
    )


def test_the_run_says_what_is_left_of_the_questions(shared_data: Path, tmp_path: Path) -> None:
    assert load(shared_data, test_examples=200).notes[-1] == "test is 200 questions: the 200 of open-instruct"
    assert (
        load(shared_data, test_examples=50).notes[-1] == "test is 50 questions: the first of the 200 of open-instruct"
    )
    assert load(shared_data, test_examples=50, questions="full").notes[-1] == (
        "test is 50 questions: the first of 1319; group subset is from the 200 of open-instruct"
    )
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "How many?", "answer": "Two.\n#### 2"}))
    few = load_task(Gsm8kConfig(name="gsm8k", data_dir=str(tmp_path)), 0, ("test",))
    assert few.notes[-1] == "test is 1 questions: 1 of 1 rows, drawn as open-instruct draws 200 of 1319"


@pytest.mark.parametrize("answer", ["It is 5.", "It is 5.\n####  \n"])
def test_an_answer_without_its_number_is_named(tmp_path: Path, answer: str) -> None:
    rows = [{"question": "How many?", "answer": "Two.\n#### 2"}, {"question": "How many?", "answer": answer}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"test\.jsonl:2: the row needs field 'answer', a text that ends in `#### NUM"):
        load_task(Gsm8kConfig(name="gsm8k", data_dir=str(tmp_path)), 0, ("test",))
