"""Tasks imagenet and images: their splits, the names of the classes and the prompts."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

from lorasc_ds.errors import ConfigError, DataError
from lorasc_ds.image_task_config import CorruptedImagesConfig, ImageNetConfig, ImagesConfig
from lorasc_ds.tasks import Task, load_task
from lorasc_ds.tasks import class_names as class_names_module
from lorasc_ds.tasks.class_names import check_words, installed_names
from lorasc_ds.tasks.images import LabelledImages
from lorasc_ds.tasks.templates import OPENAI, SIMPLE

WNIDS = ("n01440764", "n01443537", "n01484850")


def write(root: Path, split: str, classes: tuple[str, ...], count: int) -> None:
    for name in classes:
        for number in range(count):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            (root / split / name / f"{number}.jpg").touch()


@pytest.fixture(autouse=True)
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_names_module, "find_spec", lambda name: None)


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    write(tmp_path, "train", WNIDS, 10)
    write(tmp_path, "val", WNIDS[1:], 2)
    return tmp_path


def load(config: Any, *splits: str) -> Task:
    return load_task(config, 0, splits or ("train", "dev", "test"))


def ids(task: Task, split: str) -> list[str]:
    return [example.id for example in task.splits[split]]


def settings(root: Path, **others: Any) -> ImageNetConfig:
    return ImageNetConfig(name="imagenet", data_dir=str(root), **{"head": "classifier", **others})


def own(**others: Any) -> ImagesConfig:
    return ImagesConfig(name="images", **others)


def test_imagenet_holds_out_of_its_training_images(imagenet: Path) -> None:
    task = load(settings(imagenet, dev_examples=7))
    assert (task.kind, task.loss, task.headline, list(task.splits)) == ("classes", "classification", "accuracy", ["train", "dev", "test"])  # fmt: skip
    everything = [f"train/{wnid}/{number}.jpg" for wnid in WNIDS for number in range(10)]
    assert sorted(ids(task, "train") + ids(task, "dev")) == everything
    assert len(ids(task, "dev")) == 7
    assert ids(task, "train") == sorted(ids(task, "train"))
    assert ids(task, "dev") != sorted(ids(task, "dev"))  # the first ones are a sample of all classes
    assert ids(task, "test") == [f"val/{wnid}/{number}.jpg" for wnid in WNIDS[1:] for number in range(2)]
    test = task.splits["test"]
    assert isinstance(test, LabelledImages)
    assert test.labels.tolist() == [1, 1, 2, 2]  # as in train, of which val lacks a class
    assert task.classes is not None
    assert task.classes.names == WNIDS
    assert (task.classes.subset, task.classes.crop_scale) == (None, (0.9, 1.0))

    again, other = load(settings(imagenet, dev_examples=7)), load(settings(imagenet, dev_examples=7, sample_seed=1))
    assert ids(again, "dev") == ids(task, "dev") != ids(other, "dev")
    assert len(ids(load(settings(imagenet)), "dev")) == 3  # a tenth


def test_only_the_splits_that_are_wanted_are_read(imagenet: Path) -> None:
    whole = load(settings(imagenet, dev_examples=7))
    train = load(settings(imagenet, dev_examples=7), "train")
    assert list(train.splits) == ["train"]
    assert ids(train, "train") == ids(whole, "train")  # without those held out
    assert ids(load(settings(imagenet, dev_examples=7), "dev"), "dev") == ids(whole, "dev")
    (imagenet / "train").rename(imagenet / "elsewhere")
    task = load(settings(imagenet), "test")
    assert ids(task, "test") == ids(whole, "test")
    with pytest.raises(DataError, match=r"task.data_dir '.*/train' is not a folder"):
        load(settings(imagenet))


def test_too_many_held_out(imagenet: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"task.dev_examples is 30, but there are only 30 training images: set it low"
    ):
        load(settings(imagenet, dev_examples=30))


@pytest.mark.parametrize(
    ("folders", "dev", "test"),
    [(("test",), None, "test"), (("val",), None, "val"), (("val", "test"), "val", "test"), (("dev", "val"), "dev", "val"), (("dev", "val", "test"), "dev", "test")],
)  # fmt: skip
def test_folders_of_ones_own(tmp_path: Path, folders: tuple[str, ...], dev: str | None, test: str) -> None:
    for split in ("train", *folders):
        write(tmp_path, split, ("golden_retriever", "cat"), 6)
    task = load(own(data_dir=str(tmp_path)))
    assert {one.split("/")[0] for one in ids(task, "test")} == {test}
    assert {one.split("/")[0] for one in ids(task, "dev")} == {dev or "train"}
    assert len(ids(task, "train")) == (12 if dev else 11)
    assert len(ids(task, "dev")) == (12 if dev else 1)
    assert ids(load(own(data_dir=str(tmp_path)), "train"), "train") == ids(task, "train")
    assert task.classes is not None
    assert task.classes.names == ("cat", "golden retriever")
    assert task.classes.templates == OPENAI


def test_a_test_class_that_is_not_trained_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "train", ("cat", "dog"), 3)
    write(tmp_path, "test", ("cat", "dogs"), 3)
    with pytest.raises(DataError, match="holds folder 'dogs', which is none of the 2 classes"):
        load(own(data_dir=str(tmp_path)))


def test_images_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    feature = datasets.ClassLabel(names=["night_cat", "dog"])
    cell = {"bytes": b"?", "path": None}
    asked = []

    def load_dataset(dataset: str, config: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((dataset, config, split, revision))
        columns = {"image": [cell] * 20, "label": [n % 2 for n in range(20)]}
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        return datasets.Dataset.from_dict(columns, features=features)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    task = load(own(dataset="me/pets", test_split="validation", revision="v1"))
    assert asked == [("me/pets", None, "train", "v1"), ("me/pets", None, "validation", "v1")]
    assert {split: len(examples) for split, examples in task.splits.items()} == {"train": 18, "dev": 2, "test": 20}
    assert ids(task, "test")[0] == "me/pets/validation:1"
    assert task.classes is not None
    assert task.classes.names == ("night cat", "dog")
    task = load(ImageNetConfig(name="imagenet", head="classifier"), "test")
    assert asked[2:] == [("ILSVRC/imagenet-1k", None, "validation", None)]
    assert task.classes is not None
    assert task.classes.names == ("night_cat", "dog")

    feature = datasets.Value("int32")
    load(own(dataset="me/pets"))

    def select(dataset: str, config: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
        rows = load_dataset(dataset, config, split=split, revision=revision)
        return rows.select(range(0, 20, 2)) if split == "train" else rows

    def reversed_names(dataset: str, config: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
        rows = load_dataset(dataset, config, split=split, revision=revision)
        names = ["dog", "cat"] if split == "train" else ["cat", "dog"]
        return rows.cast_column("label", datasets.ClassLabel(names=names))

    monkeypatch.setattr("datasets.load_dataset", reversed_names)
    with pytest.raises(DataError, match="me/pets/test has 2 classes that are not the 2 of me/pets/train"):
        load(own(dataset="me/pets"))
    monkeypatch.setattr("datasets.load_dataset", select)
    with pytest.raises(DataError, match="me/pets/test has 2 classes that are not the 1 of me/pets/train"):
        load(own(dataset="me/pets"))


def test_names_from_a_file(imagenet: Path) -> None:
    file = imagenet / "names.txt"
    file.write_bytes(b"\xef\xbb\xbftench\r\ngoldfish\r\ngreat white shark\r\n\r\n")
    task = load(settings(imagenet, class_names=str(file), head="auto"))
    assert task.classes is not None
    assert task.classes.names == ("tench", "goldfish", "great white shark")
    assert task.classes.head == "auto"
    file.write_text("tench\ngoldfish")
    with pytest.raises(ConfigError, match=r"task.class_names .*names.txt names 2 classes, but there are 3: give"):
        load(settings(imagenet, class_names=str(file)))
    file.write_text("tench\n\ngoldfish\n")
    with pytest.raises(ConfigError, match=r"task.class_names .*names.txt:2 is blank"):
        load(settings(imagenet, class_names=str(file)))
    with pytest.raises(DataError, match=r"task.class_names '.*absent'"):
        load(settings(imagenet, class_names=str(imagenet / "absent")))


def install(root: Path, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An open_clip that cannot be imported, for want of torchvision."""
    import importlib.util

    (root / "open_clip").mkdir(parents=True)
    (root / "open_clip" / "__init__.py").write_text("import torchvision_that_is_not_there")
    (root / "open_clip" / "zero_shot_metadata.py").write_text(f"IMAGENET_CLASSNAMES = {names!r}\n")
    monkeypatch.syspath_prepend(root)
    monkeypatch.setattr(class_names_module, "find_spec", importlib.util.find_spec)


