"""MMLU, BBH and DROP as InstructEval asks them: prompts to the letter, what is right, and the real files (protocols 5)."""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_tasks import Hub, accuracy
from transformers import AutoTokenizer

from lorasc_ds.encoding import Encoder
from lorasc_ds.errors import ConfigError, DataError
from lorasc_ds.task_config import BbhConfig, DropFewShotConfig, HumanEvalConfig, MmluConfig
from lorasc_ds.tasks import Example, load_task
from lorasc_ds.tasks.bbh import SUBJECTS


def whole(example: Example) -> str:
    """The prompt with every demonstration."""
    return example.header + "".join(example.shots) + example.prompt


# MMLU


def mmlu_rows(split: str, count: int) -> list[list[str]]:
    return [[f"{split} {i}?", f"w{i}", f"x{i}", f"y{i}", f"z{i}", "ABCD"[i % 4]] for i in range(count)]


MMLU_PROMPT = (
    "The following are multiple choice questions (with answers) about  high school us history.\n\n"
    "dev 0?\nA. w0\nB. x0\nC. y0\nD. z0\nAnswer: A\n\n"
    "dev 1?\nA. w1\nB. x1\nC. y1\nD. z1\nAnswer: B\n\n"
    "dev 2?\nA. w2\nB. x2\nC. y2\nD. z2\nAnswer: C\n\n"
    "dev 3?\nA. w3\nB. x3\nC. y3\nD. z3\nAnswer: D\n\n"
    "dev 4?\nA. w4\nB. x4\nC. y4\nD. z4\nAnswer: A\n\n"
    "test 1?\nA. w1\nB. x1\nC. y1\nD. z1\nAnswer:"
)


