"""Class folders and hub splits of images as lazy sequences: order, labels, digests, and what is refused."""

from __future__ import annotations

import io
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorasc_ds.errors import DataError
from lorasc_ds.images import Unreadable, rgb_image
from lorasc_ds.tasks.base import Example
from lorasc_ds.tasks.hub_images import hub_images
from lorasc_ds.tasks.images import FileImage, StoredImage, image_folder, joined, known_of

KEY = "task.data_dir"


def write(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes; strings sort 10 before 9."""
    return write(tmp_path / "data", "9/b.JPG", "9/a.png", "10/x/deep.Tiff", "10/.hidden.jpg", "10/notes.txt", "cat/1.webp", ".git/x.jpg", "top.jpg")  # fmt: skip


def test_every_image_in_the_order_of_strings(folder: Path) -> None:
    found = image_folder(folder, KEY, group="fog/3")
    assert [one.id for one in found] == [f"fog/3/{p}" for p in ("10/x/deep.Tiff", "9/a.png", "9/b.JPG", "cat/1.webp")]
    assert found.labels.tolist() == [0, 1, 1, 2] == [one.gold[0] for one in found]
    (image,) = found[1].images
    assert found[1] == Example("fog/3/9/a.png", "", gold=(1,), group="fog/3", images=(image,))
    assert image == FileImage("fog/3/9/a.png", str(folder / "9" / "a.png"))
    assert image.read() == b"9/a.png"
    assert found[-1].id == "fog/3/cat/1.webp"
    assert [one.id for one in found[1:3]] == [found[1].id, found[2].id]
    with pytest.raises(IndexError):
        found[4]


def test_labels_may_be_given(folder: Path) -> None:
    numbered = {"9": 9, "10": 10, "cat": 77, "absent": 3}
    assert image_folder(folder, KEY, labels=numbered).labels.tolist() == [10, 9, 9, 77]
    with pytest.raises(DataError, match=r"task.data_dir '.*data' holds folder 'cat', which is none of the 2 classes"):
        image_folder(folder, KEY, labels={"9": 0, "10": 1})


def test_parts_and_selections(folder: Path) -> None:
    one, other = image_folder(folder, KEY, group="a"), image_folder(folder, KEY, group="b", named="")
    both = joined([one.only([3, 0]), other.only(np.array([2]))])
    assert [example.id for example in both] == ["a/cat/1.webp", "a/10/x/deep.Tiff", "9/b.JPG"]
    assert both.labels.tolist() == [2, 0, 1]
    assert both.groups == ["a", "a", "b"] == [example.group for example in both]
    assert [example.id for example in both.only([2, 0])] == ["9/b.JPG", "a/cat/1.webp"]
    assert list(pickle.loads(pickle.dumps(both))) == list(both)


def test_the_digest_is_of_paths_labels_and_choice(folder: Path, tmp_path: Path) -> None:
    found = image_folder(folder, KEY)
    moved = tmp_path / "moved"
    digests = [found.sha256, found.only([1, 0, 2, 3]).sha256, found.only([0, 1, 2]).sha256]
    digests += [image_folder(folder, KEY, group="g").sha256]
    digests += [image_folder(folder, KEY, labels={"10": 1, "9": 0, "cat": 2}).sha256]
    folder.rename(moved)
    assert image_folder(moved, KEY).sha256 == found.sha256
    (moved / "9" / "b.JPG").rename(moved / "9" / "c.JPG")
    digests.append(image_folder(moved, KEY).sha256)
    assert len(set(digests)) == 6


def test_little_is_held_of_an_image(tmp_path: Path) -> None:
    write(tmp_path, *(f"n01440764/n01440764_{number:05}.JPEG" for number in range(500)))
    found = image_folder(tmp_path, KEY)
    arrays = [value for part in found.parts for value in (part.paths, part.ends, part.labels)]
    assert sum(map(sys.getsizeof, arrays)) / 500 < 50


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["x.jpg"], "holds no folder: one for every class is needed"),
        (["a/1.jpg", "b/1.txt"], "folder 'b' holds no image"),
        (None, "is not a folder: give one that holds a folder of images for every class"),
    ],
)
def test_what_is_not_a_data_set_is_refused(tmp_path: Path, paths: list[str] | None, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        image_folder(write(tmp_path, *paths) if paths else tmp_path / "absent", KEY)
    assert str(caught.value).startswith(f"{KEY} '{tmp_path}")
    assert "\n" not in str(caught.value)


def test_links_do_not_leave_the_folder(folder: Path, tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", "secret.jpg")
    (folder / "cat" / "same.jpg").symlink_to(folder / "9" / "a.png")
    assert len(image_folder(folder, KEY)) == 5
    link = tmp_path / "link"
    link.symlink_to(folder)  # the folder itself may be reached through one
    assert len(image_folder(link, KEY)) == 5
    for name, target in {"cat/out.jpg": outside / "secret.jpg", "dogs": outside, "9/round": folder}.items():
        (folder / name).symlink_to(target)
        with pytest.raises(DataError, match=f"'{name}' is a link to a folder, or out of this one"):
            image_folder(folder, KEY)
        (folder / name).unlink()


def test_names_are_utf8(folder: Path) -> None:
    write(folder, "cat/größe.jpg")
    found = image_folder(folder, KEY)
    assert [one.id for one in found][-2:] == ["cat/1.webp", "cat/größe.jpg"]
    assert found[-1].images[0].read() == "cat/größe.jpg".encode()
    with open(os.fsencode(folder) + b"/cat/\xff.jpg", "wb"):
        pass
    with pytest.raises(DataError, match=r"'cat/\\udcff.jpg' is not UTF-8; rename it"):
        image_folder(folder, KEY)


def png(grey: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), grey, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set of ten images, one of which is a file, with columns of classes and of whole numbers."""
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "hub").mkdir()
    (tmp_path / "file.png").write_bytes(png(9))
    cells = [{"bytes": png(n), "path": None} for n in range(9)] + [{"bytes": None, "path": str(tmp_path / "file.png")}]
    labels = [n % 2 for n in range(10)]
    columns = {
        "image": cells,
        "label": labels,
        "number": [5 * n for n in labels],
        "text": ["?"] * 10,
        "none": [-1] * 10,
    }
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["night_cat", "dog"])}
    features |= {"number": datasets.Value("int64"), "text": datasets.Value("string"), "none": datasets.Value("int8")}
    whole = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    # not to_parquet, which would put the file's bytes into the table
    import pyarrow.parquet as parquet

    parquet.write_table(whole.data.table, tmp_path / "hub" / "train.parquet")
    return str(tmp_path / "hub")


