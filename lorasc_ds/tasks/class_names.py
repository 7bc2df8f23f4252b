"""What the classes of images are called, as a text encoder reads it."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from lorasc_ds.errors import ConfigError
from lorasc_ds.tasks.class_masks import WORDNET_IDS
from lorasc_ds.tasks.rows import read_file
from lorasc_ds.tasks.templates import OPENAI, SIMPLE

Names = tuple[str, ...]


def read_class_names(file: str, count: int) -> Names:
    """The lines of a file, without the blank ones at its end.

    Args:
        count: how many classes there are.

    Raises:
        DataError: it cannot be read.
        ConfigError: it names more classes, or fewer, or a line is blank.
    """
    lines = [line.strip() for line in read_file(Path(file), "task.class_names").rstrip().splitlines()]
    if "" in lines:
        raise ConfigError(
            f"task.class_names {file}:{lines.index('') + 1} is blank: give a file with the name of a class in every"
            " line"
        )
    if len(lines) != count:
        raise ConfigError(
            f"task.class_names {file} names {len(lines)} classes, but there are {count}: give a file with a line for"
            " each, in the order of the classifier's outputs"
        )
    return tuple(lines)


def installed_names() -> Names | None:
    """ImageNet's class names, by WordNet id, of open_clip (the extra [vision]); None: it is not installed.

    The one file that has them is run by itself: the package would import torchvision.
    """
    found = find_spec("open_clip")
    if found is None or found.origin is None:
        return None
    return tuple(runpy.run_path(str(Path(found.origin).with_name("zero_shot_metadata.py")))["IMAGENET_CLASSNAMES"])


def is_wordnet_id(name: str) -> bool:
    return re.fullmatch(r"n\d{8}", name) is not None


def in_order(folders: Iterable[str]) -> list[str]:
    """As a classifier's outputs stand: by number where all are numbers, else as strings.

    As strings, `10` would come before `2` (protocols section 6.5).
    """
    folders = sorted(folders)
    return sorted(folders, key=int) if all(map(str.isdecimal, folders)) else folders


def wordnet_indices(folders: Sequence[str]) -> list[int] | None:
    """Which of ImageNet's classes folders hold that are called by WordNet id; None: one is called otherwise."""
    index = {wordnet_id: at for at, wordnet_id in enumerate(WORDNET_IDS)}
    return [index[folder] for folder in folders] if index.keys() >= {*folders} else None


def imagenet_indices(folders: Sequence[str]) -> list[int] | None:
    """Which of ImageNet's classes folders hold, all called by WordNet id or all by number (0 to 999); None: neither."""
    numbers = [int(folder) for folder in folders if folder.isdecimal()]
    if len({*numbers}) == len(folders) and max(numbers) < len(WORDNET_IDS):
        return numbers
    return wordnet_indices(folders)


def imagenet_names(file: str | None, head: str, folders: Sequence[str], indices: Sequence[int] | None) -> Names:
    """The names of classes of ImageNet: from a file, of the extra [vision], or what a mere classifier does with.

    Args:
        file: `task.class_names`.
        head: `task.head`; `classifier` alone reads no names.
        folders: what the classes are called where they lie, in their order.
        indices: which of the thousand they are; None: it is not known.

    Raises:
        ConfigError: there are none for a head that is made of text.
    """
    if file is not None:
        return read_class_names(file, len(folders))
    names = installed_names()
    if names is not None and indices is not None:
        return tuple(names[index] for index in indices)
    if head == "classifier":
        return tuple(folders)
    reason = (
        "the extra [vision] that brings them is not installed"
        if names is None
        else f"the classes ({folders[0]!r}, ...) are called neither by WordNet id, like n01440764, nor by number"
    )
    raise ConfigError(
        f"task.class_names is null and {reason}: set task.class_names FILE, or pip install -e '.[vision]', or set"
        " task.head classifier, which reads no names"
    )


def folder_names(file: str | None, folders: Sequence[str]) -> Names:
    """From a file, or those of the folders: blanks for underscores; for ImageNet's WordNet ids words of the extra."""
    if file is not None:
        return read_class_names(file, len(folders))
    indices = wordnet_indices(folders)
    names = installed_names() if indices else None
    if names and indices:
        return tuple(names[index] for index in indices)
    return tuple(folder.replace("_", " ") for folder in folders)


def check_words(names: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: a class, which a text tower is to know by its name, has a WordNet id for one.
    """
    ids = [name for name in names if is_wordnet_id(name)]
    if ids:
        raise ConfigError(
            f"task.class_names: {len(ids)} of {len(names)} classes are called by WordNet id ({ids[0]}), which says"
            " nothing to a text tower: set task.class_names FILE, or pip install -e '.[vision]', which knows ImageNet's"
        )


def templates_of(setting: str | Sequence[str]) -> Names:
    """
    Args:
        setting: `task.templates`.

    Raises:
        ConfigError: one has no place for the class.
    """
    templates = {"openai": OPENAI, "simple": SIMPLE}.get(setting) if isinstance(setting, str) else tuple(setting)
    assert templates is not None
    without = [template for template in templates if template.count("{}") != 1]
    if without:
        raise ConfigError(f"task.templates has {without[0]!r}: {{}} is needed once, where the name of the class goes")
    return templates
