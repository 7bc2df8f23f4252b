"""Images with a class each, as sequences of examples that are made when they are asked for.

What is held of an image is its path and its label, some 50 bytes: ImageNet's 1.28 million take 60 MB.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lorasc_ds.errors import DataError
from lorasc_ds.tasks.base import Example, ImageSource

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif")
MAX_BYTES = 2**28  # 256 MiB: a file that is larger is not read


@dataclass(frozen=True, slots=True)
class FileImage:
    """An image file.

    Args:
        name: its path from the folder of the data set.
        path: where it is.
    """

    name: str
    path: str

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), self.path)
            return file.read()


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image file that is in memory."""

    name: str
    content: bytes

    def read(self) -> bytes:
        return self.content


@dataclass(frozen=True, slots=True)
class AbsentImage:
    """A place in a data set where there should be an image.

    Args:
        why: it cannot be had.
    """

    name: str
    why: str

    def read(self) -> bytes:
        raise OSError(self.why)


class Part(Protocol):
    """Images of one origin."""

    @property
    def named(self) -> str:
        """What the names of its images begin with."""
        ...

    @property
    def labels(self) -> NDArray[np.int32]:
        """Their classes, (count,)."""
        ...

    @property
    def group(self) -> str: ...

    @property
    def sha256(self) -> str:
        """Of what they are and of their labels, wherever they lie."""
        ...

    def image(self, row: int) -> ImageSource: ...


@dataclass(frozen=True, slots=True)
class FolderPart:
    """The image files of a folder.

    Args:
        paths: of the files from the folder, as UTF-8, end to end.
        ends: (count,), where each ends.
        named: what stands before the paths in the names of the images.
    """

    folder: str
    paths: bytes
    ends: NDArray[np.int64]
    labels: NDArray[np.int32]
    group: str
    named: str
    sha256: str

    def image(self, row: int) -> FileImage:
        begin = int(self.ends[row - 1]) if row else 0
        path = self.paths[begin : int(self.ends[row])].decode()
        return FileImage(f"{self.named}/{path}" if self.named else path, os.path.join(self.folder, path))


class LabelledImages(Sequence[Example]):
    """An example for each image: `gold` is its label, `id` its name.

    Args:
        parts: whose images they are, those of one after those of the other.
        chosen: the numbers of the images over all parts, in their order; None: all.
    """

    def __init__(self, parts: Sequence[Part], chosen: NDArray[np.int64] | None = None) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *(len(part.labels) for part in parts)])
        self.chosen = np.arange(self.starts[-1]) if chosen is None else chosen
        self.of_part = (np.searchsorted(self.starts, self.chosen, side="right") - 1).astype(np.int32)

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> LabelledImages: ...
    def __getitem__(self, at: int | slice) -> Example | LabelledImages:
        if isinstance(at, slice):
            return LabelledImages(self.parts, self.chosen[at])
        number = int(self.of_part[at])
        part, row = self.parts[number], int(self.chosen[at] - self.starts[number])
        image = part.image(row)
        return Example(image.name, "", gold=(int(part.labels[row]),), group=part.group, images=(image,))

    def only(self, positions: ArrayLike) -> LabelledImages:
        """Those at these positions, in this order."""
        return LabelledImages(self.parts, self.chosen[np.asarray(positions, dtype=np.int64)])

    @property
    def labels(self) -> NDArray[np.int32]:
        """The class of every image, (count,)."""
        return np.concatenate([part.labels for part in self.parts])[self.chosen]

    @property
    def groups(self) -> list[str]:
        """Of every image."""
        return [self.parts[int(number)].group for number in self.of_part]

    def in_both(self, other: LabelledImages) -> int:
        """How many of these are of the same origin and place as one of the other's; no name is made."""
        total = 0
        for number, part in enumerate(self.parts):
            same = [at for at, its in enumerate(other.parts) if (its.named, its.sha256) == (part.named, part.sha256)]
            if same:
                theirs = np.concatenate([other.rows(at) for at in same])
                total += int(np.isin(self.rows(number), theirs).sum())
        return total

    def rows(self, number: int) -> NDArray[np.int64]:
        """Places in a part of those that are chosen of it."""
        return self.chosen[self.of_part == number] - self.starts[number]

    @property
    def sha256(self) -> str:
        """Of the names, or the contents, and labels of the parts' images, and of which of them these are."""
        parts = "".join(f"{part.group!r} {part.sha256}\n" for part in self.parts)
        return hashlib.sha256(parts.encode() + self.chosen.astype("<i8").tobytes()).hexdigest()


def joined(parts: Sequence[LabelledImages]) -> LabelledImages:
    """The images of one after those of the other."""
    starts = np.cumsum([0, *(one.starts[-1] for one in parts)])
    chosen = [one.chosen + start for one, start in zip(parts, starts[:-1], strict=True)]
    return LabelledImages([part for one in parts for part in one.parts], np.concatenate(chosen))