NAMES = [f"thing {number}" for number in range(1000)]  # what stands for ImageNet's


def names_of(task: Task) -> tuple[str, ...]:
    assert task.classes is not None
    return task.classes.names


def test_imagenets_names_are_of_the_extra(imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=re.escape("task.class_names is null and the extra [vision] that brings them is not installed: set task.class_names FILE, or pip install -e '.[vision]'")):  # fmt: skip
        load(settings(imagenet, head="auto"))
    install(tmp_path / "site", NAMES, monkeypatch)
    assert names_of(load(settings(imagenet, head="auto"))) == ("thing 0", "thing 1", "thing 2")
    for split in ("train", "val"):
        (imagenet / split / WNIDS[1]).rename(imagenet / split / "n15075141")  # the last of the thousand
    assert names_of(load(settings(imagenet, head="auto"))) == ("thing 0", "thing 2", "thing 999")
    write(imagenet, "train", ("n09999999",), 1)
    with pytest.raises(ConfigError, match=r"the classes \('n01440764', \.\.\.\) are called neither by WordNet id"):
        load(settings(imagenet, head="auto"))
    assert names_of(load(settings(imagenet)))[1] == WNIDS[2]  # a mere classifier reads none


def test_numbered_folders_are_classes_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted as strings, folder `10` would be class 2 and have its name."""
    install(tmp_path / "site", NAMES, monkeypatch)
    numbers = tuple(map(str, range(1000)))
    write(tmp_path, "val", numbers, 1)
    task = load(settings(tmp_path, head="auto"), "test")
    assert names_of(task) == tuple(NAMES)
    for example in task.splits["test"]:
        assert example.gold == (int(Path(example.id).parent.name),)
    write(tmp_path / "own", "train", ("2", "10"), 2)
    write(tmp_path / "own", "test", ("2", "10"), 1)
    task = load(own(data_dir=str(tmp_path / "own")))
    assert names_of(task) == ("2", "10")
    assert [(example.id, example.gold) for example in task.splits["test"]] == [("test/10/0.jpg", (1,)), ("test/2/0.jpg", (0,))]  # fmt: skip


def test_wordnet_ids_are_no_words(imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts said `a bad photo of a n01440764.`."""
    ids = names_of(load(own(data_dir=str(imagenet))))
    assert ids == WNIDS
    with pytest.raises(ConfigError, match=r"^task.class_names: 3 of 3 classes are called by WordNet id \(n01440764\)"):
        check_words(ids)
    check_words(("tench", "n2", "n014407645"))
    install(tmp_path / "site", NAMES, monkeypatch)
    write(imagenet, "copies/fog/1", WNIDS[1:], 1)
    assert names_of(load(own(data_dir=str(imagenet)))) == ("thing 0", "thing 1", "thing 2")
    copies = CorruptedImagesConfig(name="corrupted_images", data_dir=str(imagenet / "copies"))
    assert names_of(load(copies, "test")) == ("thing 1", "thing 2")