def write_mmlu(folder: Path, *, heading: bool) -> Path:
    """As released, or as on the hub: a heading, and an index for the letter."""
    for split, count in (("dev", 6), ("test", 3)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        rows = mmlu_rows(split, count)
        if heading:
            rows = [["question", "choice0", "choice1", "choice2", "choice3", "answer"]] + [
                [*row[:5], str("ABCD".index(row[5]))] for row in rows
            ]
        text = "".join(",".join(row) + "\n" for row in rows)
        (folder / split / f"high_school_us_history_{split}.csv").write_text(text)
    return folder


@pytest.mark.parametrize("heading", [False, True], ids=["released", "with a heading"])
def test_mmlu_prompt(heading: bool, tmp_path: Path) -> None:
    """Five shots, though there are six; two spaces before the subject."""
    task = load_task(MmluConfig(name="mmlu", data_dir=str(write_mmlu(tmp_path, heading=heading))), seed=0)
    assert list(task.splits) == ["test"]
    example = task.splits["test"][1]
    assert whole(example) == MMLU_PROMPT
    assert len(task.splits["test"]) == 3
    assert (example.references, example.group) == (("B",), "high_school_us_history")
    assert example.id.endswith(f"high_school_us_history_test.csv:{3 if heading else 2}")
    assert task.generation is not None
    assert (task.generation.max_new_tokens, task.generation.max_length, task.generation.temperature) == (2, 2048, 0)
    assert (task.average, task.kind, task.generation.stop) == ("micro", "generation", ())
    assert [accuracy(task, answer, example) for answer in (" B", "B.", "\nBoth", "A", "b", "", "(B)")] == [
        1,
        1,
        1,
        0,
        0,
        0,
        0,
    ]
    assert "the accuracy is the mean over questions over 1 of 57 subjects" in task.notes


def test_mmlu_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(split: str, count: int) -> list[dict[str, Any]]:
        cells = mmlu_rows(split, count)
        return [
            {"question": q, "subject": subject, "choices": choices, "answer": "ABCD".index(a)}
            for subject in ("anatomy", "high_school_us_history")
            for q, *choices, a in cells
        ]

    hub = Hub({("all", "dev"): rows("dev", 5), ("all", "test"): rows("test", 3)})
    monkeypatch.setattr(sys.modules["lorasc_ds.tasks.mmlu"], "hub_rows", hub)
    task = load_task(MmluConfig(name="mmlu", subjects=("high_school_us_history",)), seed=0)
    assert [whole(example) for example in task.splits["test"]][1] == MMLU_PROMPT
    assert len(task.splits["test"]) == 3
    assert hub.asked == [("cais/mmlu", "all", "dev", None), ("cais/mmlu", "all", "test", None)]
    assert len(load_task(MmluConfig(name="mmlu", revision="r"), seed=0).splits["test"]) == 6
    assert hub.asked[-1][-1] == "r"
    with pytest.raises(
        ConfigError, match=r"task\.subjects has 'anatomi', which is none of anatomy, high_school_us_history$"
    ):
        load_task(MmluConfig(name="mmlu", subjects=("anatomi",)), seed=0)


def test_mmlu_real_files(shared_data: Path) -> None:
    task = load_task(MmluConfig(name="mmlu", data_dir=str(shared_data / "mmlu")), seed=0)
    examples = task.splits["test"]
    groups = [example.group for example in examples]
    assert {group: groups.count(group) for group in groups} == {
        "abstract_algebra": 100,
        "anatomy": 135,
        "high_school_us_history": 204,
    }
    assert all(len(example.shots) == 5 for example in examples)
    assert whole(examples[0]).startswith(
        "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
        "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer: B\n\nStatement 1 | If aH"
    )
    one = load_task(MmluConfig(name="mmlu", data_dir=str(shared_data / "mmlu"), subjects=("anatomy",)), seed=0)
    assert one.splits["test"] == [example for example in examples if example.group == "anatomy"]


def test_the_last_shots_are_left_out_of_a_prompt_that_is_too_long(shared_data: Path) -> None:
    """History's five shots with a tokenizer of 512 tokens: as many of the first ones as fit into 2048."""
    folder = shared_data / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = load_task(
        MmluConfig(name="mmlu", data_dir=str(shared_data / "mmlu"), subjects=("high_school_us_history",)), seed=0
    )
    examples = task.splits["test"][:8]
    encoder = Encoder(tokenizer, task, max_length=None, model_limit=4096, vocabulary_size=512)
    left_out = 0
    for example, prompt in zip(examples, encoder.prompts(examples), strict=True):
        lengths = [
            len(tokenizer(example.header + "".join(example.shots[:n]) + example.prompt)["input_ids"]) for n in range(6)
        ]
        fit = sum(length <= 2048 for length in lengths) - 1
        assert len(prompt.ids) == lengths[fit]
        assert 0 <= fit < 5
        left_out += 5 - fit
    assert (encoder.shots_left_out, encoder.truncated) == (left_out, 0)


@pytest.mark.parametrize(
    ("split", "text", "message"),
    [
        ("test", "q,a,b,c,d,A\nq,a,b,c,A\n", r"test.csv:2: 5 cells; a question, four choices and an answer are needed$"),
        ("test", "q,a,b,c,d,E\n", r"test.csv:1: the row needs field 'answer', one of A, B, C, D, or its index from 0, got 'E'$"),
        ("dev", 'q,a,b,c,d,A\n"q,a,b', r"dev.csv:2: not a row of a table"),
    ],
)  # fmt: skip
def test_mmlu_bad_rows(split: str, text: str, message: str, tmp_path: Path) -> None:
    write_mmlu(tmp_path, heading=False)
    (tmp_path / split / f"high_school_us_history_{split}.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load_task(MmluConfig(name="mmlu", data_dir=str(tmp_path)), seed=0)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task\.data_dir '.*' has no test/SUBJECT_test\.csv: give the folder"):
        load_task(MmluConfig(name="mmlu", data_dir=str(tmp_path)), seed=0)
    write_mmlu(tmp_path, heading=False)
    (tmp_path / "dev" / "high_school_us_history_dev.csv").unlink()
    with pytest.raises(DataError, match=r"task\.data_dir '.*' has none of dev/high_school_us_history_dev\.csv"):
        load_task(MmluConfig(name="mmlu", data_dir=str(tmp_path)), seed=0)
    with pytest.raises(DataError, match=r"task\.data_dir '.*' has none of boolean_expressions\.json"):
        load_task(BbhConfig(name="bbh", data_dir=str(tmp_path)), seed=0)
    with pytest.raises(DataError, match=r"task\.data_dir '.*' has none of navigate\.json"):
        load_task(BbhConfig(name="bbh", data_dir=str(tmp_path), subjects=("navigate",)), seed=0)
    with pytest.raises(DataError, match=r"task\.data_dir '.*' has none of drop_dataset_dev\.json"):
        load_task(DropFewShotConfig(name="drop_few_shot", data_dir=str(tmp_path)), seed=0)
    with pytest.raises(DataError, match=r"task\.data_dir '.*' has none of HumanEval\.jsonl"):
        load_task(HumanEvalConfig(name="humaneval", data_dir=str(tmp_path), confirm_run_unsafe_code=True), seed=0)


# BBH

BBH_ROWS = [{"input": f"{i} + 1 is", "target": f"({i + 1})"} for i in range(5)]
BBH_PROMPT = "0 + 1 is\nAnswer: (1)\n\n1 + 1 is\nAnswer: (2)\n\n2 + 1 is\nAnswer: (3)\n\n3 + 1 is\nAnswer:"


def test_bbh_prompt(tmp_path: Path) -> None:
    """No heading; the three that are solved are not asked."""
    (tmp_path / "navigate.json").write_text(json.dumps({"canary": "x", "examples": BBH_ROWS}))
    (tmp_path / "other.json").write_text("[]")
    task = load_task(BbhConfig(name="bbh", data_dir=str(tmp_path)), seed=0)
    example, last = task.splits["test"]
    assert whole(example) == BBH_PROMPT
    assert last.prompt == "4 + 1 is\nAnswer:"
    assert (example.references, example.group, task.average) == (("(4)",), "navigate", "macro")
    assert task.generation is not None
    assert (task.generation.max_new_tokens, task.generation.max_length) == (32, 2048)
    assert [accuracy(task, answer, example) for answer in (" (4)\n\n5 + 1", "(4)2", "4", "the answer is (4)")] == [
        1,
        1,
        0,
        0,
    ]
    with pytest.raises(
        ConfigError, match=r"task\.subjects has 'other', which is none of boolean_expressions, .*, word_sorting$"
    ):
        load_task(BbhConfig(name="bbh", data_dir=str(tmp_path), subjects=("other",)), seed=0)
    (tmp_path / "navigate.json").write_text(json.dumps({"examples": [*BBH_ROWS, {"input": "x"}]}))
    with pytest.raises(DataError, match=r"navigate\.json:1\.examples\[5\]: the row needs field 'target'"):
        load_task(BbhConfig(name="bbh", data_dir=str(tmp_path)), seed=0)
    (tmp_path / "navigate.json").write_text(json.dumps({"examples": [*BBH_ROWS, {"input": "x"}]}, indent=1))
    with pytest.raises(DataError, match=r"navigate\.json:23\.examples\[5\]: the row needs field 'target'"):
        load_task(BbhConfig(name="bbh", data_dir=str(tmp_path)), seed=0)


def test_bbh_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub({(subject, "test"): BBH_ROWS for subject in SUBJECTS})
    monkeypatch.setattr(sys.modules["lorasc_ds.tasks.bbh"], "hub_rows", hub)
    task = load_task(BbhConfig(name="bbh"), seed=0)
    assert len(set(SUBJECTS)) == 27
    assert hub.asked == [("lukaemon/bbh", subject, "test", "refs/convert/parquet") for subject in SUBJECTS]
    assert [example.group for example in task.splits["test"]] == [one for one in SUBJECTS for _ in range(2)]
    assert whole(task.splits["test"][0]) == BBH_PROMPT
    assert "the accuracy is the mean of the means over all 27 subjects" in task.notes
    load_task(BbhConfig(name="bbh", subjects=("navigate",), revision="main"), seed=0)
    assert hub.asked[27:] == [("lukaemon/bbh", "navigate", "test", "main")]


def test_bbh_real_files(shared_data: Path) -> None:
    task = load_task(BbhConfig(name="bbh", data_dir=str(shared_data / "bbh")), seed=0)
    groups = [example.group for example in task.splits["test"]]
    assert {group: groups.count(group) for group in groups} == dict.fromkeys(
        ("boolean_expressions", "date_understanding", "object_counting"), 247
    )
    assert whole(task.splits["test"][0]) == (
        "not ( True ) and ( True ) is\nAnswer: False\n\nTrue and not not ( not False ) is\nAnswer: True\n\n"
        "not True or False or ( False ) is\nAnswer: False\n\nFalse or not ( True ) and False is\nAnswer:"
    )


# DROP


def drop_row(passage: str, question: str, spans: list[str]) -> dict[str, Any]:
    return {"passage": passage, "question": question, "answers_spans": {"spans": spans}}


def test_drop_prompt_and_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions with one distinct answer; none on a passage that a demonstration is about."""
    single = [drop_row(f" Passage {i // 2}. ", f" How many {i}? ", [f"{i} ", f"{i}"]) for i in range(20)]
    several = [drop_row(f"Passage {i}.", "Who?", ["Ann", "Bob"]) for i in range(5)]
    hub = Hub({(None, "validation"): [*several[:2], *single, *several[2:]]})
    monkeypatch.setattr(sys.modules["lorasc_ds.tasks.drop_few_shot"], "hub_rows", hub)
    task = load_task(DropFewShotConfig(name="drop_few_shot"), seed=1)
    random.seed(0)
    chosen = random.sample(range(20), 3)
    passages = {i // 2 for i in chosen}
    asked = [i for i in range(20) if i // 2 not in passages]
    shots = "".join(f"Passage {i // 2}. How many {i}?\nAnswer: {i}\n\n" for i in chosen)
    assert [whole(example) for example in task.splits["test"]] == [
        f"{shots}Passage {i // 2}. How many {i}?\nAnswer:" for i in asked
    ]
    assert hub.asked == [("ucinlp/drop", None, "validation", None)]
    example = task.splits["test"][0]
    assert example.references == (str(asked[0]),)
    assert task.generation is not None
    assert (task.generation.max_new_tokens, task.generation.max_length, task.average) == (8, 2048, "micro")
    assert [accuracy(task, answer, example) for answer in (f" {asked[0]}\n", f"{asked[0]}.5", "Five")] == [1, 1, 0]
    assert task.notes[0].startswith(f"{len(asked)} of 25 questions: ")
    hub.rows[None, "validation"] = single[:3]
    with pytest.raises(DataError, match="3 of 3 questions have one answer, but 3 are solved first: more are needed"):
        load_task(DropFewShotConfig(name="drop_few_shot"), seed=0)


def test_drop_in_its_original_form(shared_data: Path, tmp_path: Path) -> None:
    """All 19 have one answer; the three that chance picks are on nfl_653 alone, or on another passage too."""
    fixture = json.loads((shared_data / "drop" / "allennlp_fixture_drop.json").read_text())
    (tmp_path / "drop_dataset_dev.json").write_text(json.dumps(fixture))
    task = load_task(DropFewShotConfig(name="drop_few_shot", data_dir=str(tmp_path)), seed=0)
    rows = [
        (section["passage"], asked["question"], asked["answer"])
        for section in fixture.values()
        for asked in section["qa_pairs"]
    ]
    assert len(rows) == 19
    chosen = random.Random(0).sample(rows, 3)
    texts = [answer["number"] or answer["spans"][0] for _, _, answer in chosen]
    expected = tuple(
        f"{p.strip()} {q.strip()}\nAnswer: {text}\n\n" for (p, q, _), text in zip(chosen, texts, strict=True)
    )
    left = [row for row in rows if row[0] not in {passage for passage, _, _ in chosen}]
    assert [example.shots for example in task.splits["test"]] == [expected] * len(left)
    assert [example.prompt for example in task.splits["test"]] == [
        f"{p.strip()} {q.strip()}\nAnswer:" for p, q, _ in left
    ]
    assert 0 < len(left) < 19


def test_drop_real_file(shared_data: Path) -> None:
    """Counted another way, from the file itself."""
    task = load_task(DropFewShotConfig(name="drop_few_shot", data_dir=str(shared_data / "drop")), seed=0)
    with gzip.open(shared_data / "drop" / "drop_v0_dev.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    single = [row for row in rows if len({answer.strip() for answer in row["ref_text"].split("|")}) == 1]
    chosen = random.Random(0).sample(single, 3)
    passages = {row["context"].split("\nQuestion: ")[0] for row in chosen}
    left = [row for row in single if row["context"].split("\nQuestion: ")[0] not in passages]
    assert (len(rows), len(single), len(left)) == (9536, 5961, 5928)
    assert [example.references[0] for example in task.splits["test"]] == [
        row["ref_text"].split("|")[0].strip() for row in left
    ]
    assert all(shot in task.splits["test"][0].shots for shot in task.splits["test"][-1].shots)
