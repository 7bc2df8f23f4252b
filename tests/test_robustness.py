"""The robustness sets as they come out of their archives, and what an evaluation makes of its flags for them."""

from __future__ import annotations

import importlib
import io
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from lorasc_ds.errors import ConfigError, DataError
from lorasc_ds.evaluate_options import folder_of, parse
from lorasc_ds.image_task_config import CorruptedImagesConfig, RobustnessConfig
from lorasc_ds.tasks import Task, load_task
from lorasc_ds.tasks.class_masks import IMAGENET_A, IMAGENET_R, WORDNET_IDS
from lorasc_ds.tasks.limits import limited
from lorasc_ds.tasks.mce import ALEXNET

module = importlib.import_module("lorasc_ds.tasks.robustness")  # the package has a function of this name
OF_R = [WORDNET_IDS[index] for index in IMAGENET_R]


def encoded(red: int, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), (red, 0, 0)).save(stream, form)
    return stream.getvalue()


PIXEL = encoded(0)


def filled(root: Path, folders: Iterable[str], *files: str) -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for file in files or ("0.png",):
            (root / folder / file).write_bytes(PIXEL)
    return root


def load(name: str, root: Path | None, **settings: Any) -> Task:
    values = {"head": "classifier", "data_dir": None if root is None else str(root)} | settings
    one = CorruptedImagesConfig if name == "corrupted_images" else RobustnessConfig
    return load_task(one(name=name, **values), 0)


def labels_by_folder(task: Task) -> dict[str, int]:
    """What every example says by itself: its folder, and its class."""
    assert list(task.splits) == ["test"]
    return {Path(example.images[0].name).parent.name: example.gold[0] for example in task.splits["test"]}


@pytest.mark.parametrize("spelling", ["{}", "{:04}"])
def test_the_folders_of_v2_are_numbers(tmp_path: Path, spelling: str) -> None:
    """Sorted as strings, `10` would be class 2."""
    numbers = {spelling.format(number): number for number in range(1000)}
    task = load("imagenet_v2", filled(tmp_path / "v2", numbers))
    assert labels_by_folder(task) == numbers
    assert (task.kind, task.loss, task.headline, task.combine) == ("classes", "classification", "accuracy", None)
    assert task.classes is not None
    assert task.classes.subset is None
    assert len(task.classes.names) == 1000
    assert task.notes == ("imagenet_v2: 1000 images, but its release has 10000; not comparable",)


@pytest.mark.parametrize(("name", "mask"), [("imagenet_r", IMAGENET_R), ("imagenet_a", IMAGENET_A)])
def test_the_classes_of_a_subset(tmp_path: Path, name: str, mask: tuple[int, ...]) -> None:
    """A label is a place in the mask: the column of the masked logits that stands for the folder's own class."""
    ids = [WORDNET_IDS[index] for index in mask]
    task = load(name, filled(tmp_path, ids, "a.jpg", "b.JPEG"))
    assert labels_by_folder(task) == {folder: at for at, folder in enumerate(ids)}
    assert len(task.splits["test"]) == 400
    assert task.classes is not None
    assert task.classes.subset == mask
    for example in task.splits["test"]:
        assert WORDNET_IDS[task.classes.subset[example.gold[0]]] == Path(example.images[0].name).parent.name
    assert task.notes[0] == f"{name}: only its 200 classes can be chosen"


def test_sets_of_all_classes(tmp_path: Path) -> None:
    """Stylized-ImageNet is made with `train` and `val`; a file of names goes by the order of the outputs."""
    names = tmp_path / "names.txt"
    names.write_text("".join(f"thing {number}\n" for number in range(1000)))
    filled(tmp_path / "stylized" / "val", WORDNET_IDS)
    filled(tmp_path / "stylized" / "train", WORDNET_IDS[:1], "0.png", "1.png")
    for name, root in (
        ("imagenet_stylized", tmp_path / "stylized"),
        ("imagenet_sketch", tmp_path / "stylized" / "val"),
    ):
        task = load(name, root, head="auto", class_names=str(names), templates="simple")
        assert labels_by_folder(task) == {folder: at for at, folder in enumerate(WORDNET_IDS)}
        assert task.classes is not None
        assert (task.classes.names[281], task.classes.templates) == ("thing 281", ("a photo of a {}.",))
        assert (task.classes.head, task.classes.crop_scale) == ("auto", None)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """ImageNet-C of three classes."""
    monkeypatch.setattr(module, "WORDNET_IDS", WORDNET_IDS[:3])
    monkeypatch.setitem(module.SIZES, "imagenet_c", 15 * 5 * 3 * 2)
    return WORDNET_IDS[:3]


