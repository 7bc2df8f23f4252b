"""Which rows of a public data set are drawn, by MeZO's numbers, and what the task says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorasc_ds.task_config import AnswerConfig, ChoiceConfig
from lorasc_ds.tasks import Task, load_task
from lorasc_ds.tasks.rows import read_rows
from lorasc_ds.tasks.sampling import draw_test, draw_training, permutation

ALL = ("train", "dev", "test")


def load(name: str, seed: int = 0, splits: tuple[str, ...] = ALL, **settings: Any) -> Task:
    config = AnswerConfig if name in ("squad", "drop") else ChoiceConfig
    return load_task(config.model_validate({"name": name, **settings}), seed, splits)


def sizes(task: Task) -> tuple[int, ...]:
    return tuple(len(task.splits[split]) for split in ALL)


def lines(task: Task, split: str) -> list[int]:
    return [int(example.id.rpartition(":")[2]) for example in task.splits[split]]


@pytest.mark.parametrize(
    ("seed", "begin"),
    [(0, [993, 859, 298, 553, 672, 971]), (1, [507, 818, 452, 368, 242, 929]), (2, [37, 726, 846, 295, 924, 658])],
)
def test_permutations(seed: int, begin: list[int]) -> None:
    before = repr(np.random.get_state())
    assert permutation(1000, seed)[:6] == begin
    assert repr(np.random.get_state()) == before, "the global generator is left alone"


def test_the_draw_is_that_of_the_global_generator() -> None:
    state = np.random.get_state()
    try:
        for count, train, dev, seed in ((40, 10, 5, 0), (12, 10, 5, 7), (15, 10, 5, 2**32 - 1), (4, 10, 5, 3)):
            np.random.seed(seed)
            picked = [int(at) for at in np.random.permutation(count)[: train + dev]]
            assert draw_training(count, train, dev, seed) == (picked[:-dev], picked[-dev:])
            np.random.seed(seed)
            assert draw_test(count, dev, seed) == np.random.permutation(count)[:dev].tolist()
    finally:
        np.random.set_state(state)


HUB: dict[str, tuple[str, str | None, int, int, dict[str, Any], tuple[int, int, int]]] = {
    "sst2": ("nyu-mll/glue", "sst2", 67349, 872, {"sentence": "a", "label": 0}, (1000, 500, 872)),
    "rte": ("aps/super_glue", "rte", 2490, 277, {"premise": "a", "hypothesis": "b", "label": 0}, (1000, 500, 277)),
    "cb": ("aps/super_glue", "cb", 250, 56, {"premise": "a", "hypothesis": "b", "label": 2}, (150, 100, 56)),
    "boolq": (
        "google/boolq", None, 9427, 3270, {"passage": "a", "question": "b", "answer": True}, (1000, 500, 1000)
    ),
    "wsc": (
        "aps/super_glue", "wsc.fixed", 554, 104,
        {"text": "a", "span1_text": "b", "span2_text": "c", "label": 1}, (54, 500, 104),
    ),
    "wic": (
        "aps/super_glue", "wic", 5428, 638,
        {"word": "a", "sentence1": "b", "sentence2": "c", "label": 1}, (1000, 500, 638),
    ),
    "multirc": (
        "aps/super_glue", "multirc", 27243, 4848,
        {"paragraph": "a", "question": "b", "answer": "c", "label": 1}, (1000, 500, 1000),
    ),
    "copa": (
        "aps/super_glue", "copa", 400, 100,
        {"premise": "a", "choice1": "b", "choice2": "c", "question": "cause", "label": 1}, (300, 100, 100),
    ),
    "record": (
        "aps/super_glue", "record", 100730, 10000,
        {"passage": "a", "query": "b", "entities": ["c"], "answers": ["c"]}, (1000, 500, 1000),
    ),
    "squad": (
        "rajpurkar/squad", None, 87599, 10570,
        {"title": "a", "context": "b", "question": "c", "answers": {"text": ["d"], "answer_start": [0]}},
        (1000, 500, 1000),
    ),
    "drop": (
        "ucinlp/drop", None, 77400, 9535,
        {"passage": "a", "question": "b", "answers_spans": {"spans": ["c"], "types": ["span"]}}, (1000, 500, 1000),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_sizes_from_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, config, train, validation, row, expected = HUB[name]
    asked = []

    def load_dataset(path: str, name: str | None, *, split: str, revision: str | None) -> list[dict[str, Any]]:
        asked.append((path, name, split, revision))
        return [row] * {"train": train, "validation": validation}[split]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    task = load(name, seed=1, revision="abc")
    assert asked == [(dataset, config, "train", "abc"), (dataset, config, "validation", "abc")]
    assert sizes(task) == expected
    assert [number - 1 for number in lines(task, "test")] == permutation(validation, 1)[: expected[2]]
    drawn = permutation(train, 1)[: 1500 if train >= 1500 else 1100]
    assert [number - 1 for number in lines(task, "train") + lines(task, "dev")] == drawn
    assert f"test is {expected[2]} of {validation} rows of the public validation split" in task.notes


LOSSES = {"copa": "lm", "record": "lm"}


def test_what_a_task_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda path, config, **_: [row_of(path, config)] * 2)

    def row_of(path: str, config: str | None) -> dict[str, Any]:
        return next(row for dataset, name, _, _, row, _ in HUB.values() if (dataset, name) == (path, config))

    for name in HUB:
        task = load(name, train_examples=1, dev_examples=1)
        generated = name in ("squad", "drop")
        assert task.name == name
        assert task.kind == ("generation" if generated else "candidates")
        assert task.loss == LOSSES.get(name, "lm" if generated else "classification")
        assert (task.headline, task.max_length) == ("f1" if generated else "accuracy", 2048)
        assert (task.cut, task.ends, task.average) == ("beginning", False, "micro")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("rte", (1000, 500, 277)), ("cb", (150, 100, 56)), ("copa", (300, 100, 100)), ("wsc", (54, 500, 104))],
)
def test_sizes_from_the_real_files(shared_data: Path, name: str, expected: tuple[int, ...]) -> None:
    folder = shared_data / "superglue"
    task = load(name, data_dir=str(folder))
    assert sizes(task) == expected
    own = load(name, data_dir=str(folder / name.upper()))
    assert own.splits == task.splits, "the folder of the task, or the one that holds all"
    drawn = permutation(len(read_rows(folder / name.upper() / "train.jsonl", "key")), 0)
    assert [line - 1 for line in lines(task, "train")] == drawn[: expected[0]]
    assert [line - 1 for line in lines(task, "dev")] == drawn[expected[0] :][: expected[1]]
    assert load(name, seed=3, sample_seed=0, data_dir=str(folder)).splits == task.splits
    assert load(name, seed=3, data_dir=str(folder)).splits != task.splits


def test_labels_of_the_real_files(shared_data: Path) -> None:
    """Shares of the first candidate over whole files: labels are not turned round."""
    counts = {"rte": 146, "cb": 23, "copa": 55, "wsc": 66}
    for name, count in counts.items():
        task = load(name, data_dir=str(shared_data / "superglue"), splits=("test",))
        assert sum(example.gold == (0,) for example in task.splits["test"]) == count
    boolq = load("boolq", data_dir=str(shared_data / "superglue"), splits=("test",), test_examples=10_000)
    rows = read_rows(shared_data / "superglue" / "BoolQ" / "val.jsonl", "key")
    assert len(boolq.splits["test"]) == len(rows) == 3270
    truth = {row.id: row.fields["label"] for row in rows}
    assert all(example.texts[example.gold[0]].endswith("\nYes" if truth[example.id] else "\nNo") for example in boolq.splits["test"])  # fmt: skip
    assert sum(truth.values()) == 2033


def test_a_variant_is_said(shared_data: Path) -> None:
    folder = str(shared_data / "superglue")
    faithful = load("wsc", data_dir=folder)
    assert faithful.notes[0] == (
        "seed 0 draws 54 train and 500 dev of 554 rows of train.jsonl; there are fewer than 1000 + 500, so train"
        " shrinks and dev does not"
    )
    sane = load("wsc", data_dir=folder, train_examples=454, dev_examples=100)
    assert sizes(sane) == (454, 100, 104)
    assert sane.notes[0] == (
        "seed 0 draws 454 train and 100 dev of 554 rows of train.jsonl; asked for are 454 and 100, not MeZO's 1000 and"
        " 500"
    )
    other = load("rte", data_dir=folder, loss="lm")
    assert (other.loss, other.notes[-1]) == ("lm", "loss lm in place of MeZO's classification")
    assert "loss" not in " ".join(load("rte", data_dir=folder, loss="classification").notes)
