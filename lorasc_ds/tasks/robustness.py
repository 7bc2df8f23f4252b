"""ImageNet's robustness sets, and one's own images under corruptions: top-1, only reported (protocols section 6.5)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lorasc_ds.errors import ConfigError, DataError
from lorasc_ds.tasks.base import Classes, Task
from lorasc_ds.tasks.class_masks import IMAGENET_A, IMAGENET_R, WORDNET_IDS
from lorasc_ds.tasks.class_names import folder_names, imagenet_names, in_order, templates_of
from lorasc_ds.tasks.copy_order import order_in, order_on_hub
from lorasc_ds.tasks.hub_images import hub_images
from lorasc_ds.tasks.images import LabelledImages, class_folders, image_folder, joined
from lorasc_ds.tasks.mce import ALEXNET, SEVERITIES, of_corruptions, of_imagenet_c

DATA_DIR = "task.data_dir"
MANIFEST = "manifest.json"  # that launch/corrupt.py writes beside the copies
SUBSETS = {"imagenet_r": IMAGENET_R, "imagenet_a": IMAGENET_A}  # sets with classes of their own
HUB = {  # webdataset copies: an image, and `cls`, the class's place among those of the set
    "imagenet_v2": "clip-benchmark/wds_imagenetv2",
    "imagenet_r": "clip-benchmark/wds_imagenet-r",
    "imagenet_a": "clip-benchmark/wds_imagenet-a",
    "imagenet_sketch": "clip-benchmark/wds_imagenet_sketch",
}
ELSEWHERE = {
    "imagenet_c": "unpack the archives of https://zenodo.org/records/2235448",
    "imagenet_stylized": "make it by https://github.com/rgeirhos/Stylized-ImageNet",
}
SIZES = {  # images of the release
    "imagenet_v2": 10_000,
    "imagenet_c": 50_000 * len(ALEXNET) * len(SEVERITIES),
    "imagenet_r": 30_000,
    "imagenet_a": 7_500,
    "imagenet_sketch": 50_889,
    "imagenet_stylized": 50_000,
}


def robustness(
    name: str,
    *,
    data_dir: str | None,
    revision: str | None,
    class_names: str | None,
    templates: str | tuple[str, ...],
    head: Any,
    **rest: Any,
) -> Task:
    """A public set, from the folders of its release or from the hub.

    Args:
        rest: of `Classes`.

    Raises:
        DataError: folders are missing, or the hub's copy cannot be had.
        ConfigError: there is no such copy, or the classes have no names.
    """
    if data_dir is not None:
        images = of_release(name, Path(data_dir))
    elif name in HUB:
        images = of_hub(name, HUB[name], revision)
    else:
        raise ConfigError(
            f"{DATA_DIR} is null, and the hub has no copy of {name}: {ELSEWHERE[name]}, and give the folder by"
            f" --{name}.data_dir, or its parent by --data_dir"
        )
    subset, notes = SUBSETS.get(name), []
    if subset is not None:
        notes.append(f"{name}: only its {len(subset)} classes can be chosen")
    if len(images) != SIZES[name]:
        notes.append(f"{name}: {len(images)} images, but its release has {SIZES[name]}; not comparable")
    names = imagenet_names(class_names, head, WORDNET_IDS, range(len(WORDNET_IDS)))
    labelled = names if subset is None else [names[index] for index in subset]
    if data_dir is None:
        notes += order_on_hub(HUB[name], revision, labelled)
    else:
        notes += order_in(Path(data_dir), labelled)
    return Task(
        name=name,
        kind="classes",
        loss="classification",
        splits={"test": images},
        headline="accuracy",
        notes=tuple(notes),
        classes=Classes(names, templates_of(templates), subset, head, **rest),
        combine=of_imagenet_c if name == "imagenet_c" else None,
    )


def corrupted_images(
    *, data_dir: str, class_names: str | None, templates: str | tuple[str, ...], head: Any, **rest: Any
) -> Task:
    """One's own images in folders `corruption/severity/class`, any of the corruptions and severities.

    Args:
        rest: of `Classes`.

    Raises:
        DataError: a severity is no number, or lacks a class that another has.
        ConfigError: `class_names` does not fit the folders.
    """
    root = Path(data_dir)
    parts = {}
    for corruption in class_folders(root, DATA_DIR):
        for severity in class_folders(root / corruption, DATA_DIR):
            if not severity.isdecimal():
                raise DataError(
                    f"{DATA_DIR} {data_dir!r}: {corruption}/{severity} is no severity, which is a number such as 1:"
                    " give a folder of folders corruption/severity/class"
                )
            parts[f"{corruption}/{severity}"] = root / corruption / severity
    folders = in_order({folder for path in parts.values() for folder in class_folders(path, DATA_DIR)})
    images = under_corruptions(parts, {folder: at for at, folder in enumerate(folders)})
    names = folder_names(class_names, folders)
    sizes = {len(part.labels) for part in images.parts}
    uneven = f"corrupted_images: {min(sizes)} to {max(sizes)} images under a corruption at a severity"
    notes = [*([uneven] if len(sizes) > 1 else []), *making_of(root)]
    return Task(
        name="corrupted_images",
        kind="classes",
        loss="classification",
        splits={"test": images},
        headline="accuracy",
        notes=tuple(notes),
        classes=Classes(names, templates_of(templates), None, head, **rest),
        combine=of_corruptions,
    )


def making_of(root: Path) -> Iterator[str]:
    """What launch/corrupt.py wrote of the copies: that some are missing, and what keeps scores from being compared."""
    if not (root / MANIFEST).is_file():
        return
    try:
        found = json.loads((root / MANIFEST).read_bytes())
        complete, differences = found["complete"], list(found["not_comparable"])
    except (OSError, ValueError, KeyError, TypeError):
        yield f"corrupted_images: {MANIFEST} is not of launch/corrupt.py: it is not known how the copies were made"
        return
    if not complete:
        yield "corrupted_images: launch/corrupt.py did not finish, so that copies are missing; the same command goes on"
    yield from (f"corrupted_images: not comparable with ImageNet-C: {line}" for line in differences)


def of_release(name: str, folder: Path) -> LabelledImages:
    """The images in the folders of a release, or in `val` there."""
    root = folder / "val" if (folder / "val").is_dir() else folder
    if name == "imagenet_c":
        return under_corruptions(imagenet_c_parts(root), labels_of(name, ()))
    there = class_folders(root, DATA_DIR)
    labels = labels_of(name, there)
    check_whole(root, there, labels)
    return image_folder(root, DATA_DIR, labels=labels)


def labels_of(name: str, folders: Iterable[str]) -> dict[str, int]:
    """The label of every class folder of a set.

    ImageNet-V2's are called by their number, `0` to `999`, or `0000` to `0999` in other copies: sorted as strings the
    former are in another order. All others are called by WordNet id.

    Args:
        folders: that are there.
    """
    if name == "imagenet_v2":
        spelling = "{:04}" if "0000" in folders else "{}"
        return {spelling.format(index): index for index in range(len(WORDNET_IDS))}
    chosen = SUBSETS.get(name, range(len(WORDNET_IDS)))
    return {WORDNET_IDS[index]: at for at, index in enumerate(chosen)}


def check_whole(root: Path, there: Iterable[str], labels: Mapping[str, int]) -> None:
    """
    Raises:
        DataError: a class has no folder.
    """
    missing = [folder for folder in labels if folder not in {*there}]
    if missing:
        raise DataError(
            f"{DATA_DIR} {str(root)!r} lacks {len(missing)} of {len(labels)} class folders ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}): give the whole set; for a quick look at it there is --limit"
        )


def imagenet_c_parts(root: Path) -> dict[str, Path]:
    """Where every `corruption/severity` lies: in `root`, or one folder deeper, as the archives may have been unpacked.

    Raises:
        DataError: one is missing.
    """
    first, deeper = sorted(root.glob("*/")), sorted(root.glob("*/*/"))
    places = {path.name: path for path in (*reversed(deeper), *reversed(first)) if path.name in ALEXNET}
    absent = [corruption for corruption in ALEXNET if corruption not in places]
    parts = {f"{c}/{s}": places[c] / str(s) for c in ALEXNET if c in places for s in SEVERITIES}
    absent += [group for group, path in parts.items() if not path.is_dir()]
    if absent:
        raise DataError(
            f"{DATA_DIR} {str(root)!r} lacks {', '.join(absent)}: ImageNet-C is {len(ALEXNET)} corruptions at"
            " severities 1 to 5, folders corruption/severity/class; task corrupted_images scores a part of them"
        )
    return parts


def under_corruptions(parts: Mapping[str, Path], labels: Mapping[str, int]) -> LabelledImages:
    """The images of every part, whose name is their group.

    Raises:
        DataError: a class has no folder in a part.
    """
    for path in parts.values():
        check_whole(path, class_folders(path, DATA_DIR), labels)
    return joined([image_folder(path, DATA_DIR, labels=labels, group=group) for group, path in parts.items()])


def of_hub(name: str, dataset: str, revision: str | None) -> LabelledImages:
    """The images of a webdataset copy, whose column of images is named by their format.

    Raises:
        DataError: it cannot be had, or has other columns or classes.
    """
    images, _ = hub_images(dataset, "test", revision, None, "cls")
    count = len(labels_of(name, ()))
    if int(images.labels.max()) >= count:
        raise DataError(
            f"{dataset}/test has class {int(images.labels.max())}, but {name} has {count} classes: set task.revision to"
            " a copy with its own"
        )
    return images
