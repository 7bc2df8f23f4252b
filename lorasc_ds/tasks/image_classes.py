"""Tasks `imagenet` and `images`: which class an image shows (protocols section 6)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorasc_ds.errors import ConfigError, DataError
from lorasc_ds.tasks.base import Classes, Task
from lorasc_ds.tasks.class_masks import WORDNET_IDS
from lorasc_ds.tasks.class_names import folder_names, imagenet_indices, imagenet_names, in_order, templates_of
from lorasc_ds.tasks.copy_order import order_in
from lorasc_ds.tasks.hub_images import hub_images
from lorasc_ds.tasks.images import LabelledImages, class_folders, image_folder

DATA_DIR = "task.data_dir"
IMAGENET = "ILSVRC/imagenet-1k"
HELD_OUT = 10_000  # images that are held out for selection; at most a tenth

Source = tuple[dict[str, LabelledImages], tuple[str, ...]]  # splits that lie there, names of the classes


def imagenet(
    splits: Collection[str],
    *,
    data_dir: str | None,
    revision: str | None,
    class_names: str | None,
    dev_examples: int | None,
    sample_seed: int,
    **settings: Any,
) -> Task:
    """ImageNet-1K from folders `train` and `val`, or from the hub; `val` is what is only reported.

    Args:
        splits: of train, dev and test, what is wanted.
        settings: of `Classes`.
    """
    if data_dir is not None:
        places = {"train": "train", "test": "val"}
        found, folders = in_folders(Path(data_dir), places, splits)
        indices = imagenet_indices(folders)
    else:
        places = {"train": "train", "test": "validation"}
        found, folders = on_hub(IMAGENET, revision, places, splits)
        indices = range(len(folders)) if len(folders) == len(WORDNET_IDS) else None
    names = imagenet_names(class_names, settings["head"], folders, indices)
    chosen = divided(found, "dev" in places, splits, dev_examples, sample_seed)
    return task("imagenet", chosen, names, data_dir, **settings)


def images(
    splits: Collection[str],
    *,
    data_dir: str | None,
    dataset: str | None,
    revision: str | None,
    image_column: str | None,
    label_column: str,
    train_split: str,
    test_split: str,
    class_names: str | None,
    dev_examples: int | None,
    sample_seed: int,
    **settings: Any,
) -> Task:
    """Images of one's own: folders `train`, `test` and perhaps `dev`, or a data set on the hub.

    `val` is another name of `dev` where there is `test`, else of `test`.

    Args:
        splits: of train, dev and test, what is wanted.
        settings: of `Classes`.
    """
    if data_dir is not None:
        root = Path(data_dir)
        test = "test" if (root / "test").is_dir() or not (root / "val").is_dir() else "val"
        dev = [name for name in ("dev", "val") if (root / name).is_dir() and name != test][:1]
        places = {"train": "train", "test": test} | ({"dev": dev[0]} if dev else {})
        found, folders = in_folders(root, places, splits)
    else:
        assert dataset is not None
        places = {"train": train_split, "test": test_split}
        found, folders = on_hub(dataset, revision, places, splits, image_column, label_column)
    names = folder_names(class_names, folders)
    chosen = divided(found, "dev" in places, splits, dev_examples, sample_seed)
    return task("images", chosen, names, data_dir, **settings)


def needed(places: Mapping[str, str], splits: Collection[str]) -> list[str]:
    """The splits that have to be read: the training images too where `dev` is made of them."""
    wanted = {*splits} | ({"train"} if "dev" in splits and "dev" not in places else set())
    return [split for split in places if split in wanted]


def in_folders(root: Path, places: Mapping[str, str], splits: Collection[str]) -> Source:
    """
    Args:
        places: the folder of every split. The classes are those of `train` where it is there.
    """
    wanted = needed(places, splits)
    first = root / places["train"]
    named = first if first.is_dir() or "train" in wanted else root / places[wanted[0]]
    folders = in_order(class_folders(named, DATA_DIR))
    labels = {folder: at for at, folder in enumerate(folders)}
    found = {}
    for split in wanted:
        found[split] = image_folder(root / places[split], DATA_DIR, labels=labels, named=places[split])
    return found, tuple(folders)


def on_hub(
    dataset: str,
    revision: str | None,
    places: Mapping[str, str],
    splits: Collection[str],
    image_column: str | None = "image",
    label_column: str = "label",
) -> Source:
    """
    Args:
        places: the data set's split of every split; the first that is read names the classes.

    Raises:
        DataError: the classes of two splits differ, so that a label has two meanings.
    """
    found: dict[str, LabelledImages] = {}
    names: tuple[str, ...] = ()
    for split in needed(places, splits):
        found[split], its = hub_images(dataset, places[split], revision, image_column, label_column)
        names = names or its
        if its != names[: len(its)]:
            raise DataError(
                f"{dataset}/{places[split]} has {len(its)} classes that are not the {len(names)} of"
                f" {dataset}/{places['train']}: set task.test_split and task.label_column to what has the same"
            )
    return found, names


def divided(
    found: Mapping[str, LabelledImages], dev_lies_there: bool, splits: Collection[str], size: int | None, seed: int
) -> dict[str, LabelledImages]:
    """The splits that are wanted, in the order of a task.

    Where `dev` is held out of the training images, `train` lacks those in any case. Images for selection are in the
    order in which they are drawn, so that the first ones are a sample.

    Args:
        size: `task.dev_examples`; 0: there is no `dev`.
    """
    chosen = dict(found)
    if "train" in found and not dev_lies_there:
        train = found["train"]
        held_out = min(HELD_OUT, max(1, len(train) // 10)) if size is None else size
        if held_out >= len(train):
            raise ConfigError(
                f"task.dev_examples is {held_out}, but there are only {len(train)} training images: set it lower"
            )
        order = np.random.default_rng(seed).permutation(len(train))
        chosen["train"] = train.only(np.sort(order[held_out:]))
        chosen |= {"dev": train.only(order[:held_out])} if held_out else {}
    elif "dev" in found:
        chosen["dev"] = found["dev"].only(np.random.default_rng(seed).permutation(len(found["dev"])))
    return {split: chosen[split] for split in ("train", "dev", "test") if split in splits and split in chosen}


def task(
    name: str,
    splits: Mapping[str, LabelledImages],
    names: tuple[str, ...],
    data_dir: str | None,
    *,
    templates: str | tuple[str, ...],
    **rest: Any,
) -> Task:
    return Task(
        name=name,
        kind="classes",
        loss="classification",
        splits=splits,
        headline="accuracy",
        notes=() if data_dir is None else order_in(Path(data_dir), names),
        classes=Classes(names, templates_of(templates), **rest),
    )