def corrupted(root: Path, corruptions: Iterable[str], severities: Iterable[Any], folders: Iterable[str]) -> Path:
    groups = [f"{corruption}/{severity}" for corruption in corruptions for severity in severities]
    return filled(root, [f"{group}/{folder}" for group in groups for folder in folders], "0.png", "1.png")


@pytest.mark.parametrize("unpacked", ["flat", "by archive"])
def test_imagenet_c(tmp_path: Path, few: tuple[str, ...], unpacked: str) -> None:
    """Unpacked side by side or in a folder for every archive; the corruptions that are not of the 15 are left out."""
    for name in (*ALEXNET, "speckle_noise"):
        archive = f"archive{len(name) % 4}" if unpacked == "by archive" else "."
        corrupted(tmp_path / archive, [name], range(1, 6), few)
    task = load("imagenet_c", tmp_path)
    groups = Counter(example.group for example in task.splits["test"])
    assert groups == {f"{corruption}/{severity}": 6 for corruption in ALEXNET for severity in range(1, 6)}
    assert labels_by_folder(task) == {folder: at for at, folder in enumerate(few)}
    assert task.splits["test"][7].id == f"gaussian_noise/2/{few[0]}/1.png"
    assert task.notes == ()
    assert task.combine is not None
    assert task.combine(dict.fromkeys(groups, 1.0))["mce"] == 0
    part = limited(task.splits["test"], 1)
    assert Counter((example.group, example.gold) for example in part) == {
        (group, (label,)): 1 for group in groups for label in range(3)
    }
    assert all(example.id.endswith("/0.png") for example in part)
    assert limited(task.splits["test"], None) is task.splits["test"]


def test_own_images_under_some_corruptions(tmp_path: Path) -> None:
    corrupted(tmp_path, ["fog", "rain"], [1, 10], ["big_cat", "dog"])
    (tmp_path / "fog" / "1" / "dog" / "1.png").unlink()
    (tmp_path / "corrupt.json").write_text("{}")
    task = load("corrupted_images", tmp_path)
    assert labels_by_folder(task) == {"big_cat": 0, "dog": 1}
    assert Counter(e.group for e in task.splits["test"]) == {"fog/1": 3, "fog/10": 4, "rain/1": 4, "rain/10": 4}
    assert task.classes is not None
    assert task.classes.names == ("big cat", "dog")
    assert task.notes == ("corrupted_images: 3 to 4 images under a corruption at a severity",)
    for unknown in ("[1]", "{", '{"complete": true}'):
        (tmp_path / "manifest.json").write_text(unknown)
        assert "manifest.json is not of launch/corrupt.py" in load("corrupted_images", tmp_path).notes[-1]
    assert task.combine is not None
    assert task.combine({"fog/1": 1.0, "fog/10": 0.0, "rain/1": 1.0})["accuracy"] == 0.75


def test_own_copy_of_imagenet_has_its_names(tmp_path: Path, few: tuple[str, ...]) -> None:
    names = tmp_path / "names.txt"
    names.write_text("tench\ngoldfish\nshark\n")
    task = load("corrupted_images", corrupted(tmp_path / "c", ["fog"], [1], few), class_names=str(names))
    assert task.classes is not None
    assert task.classes.names == ("tench", "goldfish", "shark")


