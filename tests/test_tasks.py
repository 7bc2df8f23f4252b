"""The tasks' examples: golden strings, disjoint images, wrong labels, and files with `file:line`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from lorasc_ds.errors import DataError
from lorasc_ds.task_config import DigitsConfig, TextConfig
from lorasc_ds.tasks import load_task
from lorasc_ds.tasks.digits import DOMAINS, blurred, load_images, noisy, prompt_of


def test_an_image_as_text() -> None:
    image = np.zeros((8, 8))
    image[0, 1], image[7, 7] = 16, 1
    assert prompt_of(image) == " ".join(["a", "q", *"a" * 61, "b"]) + " ="


def test_domains_and_corruptions() -> None:
    image = np.arange(64.0).reshape(1, 8, 8) % 17
    assert DOMAINS["mirrored"](image)[0, 2].tolist() == image[0, 2, ::-1].tolist()
    assert DOMAINS["rotated"](image)[0, :, 0].tolist() == image[0, 0, ::-1].tolist()
    point = np.zeros((1, 8, 8))
    point[0, 3, 3] = 10_000
    assert blurred(point)[0, 2:5, 2:5] == pytest.approx(
        np.array([[225, 1050, 225], [1050, 4900, 1050], [225, 1050, 225]])
    )
    assert np.array_equal(noisy(image), noisy(image))
    assert np.std(noisy(np.zeros((100, 8, 8)))) == pytest.approx(2, rel=0.03)


def test_the_images_are_scikit_learn_s() -> None:
    """Read without importing it."""
    pixels, labels = load_digits(return_X_y=True)
    images, found = load_images()
    order = np.random.default_rng(0).permutation(len(labels))
    assert np.array_equal(images.reshape(-1, 64), np.asarray(pixels)[order])
    assert np.array_equal(found, np.asarray(labels)[order])


def test_splits_share_no_image_and_only_train_has_wrong_labels() -> None:
    config = DigitsConfig(domain="upright", train_examples=100, dev_examples=197, label_noise=0.3)
    task = load_task(config, seed=4)
    images, labels = load_images()
    truth = {prompt_of(image): int(label) for image, label in zip(images, labels, strict=True)}
    pretraining = {prompt_of(image) for image in images[:1000]}
    prompts = {split: {example.prompt for example in task.splits[split]} for split in ("train", "dev", "new_domain")}
    assert not prompts["train"] & prompts["dev"]
    assert not (prompts["train"] | prompts["dev"]) & prompts["new_domain"]
    assert not pretraining & (prompts["train"] | prompts["dev"] | prompts["new_domain"])
    wrong = {
        split: sum(truth[e.prompt] != e.gold[0] for e in examples)
        for split, examples in task.splits.items()
        if split in prompts
    }
    assert wrong == {"train": 30, "dev": 0, "new_domain": 0}
    assert {split: len(examples) for split, examples in task.splits.items()} == {
        "train": 100, "dev": 197, "new_domain": 500, "new_domain_blurred": 500, "new_domain_noisy": 500, "old_domain": 500
    }  # fmt: skip
    example = task.splits["train"][0]
    assert example.texts == tuple(f"{example.prompt} {digit}" for digit in range(10))


def test_the_seed_draws_the_sample() -> None:
    first, again, other = (load_task(DigitsConfig(), seed).splits["train"] for seed in (0, 0, 1))
    assert first == again
    assert first != other


def write_rows(path: Path, rows: list[object]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_rows_of_a_jsonl_are_documents(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"body": f"text {i}"} for i in range(20)])
    task = load_task(TextConfig(name="text", train_file=file, text_field="body"), seed=0)
    assert [example.texts[0] for example in task.splits["train"]] == [f"text {i}" for i in range(18)]
    assert [example.id for example in task.splits["dev"]] == [f"{file}:19", f"{file}:20"]


def test_a_row_ends_at_a_newline_and_nowhere_else(tmp_path: Path) -> None:
    """U+2028 and U+0085 stand inside valid rows; str.splitlines would cut there."""
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{i}\u2028and\u0085more"}}\n' for i in range(3)))
    task = load_task(TextConfig(name="text", train_file=str(tmp_path / "a.jsonl")), seed=0)
    assert task.splits["dev"][0].texts == ("2\u2028and\u0085more",)
    assert task.splits["dev"][0].id.endswith(":3")


def test_a_byte_order_mark_and_an_upper_case_suffix_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "a.JSONL").write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8-sig")
    task = load_task(TextConfig(name="text", train_file=str(tmp_path / "a.JSONL")), seed=0)
    assert task.splits["train"][0].texts == ("a",)
    (tmp_path / "a.TXT").write_text("one two three four five six seven eight nine ten", encoding="utf-8-sig")
    task = load_task(TextConfig(name="text", train_file=str(tmp_path / "a.TXT")), seed=0)
    assert task.splits["train"][0].texts[0].startswith("one")


def test_a_txt_is_one_document_and_its_end_is_held_out(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("".join(f"line {i}\n" for i in range(100)))
    task = load_task(TextConfig(name="text", train_file=str(file)), seed=0)
    (train,), (dev,) = task.splits["train"], task.splits["dev"]
    assert train.texts[0] + dev.texts[0] == file.read_text()
    assert dev.texts[0].startswith("line 9")
    assert 0.08 < len(dev.texts[0]) / len(file.read_text()) < 0.13


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_test_is_the_end_of_a_text_and_dev_what_stands_before(tmp_path: Path, suffix: str) -> None:
    lines, file = [f"line {i}\n" for i in range(100)], tmp_path / f"a.{suffix}"
    file.write_text("".join(lines if suffix == "txt" else (json.dumps({"text": line}) + "\n" for line in lines)))
    task = load_task(TextConfig(name="text", train_file=str(file), test_share=0.2), seed=0)
    parts = ["".join(one.texts[0] for one in task.splits[split]) for split in ("train", "dev", "test")]
    assert "".join(parts) == "".join(lines)
    assert [round(len(part) / len("".join(lines)), 1) for part in parts] == [0.7, 0.1, 0.2]
    task = load_task(TextConfig(name="text", train_file=str(file), test_file=str(file)), seed=0)
    assert "".join(one.texts[0] for one in task.splits["test"]) == "".join(lines)


def test_an_eval_file_leaves_the_training_file_whole(tmp_path: Path) -> None:
    one, other = (write_rows(tmp_path / f"{name}.jsonl", [{"text": name}] * 3) for name in ("one", "other"))
    task = load_task(TextConfig(name="text", train_file=one, eval_file=other), seed=0)
    assert [len(task.splits[split]) for split in ("train", "dev")] == [3, 3]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, '{"text": "b"'], r"a\.jsonl:2: not JSON"),
        ([{"text": "a"}, {"txt": "b"}], r"a\.jsonl:2: task\.text_field 'text' needs to be a text .* got None"),
        ([{"text": "a"}, {"text": 3}], r"a\.jsonl:2: .* got 3"),
        ([{"text": "a"}, ["b"]], r"a\.jsonl:2: .* got None"),
        (['{"text": "\\ud800"}'], r"a\.jsonl:1: .*without lone surrogates"),
        (["1" * 5000], r"a\.jsonl:1: not JSON"),
        ([""], r"task\.train_file .*a\.jsonl is empty"),
        ([{"text": "a"}], r"a\.jsonl:1 is too short to hold a part out: give task\.eval_file"),
    ],
    ids=["not JSON", "no field", "no text", "no object", "surrogate", "long number", "empty", "too short"],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[object], message: str) -> None:
    file = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=message):
        load_task(TextConfig(name="text", train_file=file), seed=0)


def test_missing_and_undecodable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task\.train_file .*none\.txt': No such file"):
        load_task(TextConfig(name="text", train_file=str(tmp_path / "none.txt")), seed=0)
    with pytest.raises(DataError, match=r"task\.train_file 'a\\x00b\.txt': embedded null"):
        load_task(TextConfig(name="text", train_file="a\0b.txt"), seed=0)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match=r"task\.train_file .*latin\.txt: byte 0 is not UTF-8"):
        load_task(TextConfig(name="text", train_file=str(tmp_path / "latin.txt")), seed=0)