def class_folders(root: Path, key: str) -> list[str]:
    """The names of the folders in `root`, sorted as strings, hidden ones left out.

    Args:
        key: the setting that names the folder, for errors.

    Raises:
        DataError: there is none.
    """
    if not root.is_dir():
        raise DataError(f"{key} {str(root)!r} is not a folder: give one that holds a folder of images for every class")
    names = [entry.name for entry in entries_of(root, "", key, root.resolve()) if entry.is_dir()]
    if not names:
        raise DataError(f"{key} {str(root)!r} holds no folder: one for every class is needed, with its images")
    return sorted(names)


def image_folder(
    root: Path, key: str, *, labels: Mapping[str, int] | None = None, group: str = "", named: str | None = None
) -> LabelledImages:
    """All images in the class folders of `root` and in folders below them, by class and then by path.

    Hidden files, and those whose names do not end like an image's, are left out. Links are followed to files of the
    same folder alone.

    Args:
        key: the setting that names the folder, for errors.
        labels: of the class folders, by name; None: their places, sorted as strings.
        group: of the examples.
        named: what stands before the path from `root` in the images' names; None: the group.

    Raises:
        DataError: there is no folder, no class folder or no image in one, a class folder has no label, or a link leads
            elsewhere.
    """
    folders = class_folders(root, key)
    if labels is None:
        labels = {name: at for at, name in enumerate(folders)}
    unknown = [name for name in folders if name not in labels]
    if unknown:
        raise DataError(
            f"{key} {str(root)!r} holds folder {unknown[0]!r}, which is none of the {len(labels)} classes"
            f" ({', '.join(sorted(labels)[:3])}, ...): remove it, or give the folder that belongs to them"
        )
    resolved, paths, counts = root.resolve(), [], []
    for folder in folders:
        found = sorted(image_files(root, folder, key, resolved))
        if not found:
            raise DataError(
                f"{key} {str(root)!r}: folder {folder!r} holds no image ({', '.join(SUFFIXES)}): put some there, or"
                " remove it"
            )
        paths += found
        counts.append(len(found))
    of_images = np.repeat(np.array([labels[folder] for folder in folders], dtype=np.int32), counts)
    encoded = [path.encode() for path in paths]
    digest = hashlib.sha256("\0".join(paths).encode() + of_images.astype("<i4").tobytes()).hexdigest()
    ends = np.cumsum([len(path) for path in encoded])
    part = FolderPart(str(root), b"".join(encoded), ends, of_images, group, group if named is None else named, digest)
    return LabelledImages([part])


def image_files(root: Path, folder: str, key: str, resolved: Path) -> Iterator[str]:
    """The paths from `root` of the images in a folder and below."""
    for entry in entries_of(root, folder, key, resolved):
        path = f"{folder}/{entry.name}"
        if entry.is_dir():
            yield from image_files(root, path, key, resolved)
        else:
            yield path


def entries_of(root: Path, folder: str, key: str, resolved: Path) -> Iterator[os.DirEntry[str]]:
    """The folders and images in a folder that are not hidden.

    Args:
        folder: its path from `root`.
        resolved: `root` without links.

    Raises:
        DataError: the folder cannot be read, a name is not UTF-8, or a link leads to a folder or out of `root`.
    """
    try:
        with os.scandir(root / folder) as entries:
            for entry in entries:
                image = entry.name.lower().endswith(SUFFIXES)
                if entry.name.startswith(".") or not (image or entry.is_dir()):
                    continue
                path = os.path.join(folder, entry.name)
                if entry.name != entry.name.encode(errors="replace").decode():
                    raise DataError(f"{key} {str(root)!r}: the name {path!a} is not UTF-8; rename it")
                if entry.is_symlink() and (entry.is_dir() or not Path(entry).resolve().is_relative_to(resolved)):
                    raise DataError(
                        f"{key} {str(root)!r}: {path!r} is a link to a folder, or out of this one: put the images"
                        " themselves there"
                    )
                yield entry
    except OSError as error:
        raise DataError(f"{key} {str(root / folder)!r}: {error.strerror}; give a folder that can be read") from error


def labels_of(examples: Sequence[Example]) -> list[int]:
    """The class of every image, without making examples where that can be helped."""
    return examples.labels.tolist() if isinstance(examples, LabelledImages) else [one.gold[0] for one in examples]


def known_of(examples: Sequence[Example], others: Sequence[Example]) -> int:
    """How many of the images are among the others too."""
    if isinstance(examples, LabelledImages) and isinstance(others, LabelledImages):
        return examples.in_both(others)
    names = {example.images[0].name for example in others}
    return sum(example.images[0].name in names for example in examples)


def groups_of(examples: Sequence[Example]) -> list[str]:
    return examples.groups if isinstance(examples, LabelledImages) else [one.group for one in examples]