def test_a_list_of_classes_beside_the_folders_is_compared(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path, split, ("crane", "night_cat", "dog", "emu"), 3)
    file = tmp_path / "classnames.txt"
    expected = {
        "Crane\ndog\nemu\nnight cat\n": (),
        "crane\nhound\nemu\nnight cat": (f"{file} has other names for 1 of 4 classes: line 2 is 'hound', but that class is 'dog' here",),
        "Kranich\nHund\nEmu\nKatze": (f"{file} has other names for 3 of 4 classes: line 1 is 'kranich', but that class is 'crane' here",),
    }  # fmt: skip
    for lines, notes in expected.items():
        file.write_text(lines)
        assert load(own(data_dir=str(tmp_path))).notes == notes
    file.write_text("emu\ncrane\nnight cat\ndog\n")
    with pytest.raises(
        DataError, match=r"txt has 4 of 4 classes in another order \(line 1 is 'emu', but that class is"
    ):
        load(own(data_dir=str(tmp_path)))
    file.write_text("crane\ndog\n")
    with pytest.raises(DataError, match=r"classnames.txt names 2 classes, but there are 4: give"):
        load(own(data_dir=str(tmp_path)))


def test_the_names_that_open_clip_has() -> None:
    import importlib.util

    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("the extra [vision] is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_names_module, "find_spec", importlib.util.find_spec)
        names = installed_names()
    assert names is not None
    assert (len(names), names[0], names[-1]) == (1000, "tench", "toilet paper")


def test_the_templates_are_those_of_the_protocols(shared_data: Path) -> None:
    text = (shared_data.parent / "protocols.md").read_text()
    listed = re.search(r"## Appendix C.*?```\n(.*?)\n```", text, re.DOTALL)
    assert listed is not None
    assert tuple(listed[1].replace("{c}", "{}").split("|")) == OPENAI


def test_the_templates_are_eighty() -> None:
    digest = hashlib.sha256("\n".join(OPENAI).encode()).hexdigest()
    assert (len(OPENAI), digest) == (80, "4f976686fb651bb5803d4689dcd849f75efe0ef19a3c801355bc9a6f03c8a5af")
    assert SIMPLE[0] in OPENAI


def test_templates_of_ones_own(imagenet: Path) -> None:
    for given, expected in {"simple": SIMPLE, ("a {}", "the {}"): ("a {}", "the {}")}.items():
        task = load(settings(imagenet, templates=given))
        assert task.classes is not None
        assert task.classes.templates == expected
    with pytest.raises(ConfigError, match=r"task.templates has 'a photo': \{\} is needed once"):
        load(settings(imagenet, templates=("a {}", "a photo")))
