"""What the classes of images are called, as a text encoder reads it."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lorasc_ds.errors import ConfigError
from lorasc_ds.tasks.rows import read_file
from lorasc_ds.tasks.templates import OPENAI, SIMPLE


def read_class_names(file: str, count: int) -> tuple[str, ...]:
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


def installed_names() -> tuple[str, ...] | None:
    """ImageNet's class names, by WordNet id, of open_clip (the extra [vision]); None: it is not installed.

    The one file that has them is run by itself: the package would import torchvision.
    """
    found = find_spec("open_clip")
    if found is None or found.origin is None:
        return None
    return tuple(runpy.run_path(str(Path(found.origin).with_name("zero_shot_metadata.py")))["IMAGENET_CLASSNAMES"])


def imagenet_names(file: str | None, head: str, fallback: Sequence[str]) -> tuple[str, ...]:
    """The names of ImageNet's classes: from a file, of the extra [vision], or what a mere classifier does with.

    Args:
        file: `task.class_names`.
        head: `task.head`; `classifier` alone reads no names.
        fallback: identifies the classes in their order.

    Raises:
        ConfigError: there are none for a head that is made of text.
    """
    if file is not None:
        return read_class_names(file, len(fallback))
    names = installed_names()
    if names is not None and len(names) == len(fallback):
        return names
    if head == "classifier":
        return tuple(fallback)
    reason = (
        "the extra [vision] that brings them is not installed"
        if names is None
        else f"the extra [vision] names {len(names)} and there are {len(fallback)} class folders"
    )
    raise ConfigError(
        f"task.class_names is null and {reason}: set task.class_names FILE, or pip install -e '.[vision]', or set"
        " task.head classifier, which reads no names"
    )


def folder_names(file: str | None, folders: Sequence[str]) -> tuple[str, ...]:
    """From a file, or those of the folders with blanks for underscores."""
    if file is not None:
        return read_class_names(file, len(folders))
    return tuple(folder.replace("_", " ") for folder in folders)


def templates_of(setting: str | Sequence[str]) -> tuple[str, ...]:
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
