"""Whether a copy of a data set has its classes in the order that is expected: by its `classnames.txt`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorasc_ds.errors import DataError
from lorasc_ds.tasks.class_names import is_wordnet_id
from lorasc_ds.tasks.rows import read_file

FILE = "classnames.txt"  # a name in every line, as the webdataset copies have it (protocols section 6.5)


def order_in(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Notes on a `classnames.txt` beside the class folders; none where there is none.

    Raises:
        DataError: as for `compared`.
    """
    return compared(folder / FILE, names) if (folder / FILE).is_file() else ()


def order_on_hub(dataset: str, revision: str | None, names: Sequence[str]) -> tuple[str, ...]:
    """Notes on the `classnames.txt` of a data set whose labels are numbers, or that it cannot be had.

    Raises:
        DataError: as for `compared`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        file = hf_hub_download(dataset, FILE, repo_type="dataset", revision=revision)
    except (HfHubHTTPError, OSError):
        return (f"{dataset}: no {FILE} to be had, so that the order of its classes is taken on trust",)
    return compared(Path(file), names)


def compared(file: Path, names: Sequence[str]) -> tuple[str, ...]:
    """What a file calls the classes against what they are called here: a few other spellings are noted.

    Args:
        names: in the order of the labels; WordNet ids, where names are not known, are compared with nothing.

    Raises:
        DataError: another number of classes, or more names are at another's place than at their own.
    """
    told = [line.strip() for line in read_file(file, FILE).rstrip().splitlines()]
    if len(told) != len(names):
        raise DataError(
            f"{file} names {len(told)} classes, but there are {len(names)}: give the folder that belongs to it, or"
            " remove it"
        )
    if any(map(is_wordnet_id, names)):
        return (f"{file} was not compared: the classes have no names here",)
    told, here = ([name.replace("_", " ").casefold() for name in some] for some in (told, names))
    others = [at for at, (one, other) in enumerate(zip(told, here, strict=True)) if one != other]
    if not others:
        return ()
    example = f"line {others[0] + 1} is {told[others[0]]!r}, but that class is {here[others[0]]!r} here"
    known = {*here}
    moved = sum(told[at] in known for at in others)
    if moved > len(here) - len(others):
        raise DataError(
            f"{file} has {moved} of {len(here)} classes in another order ({example}): give a copy in the order of"
            " WordNet ids, or task.class_names in the order of the labels"
        )
    return (f"{file} has other names for {len(others)} of {len(here)} classes: {example}",)