def test_the_images_of_a_hub_split(hub: str) -> None:
    found, names = hub_images(hub, "train", None, "image", "label")
    assert names == ("night_cat", "dog")
    assert found.labels.tolist() == [0, 1] * 5
    assert [one.images[0].read() for one in found] == [png(n) for n in range(10)]
    assert found[3].id == found[3].images[0].name == f"{hub}/train:4"
    assert found.only([4])[0].images[0].read() == png(4)
    sent = pickle.loads(pickle.dumps(found[3].images[0]))
    assert sent == StoredImage(f"{hub}/train:4", png(3))
    numbers, names = hub_images(hub, "train", None, None, "number")
    assert names == tuple("012345")
    assert numbers.sha256 != found.sha256 == hub_images(hub, "train", None, "image", "label")[0].sha256


def test_a_row_without_an_image_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cell, one without content, a file that is gone, and more bytes than are read: in workers too."""
    import datasets

    absent = str(tmp_path / "absent.png")
    cells = [None, {"bytes": None, "path": None}, {"bytes": None, "path": absent}, {"bytes": png(1), "path": None}]
    cells.append({"bytes": png(2) + bytes(100), "path": None})
    columns = {"image": cells, "label": [0, 1, 0, 1, 0]}
    struct = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"image": struct, "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict(columns, features=features).cast_column("image", datasets.Image())
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: rows)
    monkeypatch.setattr("lorasc_ds.tasks.hub_images.MAX_BYTES", len(png(2)) + 50)
    found, _ = hub_images("me/pets", "train", None, "image", "label")
    reasons = ["the row has no image", "the row has no image", "No such file or directory", None, "File too large"]
    for number, reason in enumerate(reasons, start=1):
        (image,) = found[number - 1].images
        for source in (image, pickle.loads(pickle.dumps(image))):
            if reason is None:
                assert source.read() == png(1)
            else:
                with pytest.raises(Unreadable, match=f"^me/pets/train:{number}: {reason}$"):
                    rgb_image(source)


def test_images_that_two_splits_share(folder: Path, hub: str) -> None:
    """By origin and place, as by names; one by one it would take seconds and 200 MB for ImageNet."""
    train, again = image_folder(folder, KEY, named="train"), image_folder(folder, KEY, named="train")
    other = image_folder(folder, KEY, named="val")
    one, two = (hub_images(hub, "train", None, "image", "label")[0] for _ in range(2))
    both = joined([train.only([1]), one])
    for images, others in [(train, again), (train.only([3, 0]), again.only([0, 1])), (other, train), (one, train), (one.only([1, 2]), two.only([2])), (both, two), (joined([two, train]), both), (train, joined([again.only([0]), again.only([2])]))]:  # fmt: skip
        names = {example.id for example in others}
        expected = sum(example.id in names for example in images)
        assert known_of(images, others) == expected == known_of(list(images), others)


@pytest.mark.parametrize(
    ("split", "image", "label", "message"),
    [
        ("train", "picture", "label", "has no column 'picture' of images; it has image, label, .*task.image_column"),
        ("train", "text", "label", "has no column 'text' of images"),
        ("train", "image", "text", "has no column 'text' of classes .*: set task.label_column to one of them"),
        ("train", "image", "none", ":1 has no class in column 'none'"),
        ("dev", "image", "label", "split dev of .* cannot be had from the hub"),
    ],
)
def test_what_a_hub_split_needs(hub: str, split: str, image: str, label: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        hub_images(hub, split, None, image, label)
    assert "\n" not in str(caught.value)


def test_one_of_several_columns_of_images_is_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    cells = [{"bytes": png(3), "path": None}]
    features = datasets.Features(
        {"photo": datasets.Image(), "depth": datasets.Image(), "label": datasets.Value("int64")}
    )
    rows = datasets.Dataset.from_dict({"photo": cells, "depth": cells, "label": [0]}, features=features)
    for given, message in (
        (rows, "data/train has not one column of images; it has photo, depth, label: set task.image_column to one"),
        (rows.select_columns("label"), "data/train has not one column of images; it has label: set task.image_column"),
    ):
        monkeypatch.setattr("lorasc_ds.tasks.hub_images.hub_split", lambda *_, given=given: given)
        with pytest.raises(DataError, match=message):
            hub_images("data", "train", None, None, "label")
    monkeypatch.setattr("lorasc_ds.tasks.hub_images.hub_split", lambda *_: rows)
    found, _ = hub_images("data", "train", None, "depth", "label")
    assert found[0].images[0].read() == png(3)