REFUSED: dict[str, tuple[str, list[str], str]] = {
    "a class of R is missing": ("imagenet_r", OF_R[1:], f"lacks 1 of 200 class folders ({OF_R[0]}): give the whole set"),
    "half of R": ("imagenet_r", OF_R[:100], f"lacks 100 of 200 class folders ({', '.join(OF_R[100:103])}, ...)"),
    "a class too many": ("imagenet_r", ["n01440764", *OF_R], "holds folder 'n01440764', which is none of the 200 classes"),
    "not WordNet ids": ("imagenet_sketch", ["cat", "dog"], "lacks 1000 of 1000 class folders (n01440764, "),
    "V2 by WordNet id": ("imagenet_v2", ["n01440764"], "lacks 1000 of 1000 class folders (0, 1, 2, ...)"),
    "no C": ("imagenet_c", ["fog/1/n01440764"], "lacks gaussian_noise, shot_noise, impulse_noise, defocus_blur,"),
    "no severity": ("corrupted_images", ["fog/hard/cat"], "fog/hard is no severity, which is a number such as 1"),
    "a class at one severity alone": ("corrupted_images", ["fog/1/cat", "fog/1/dog", "fog/2/cat"], "/fog/2' lacks 1 of 2 class folders (dog)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_parts_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    name, folders, reason = REFUSED[case]
    filled(tmp_path, folders)
    with pytest.raises(DataError, match=r"task\.data_dir") as caught:
        load(name, tmp_path)
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_severities_of_imagenet_c_are_named(tmp_path: Path, few: tuple[str, ...]) -> None:
    corrupted(tmp_path, [name for name in ALEXNET if name != "snow"], range(1, 6), few)
    for severity in (4, 5):
        (tmp_path / "fog" / str(severity)).rename(tmp_path / f"kept{severity}")
    with pytest.raises(DataError, match=r"lacks snow, fog/4, fog/5: ImageNet-C is 15 corruptions at severities 1 to 5"):
        load("imagenet_c", tmp_path)


@pytest.mark.parametrize(
    ("name", "source"),
    [("imagenet_c", "zenodo.org/records/2235448"), ("imagenet_stylized", "rgeirhos/Stylized-ImageNet")],
)
def test_what_the_hub_does_not_have(name: str, source: str) -> None:
    with pytest.raises(ConfigError, match=f"task.data_dir is null, and the hub has no copy of {name}: .*{source}"):
        load(name, None)


def test_names_are_needed_for_a_head_of_text(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    filled(tmp_path / "r", OF_R)
    with pytest.raises(ConfigError, match=r"names.txt names 2 classes, but there are 1000"):
        load("imagenet_r", tmp_path / "r", head="auto", class_names=str(names))


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands in the hub's place: a webdataset archive, which the real builder reads."""
    path, real = tmp_path / "0.tar", datasets.load_dataset

    def load_dataset(dataset: str, config: None, *, split: str, revision: str | None) -> Any:
        assert (dataset.split("_")[0], config, split, revision) == ("clip-benchmark/wds", None, "test", None)
        cache = str(tmp_path / "cache")
        return real("webdataset", data_files={"test": [str(path)]}, split="test", cache_dir=cache)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return path


def packed(path: Path, form: str, labels: Iterable[int]) -> None:
    with tarfile.open(path, "w") as tar:
        for row, label in enumerate(labels):
            for ending, content in ((form, encoded(row, form)), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"s{row:07}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("form", ["webp", "png"])
def test_a_webdataset_copy(archive: Path, form: str) -> None:
    packed(archive, form, [0, 199, 7])
    task = load("imagenet_a", None)
    assert [example.gold for example in task.splits["test"]] == [(0,), (199,), (7,)]
    assert [example.images[0].read() for example in task.splits["test"]] == [encoded(row, form) for row in range(3)]
    assert task.classes is not None
    assert task.classes.subset == IMAGENET_A


def test_the_order_of_a_copy_is_confirmed(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed(archive, "png", [0, 199])
    names, told = tmp_path / "names.txt", tmp_path / "classnames.txt"
    names.write_text("".join(f"thing {number}\n" for number in range(1000)))
    task = load("imagenet_a", None, class_names=str(names))
    assert task.notes[-1] == (
        "clip-benchmark/wds_imagenet-a: no classnames.txt to be had, so that the order of its classes is taken on trust"
    )
    asked = []

    def download(dataset: str, file: str, *, repo_type: str, revision: str | None) -> str:
        asked.append((dataset, file, repo_type, revision))
        return str(told)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    ordered = [f"thing {index}\n" for index in IMAGENET_A]
    told.write_text("".join(ordered))
    assert load("imagenet_a", None, class_names=str(names)).notes == task.notes[:-1]
    assert asked == [("clip-benchmark/wds_imagenet-a", "classnames.txt", "dataset", None)]
    told.write_text("".join(sorted(ordered)))
    with pytest.raises(DataError, match=r"of 200 classes in another order \(line 1 is 'thing 105', but that class is"):
        load("imagenet_a", None, class_names=str(names))
    assert load("imagenet_a", None).notes[-1] == f"{told} was not compared: the classes have no names here"


def test_a_copy_with_other_classes(archive: Path) -> None:
    packed(archive, "webp", [0, 281])
    with pytest.raises(DataError, match="wds_imagenet-r/test has class 281, but imagenet_r has 200 classes"):
        load("imagenet_r", None)


SPELLINGS = {
    "imagenet": "ImageNet",
    "imagenet_v2": "imagenetv2-matched-frequency-format-val",
    "imagenet_c": "sets/ImageNet-C",
    "imagenet_r": "imagenet-r",
    "imagenet_a": "imagenet-a",
    "imagenet_sketch": "sketch",
    "imagenet_stylized": "stylized-imagenet",
}


def test_folders_as_the_archives_call_them(tmp_path: Path) -> None:
    for name in SPELLINGS.values():
        (tmp_path / name).mkdir(parents=True)
    assert {task: folder_of(tmp_path, task) for task in SPELLINGS} == {t: tmp_path / n for t, n in SPELLINGS.items()}
    outer = tmp_path / "outer"
    (outer / "imagenetv2" / SPELLINGS["imagenet_v2"]).mkdir(parents=True)
    (outer / "imagenetv2-top-images-format-val").mkdir()
    assert folder_of(outer, "imagenet_v2") == outer / "imagenetv2" / SPELLINGS["imagenet_v2"]


def names_of(*flags: str, out: Path) -> list[str]:
    return [task.name for task in parse([*flags, f"--output_dir={out}"]).tasks]


def test_robustness_is_what_is_there(tmp_path: Path) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    on_hub = ["imagenet", "imagenet_v2", "imagenet_r", "imagenet_a", "imagenet_sketch"]
    assert names_of("MODEL", "--tasks=robustness", out=out) == on_hub
    given = "--imagenet_stylized.data_dir=elsewhere"
    assert names_of("MODEL", "--tasks=robustness", given, out=out) == [*on_hub, "imagenet_stylized"]
    for name in ("imagenet-c", "imagenet-r"):
        (data / name).mkdir(parents=True)
    flags = ["MODEL", f"--data_dir={data}", "--tasks"]
    assert names_of(*flags, "rte,robustness,imagenet_r", out=out) == ["rte", "imagenet_c", "imagenet_r"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"--tasks robustness: --data_dir .*empty holds no folder like imagenet,"):
        parse(["MODEL", f"--data_dir={tmp_path / 'empty'}", "--tasks=robustness", f"--output_dir={out}"])


def test_settings_are_given_once(tmp_path: Path) -> None:
    flags = [
        "--tasks=rte,imagenet_r,imagenet_a",
        "--class_names=n.txt",
        "--templates=simple",
        "--imagenet_a.templates=openai",
    ]
    rte, r, a = parse(["MODEL", *flags, f"--output_dir={tmp_path / 'out'}"]).tasks
    assert rte.name == "rte"
    assert (r.class_names, r.templates, r.head) == ("n.txt", "simple", "auto")
    assert (a.class_names, a.templates) == ("n.txt", "openai")

    with pytest.raises(ConfigError, match="--templates simple: none of the tasks is on images"):
        parse(["MODEL", "--tasks=rte", "--templates=simple", f"--output_dir={tmp_path / 'out'}"])


def test_a_run_on_images_brings_its_settings(tmp_path: Path) -> None:
    """But not the names of its own classes where ImageNet's are scored."""
    own = "class_names: mine.txt, templates: ['a sketch of {}'], head: prototypes, train_head: true, unreadable: refuse"
    for number, name in enumerate(("imagenet", "images")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"task: {{name: {name}, data_dir: d, {own}}}\n")
        flags = [f"--output_dir={tmp_path / 'out'}", "--corrupted_images.data_dir=c"]
        tasks = parse([str(tmp_path / name), f"--tasks={name},imagenet_v2,corrupted_images", *flags]).tasks
        assert [task.class_names for task in tasks] == ["mine.txt", ("mine.txt", None)[number], "mine.txt"]
        for task in tasks:
            settings = (task.templates, task.head, task.train_head, task.unreadable)
            assert settings == (("a sketch of {}",), "prototypes", True, "refuse")
        assert [task.data_dir for task in tasks] == ["d", None, "c"]
        shared = parse([str(tmp_path / name), "--tasks=imagenet_v2", "--class_names=other.txt", flags[0]]).tasks[0]
        assert shared.class_names == "other.txt"
