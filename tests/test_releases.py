"""Files of the original releases: every form that a task reads, and bad rows by name."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasc_ds.errors import DataError
from lorasc_ds.task_config import AnswerConfig, ChoiceConfig
from lorasc_ds.tasks import Task, load_task
from lorasc_ds.tasks.rows import read_json, read_rows
from lorasc_ds.tasks.sampling import permutation

ALL = ("train", "dev", "test")


def load(name: str, seed: int = 0, splits: tuple[str, ...] = ALL, **settings: Any) -> Task:
    config = AnswerConfig if name in ("squad", "drop") else ChoiceConfig
    return load_task(config.model_validate({"name": name, **settings}), seed, splits)


def sizes(task: Task) -> tuple[int, ...]:
    return tuple(len(task.splits[split]) for split in ALL)


Release = Callable[[str, Any], None]


@pytest.fixture
def release(tmp_path: Path) -> Release:
    """Writes a file of a release: lines of a .jsonl or .tsv, or the object of a .json."""

    def write(name: str, content: Any) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        text = json.dumps(content)
        if ".jsonl" in name:
            text = "".join(json.dumps(row) + "\n" for row in content)
        elif ".tsv" in name:
            text = "".join("\t".join(row) + "\n" for row in content)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())

    return write


ONE: dict[str, Any] = {"train_examples": 1, "dev_examples": 1}


def test_spans_of_wsc_are_those_of_wsc_fixed(shared_data: Path) -> None:
    """Every span stands in its sentence, as a substring, and nothing else of it has changed but case and newlines."""
    folder = shared_data / "superglue" / "WSC"
    task = load("wsc", data_dir=str(folder), train_examples=554, dev_examples=1)
    assert "spans as in wsc.fixed: 88 of 554 rows of train differ from the file" in task.notes
    assert "spans as in wsc.fixed: 8 of 104 rows of validation differ from the file" in task.notes
    released = {row.id: row for name in ("train", "val") for row in read_rows(folder / f"{name}.jsonl", "key")}
    changed = 0
    for example in (*task.splits["train"], *task.splits["dev"], *task.splits["test"]):
        target = released[example.id].fields["target"]
        sentence, question = example.prompt.split('\nIn the previous sentence, does the pronoun "')
        pronoun, span = question.removesuffix("? Yes or No?\n").split('" refer to ')
        assert sentence == released[example.id].fields["text"]
        assert pronoun == target["span2_text"].lower()
        assert span in sentence
        assert span.lower() == target["span1_text"].lower().replace("\n", " ")
        changed += span != target["span1_text"]
    assert changed == 88 + 8
    texts = {int(e.id.rpartition(":")[2]): e.prompt for e in (*task.splits["train"], *task.splits["dev"])}
    assert texts[17].endswith('the pronoun "they" refer to the demonstrators? Yes or No?\n')
    assert texts[235].endswith("refer to willow-towered Canopy Huntertropic wrestles? Yes or No?\n")
    assert texts[301].endswith('the pronoun "it" refer to The trophy? Yes or No?\n')


def test_sst2_in_the_form_of_glue(release: Release, tmp_path: Path) -> None:
    rows = [["sentence", "label"], ['"frailty " begins ', "1"], ["hide new secretions ", "0"]]
    release("SST-2/train.tsv", rows)
    release("SST-2/dev.tsv", rows)
    examples = load("sst2", data_dir=str(tmp_path), **ONE).splits
    found = {e.id.rpartition("/")[2]: e for e in (*examples["test"], *examples["train"], *examples["dev"])}
    assert set(found) == {"dev.tsv:2", "dev.tsv:3", "train.tsv:2", "train.tsv:3"}
    assert found["train.tsv:2"].texts == ('"frailty " begins It was terrible', '"frailty " begins It was great')
    assert [found[f"train.tsv:{line}"].gold for line in (2, 3)] == [(1,), (0,)]
    assert load("sst2", data_dir=str(tmp_path / "SST-2"), **ONE).splits == examples


def test_wic_in_the_form_of_superglue(release: Release, tmp_path: Path) -> None:
    row = {
        "word": "place", "sentence1": "Do you want to come over to my place later?",
        "sentence2": "A political system with no place for the less prominent groups.", "idx": 0, "label": False,
        "start1": 31, "start2": 27, "end1": 36, "end2": 32, "version": 1.1,
    }  # fmt: skip
    release("WiC/train.jsonl", [row, row | {"label": True}])
    release("WiC/val.jsonl.gz", [row])
    task = load("wic", data_dir=str(tmp_path), **ONE)
    (test,) = task.splits["test"]
    assert test.id == f"{tmp_path}/WiC/val.jsonl.gz:1"
    assert test.gold == (0,)
    assert test.texts[0] == (
        'Does the word "place" have the same meaning in these two sentences? Yes, No?\n'
        "Do you want to come over to my place later?\nA political system with no place for the less prominent"
        " groups.\nNo"
    )
    assert {e.gold for split in ("train", "dev") for e in task.splits[split]} == {(0,), (1,)}


def test_multirc_in_the_form_of_superglue(release: Release, tmp_path: Path) -> None:
    answers = [{"text": "Ann", "idx": 0, "label": 1}, {"text": "Bob", "idx": 1, "label": 0}]
    questions = [
        {"question": "Who has a dog?", "answers": answers, "idx": 0},
        {"question": "Whose?", "answers": [{"text": "Ann's", "idx": 2, "label": 1}], "idx": 1},
    ]
    row = {"idx": 0, "version": 1.1, "passage": {"text": "Ann has a dog.", "questions": questions}}
    release("train.jsonl", [row, row])
    release("val.jsonl", [row])
    task = load("multirc", data_dir=str(tmp_path), train_examples=5, dev_examples=1)
    assert sizes(task) == (5, 1, 3)
    order = [f"{tmp_path}/val.jsonl:1.passage.questions[{q}].answers[{a}]" for q, a in ((0, 0), (0, 1), (1, 0))]
    test = sorted(task.splits["test"], key=lambda example: order.index(example.id))
    assert test[1].prompt == (
        'Ann has a dog.\nQuestion: Who has a dog?\nI found this answer "Bob". Is that correct? Yes or No?\n'
    )
    assert [example.gold for example in test] == [(1,), (0,), (1,)]
    assert [order[at] for at in permutation(3, 0)] == [example.id for example in task.splits["test"]]
    assert "question-answer pairs are drawn and scored each by itself" in task.notes[-1]


def test_record_in_the_form_of_superglue(shared_data: Path) -> None:
    folder = shared_data / "superglue" / "fewglue32" / "ReCoRD"
    task = load("record", data_dir=str(folder), train_examples=24, dev_examples=8)
    assert sizes(task) == (24, 8, 32)
    released = {row.id: row.fields for name in ("train", "dev32") for row in read_rows(folder / f"{name}.jsonl", "key")}
    for example in (*task.splits["train"], *task.splits["dev"], *task.splits["test"]):
        line, _, query = example.id.rpartition(".qas")
        row = released[line]
        text = row["passage"]["text"]
        sentence = row["qas"][int(query.strip("[]"))]
        names = sorted({text[one["start"] :][: one["end"] - one["start"] + 1] for one in row["passage"]["entities"]})
        answers = sorted({answer["text"] for answer in sentence["answers"]})
        assert [names[at] for at in example.gold] == answers
        assert len(example.texts) == len(names)
        for name, full in zip(names, example.texts, strict=True):
            assert full.endswith("\n- " + sentence["query"].replace("@placeholder", name).rstrip(" "))
    golden = next(e for e in (*task.splits["train"], *task.splits["dev"]) if e.id.endswith("train.jsonl:1.qas[0]"))
    assert golden.texts[golden.gold[0]].endswith("the best thing was that Olimpija Ljubljana made it difficult.")


def test_record_with_answers_that_are_no_entities(release: Release, tmp_path: Path) -> None:
    def row(answer: str) -> dict[str, Any]:
        passage = {"text": "Rome beat Paris.", "entities": [{"start": 0, "end": 3}, {"start": 10, "end": 14}]}
        return {"passage": passage, "qas": [{"query": "@placeholder won", "answers": [{"text": answer}]}]}

    release("train.jsonl", [row("Rome"), row("Rome"), row("Rome")])
    release("val.jsonl", [row("Rome"), row("Berlin"), row("Oslo")])
    task = load("record", data_dir=str(tmp_path), train_examples=2, dev_examples=1)
    assert sizes(task) == (2, 1, 3)
    assert [note for note in task.notes if "is no entity" in note] == [
        "the first answer of 2 of 3 rows of test is no entity: the loss is that of its sentence, and to choose it is"
        " wrong"
    ]
    golds = {example.id.rpartition(":")[2]: example.gold for example in task.splits["test"]}
    assert golds == {"1.qas[0]": (1,), "2.qas[0]": (-1,), "3.qas[0]": (-1,)}


def test_both_forms_of_boolq(release: Release, tmp_path: Path, shared_data: Path) -> None:
    row = {"question": "do cats sleep", "title": "Cat", "answer": False, "passage": "Cats sleep a lot."}
    for name in ("train.jsonl", "dev.jsonl"):
        release(name, [row, row, row])
    task = load("boolq", data_dir=str(tmp_path), **ONE)
    assert task.splits["test"][0].texts == (
        "Cats sleep a lot. Do cats sleep?\nYes",
        "Cats sleep a lot. Do cats sleep?\nNo",
    )
    assert task.splits["test"][0].gold == (1,)
    copy = "passages are SuperGLUE's, which begin with the article's title; google/boolq's do not"
    assert copy not in task.notes
    few = load("boolq", data_dir=str(shared_data / "superglue/fewglue32/BoolQ"), train_examples=16, dev_examples=16)
    assert sizes(few) == (16, 16, 32)
    assert copy in few.notes
    assert few.splits["test"][0].prompt.startswith(few.splits["test"][0].prompt.split(" -- ")[0] + " -- ")


def test_squad(shared_data: Path) -> None:
    task = load("squad", data_dir=str(shared_data / "squad"), splits=("test",), test_examples=20_000)
    assert task.notes == ("test is 10570 of 10570 rows of dev-v1.1.rebuilt.json.gz",)
    examples = {example.id.partition(":1.")[2]: example for example in task.splits["test"]}
    first = examples["data[0].paragraphs[0].qas[1]"]
    assert first.prompt.startswith("Title: 1973_oil_crisis\nContext: The 1973 oil crisis began in October 1973 when ")
    assert first.prompt.endswith("\nQuestion: What was the price of oil in March of 1974?\nAnswer:")
    assert first.texts == (first.prompt + " nearly $12\n",)
    assert first.references == ("nearly $12", "$12", "$12", "$12", "$12")
    data = read_json(shared_data / "squad" / "dev-v1.1.rebuilt.json.gz", "key")["data"]
    flat = [qa for article in data for paragraph in article["paragraphs"] for qa in paragraph["qas"]]
    drawn = [flat[at]["question"].strip() for at in permutation(10570, 0)]
    assert [e.prompt.rpartition("\nQuestion: ")[2].removesuffix("\nAnswer:") for e in task.splits["test"]] == drawn


def test_squad_trains_on_the_real_file(shared_data: Path) -> None:
    task = load("squad", data_dir=str(shared_data / "squad"), splits=("train", "dev"))
    assert (len(task.splits["train"]), len(task.splits["dev"]), list(task.splits)) == (1000, 500, ["train", "dev"])
    assert task.notes == ("seed 0 draws 1000 train and 500 dev of 87599 rows of train-v1.1.rebuilt.json.gz",)


def test_drop_in_its_original_form(shared_data: Path, tmp_path: Path) -> None:
    fixture = shared_data / "drop" / "allennlp_fixture_drop.json"
    for name in ("train", "dev"):
        (tmp_path / f"drop_dataset_{name}.json").write_bytes(fixture.read_bytes())
    task = load("drop", data_dir=str(tmp_path), train_examples=9, dev_examples=10)
    assert sizes(task) == (9, 10, 19)
    lines = fixture.read_text().split("\n")
    answers = {}
    for example in task.splits["test"]:
        line, _, place = example.id.rpartition(".json:")[2].partition(".")
        assert f'"{place.partition(".")[0]}": {{' in lines[int(line) - 1]
        answers[place] = example.references
    pairs = {
        f"{key}.qa_pairs[{at}]": pair
        for key, section in json.loads(fixture.read_text()).items()
        for at, pair in enumerate(section["qa_pairs"])
    }
    assert set(answers) == set(pairs)
    for place, pair in pairs.items():
        assert answers[place] == tuple(pair["answer"]["spans"] or [pair["answer"]["number"]])
    assert answers["history_319.qa_pairs[0]"] == ("sixth terminal",)


def test_answers_of_drop_are_spans_as_on_the_hub(release: Release, tmp_path: Path) -> None:
    none = {"day": "", "month": "", "year": ""}

    def answer(number: str = "", date: dict[str, str] = none, spans: tuple[str, ...] = ()) -> dict[str, Any]:
        return {"number": number, "date": date, "spans": list(spans)}

    pairs = {
        "a number": [answer(number="21"), answer(number="22", date={})],
        "a date": [answer(date={"day": "4", "month": "May", "year": "1999"})],
        "a month": [answer(date=none | {"month": "May", "year": "1999"})],
        "spans": [answer(spans=("Bears", "Jets")), answer(spans=("the Bears",))],
        "two kinds": [answer(spans=("Bears",)), answer(number="3", spans=("x",))],
        "nothing": [answer()],
        "no one": [],
    }
    asked = [
        {"question": question, "query_id": "q", "answer": answer(number="1"), "validated_answers": found}
        for question, found in pairs.items()
    ]
    for name in ("train", "dev"):
        release(f"drop_dataset_{name}.json", {"nfl_1": {"passage": "p", "wiki_url": "u", "qa_pairs": asked}})
    task = load("drop", data_dir=str(tmp_path), train_examples=6, dev_examples=1)
    found = {e.prompt.split("\nQuestion: ")[1].removesuffix("\nAnswer:"): e.references for e in task.splits["test"]}
    assert found == {
        "a number": ("21", "22"), "a date": ("4 May 1999",), "a month": ("May 1999",),
        "spans": ("Bears", "Jets", "the Bears"),
    }  # fmt: skip
    assert "3 questions of validation without one kind of answer are left out" in task.notes
    assert sizes(task) == (6, 1, 4)
    assert {e.references for e in task.splits["train"]} == {("1",)}, "training takes the answer of the writer"


def test_drop_in_prompt_form(shared_data: Path) -> None:
    task = load("drop", data_dir=str(shared_data / "drop"), splits=("test",), test_examples=10_000)
    rows = {row.id: row for row in read_rows(shared_data / "drop" / "drop_v0_dev.jsonl.gz", "key")}
    assert len(task.splits["test"]) == len(rows) == 9536
    assert "the prompt form of DROP: the spans of an answer are one text, joined by `and`" in task.notes
    for example in task.splits["test"]:
        row = rows[example.id]
        begin, _, asked = row.text("context").removesuffix("\nAnswer:").rpartition("\nQuestion: ")
        assert example.prompt == f"{begin}\nQuestion: {asked.strip()}\nAnswer:"
        assert example.texts == (example.prompt + row.text("completion") + "\n",)
        assert "|".join(example.references) == row.text("ref_text")


def test_evaluation_alone_needs_no_training_file(release: Release, tmp_path: Path) -> None:
    release("val.jsonl", [{"premise": "a", "hypothesis": "b", "label": "entailment"}])
    task = load("rte", data_dir=str(tmp_path), splits=("test",))
    assert list(task.splits) == ["test"]
    with pytest.raises(DataError, match=r"task\.data_dir '.*' has none of RTE/train\.jsonl, train\.jsonl \(nor"):
        load("rte", data_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"task\.data_dir '.*' has none of drop_dataset_train\.json \(nor"):
        load("drop", data_dir=str(tmp_path))


BAD: list[tuple[str, str, Any, str]] = [
    ("rte", "train.jsonl", [{"premise": "a", "label": 0}] * 9, r"train\.jsonl:\d: the row needs field 'hypothesis'"),
    ("rte", "train.jsonl", [{"x": 1}] * 1, r"task\.dev_examples 1 leaves none of the 1 rows of train\.jsonl to train on"),
    ("wsc", "train.jsonl", [{"text": "a", "label": 0}], r"train\.jsonl:1: the row needs field 'target', an object"),
    ("record", "train.jsonl", [{"passage": {"text": "a"}}], r"train\.jsonl:1\.passage: .* 'entities', a list of objects"),
    ("multirc", "train.jsonl", [{"passage": "a"}], r"train\.jsonl:1: the row needs field 'passage', an object, got 'a'"),
    ("boolq", "train.jsonl", [{"label": "maybe"}], r"train\.jsonl:1: .* 'label', one of False, True, .* got 'maybe'"),
    ("sst2", "train.tsv", [["sentence", "label"], ["a", "1", "2"]], r"train\.tsv:2: 3 cells, but the heading has 2"),
    ("squad", "train-v1.1.json", [1], r"train-v1\.1\.json:1: an object with named fields is needed, got \[1\]"),
    ("squad", "train-v1.1.json", {"data": [{"title": "a", "paragraphs": [{"context": "b"}]}]}, r"json:1\.data\[0\]\.paragraphs\[0\]: .* 'qas'"),
    ("drop", "drop_dataset_train.json", {"nfl_1": {"passage": "p"}}, r"json:1\.nfl_1: .* 'qa_pairs', a list of objects"),
    ("drop", "drop_dataset_train.json", {"nfl_1": {"passage": "p", "qa_pairs": [{}]}}, r"qa_pairs\[0\]: .* 'answer'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "content", "message"), BAD)
def test_a_bad_row_of_a_release_is_named(
    release: Release, tmp_path: Path, name: str, file: str, content: Any, message: str
) -> None:
    release(file, content)
    with pytest.raises(DataError, match=message) as caught:
        load(name, splits=("train", "dev"), data_dir=str(tmp_path), **ONE)
    assert "\n" not in str(caught.value)


def test_a_bad_row_of_many_lines_is_named_by_where_it_begins(tmp_path: Path) -> None:
    good = {"title": "a", "paragraphs": []}
    content = {"data": [good, {"title": "a", "paragraphs": [{"context": "b"}]}], "version": "1.1"}
    (tmp_path / "train-v1.1.json").write_text(json.dumps(content, indent=1))
    with pytest.raises(DataError, match=r"json:7\.data\[1\]\.paragraphs\[0\]: .* 'qas'"):
        load("squad", splits=("train", "dev"), data_dir=str(tmp_path), **ONE)
    sections = {"nfl_1": {"passage": "p", "qa_pairs": []}, "nfl_2": {"passage": "p"}}
    (tmp_path / "drop_dataset_train.json").write_text(json.dumps(sections, indent=1))
    with pytest.raises(DataError, match=r"json:6\.nfl_2: .* 'qa_pairs'"):
        load("drop", splits=("train", "dev"), data_dir=str(tmp_path), **ONE)


def test_a_prompt_of_drop_of_another_form_is_named(release: Release, tmp_path: Path) -> None:
    release("drop_v0_dev.jsonl", [{"context": "Question: x\nAnswer:", "ref_text": "y"}])
    with pytest.raises(DataError, match=r"drop_v0_dev\.jsonl:1: the row needs field 'context', a text `Passage: "):
        load("drop", data_dir=str(tmp_path), splits=("test",))
