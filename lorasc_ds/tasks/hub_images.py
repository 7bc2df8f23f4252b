"""Images of a data set on the hub, as sequences of examples that are made when they are asked for."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorasc_ds.errors import DataError
from lorasc_ds.tasks.base import ImageSource
from lorasc_ds.tasks.images import MAX_BYTES, AbsentImage, FileImage, LabelledImages, StoredImage
from lorasc_ds.tasks.rows import hub_split

DIGESTED = 16  # images of a split that its digest looks at: reading all of ImageNet takes an hour


@dataclass(frozen=True, slots=True)
class HubImage:
    """An encoded image in a column, see `image_of`; another process is sent its bytes, not the data set.

    Args:
        rows: a `datasets.Dataset`.
    """

    name: str
    rows: Any
    column: str
    row: int

    def read(self) -> bytes:
        return self.rows.data.column(self.column)[self.row]["bytes"].as_py()

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredImage, (self.name, self.read())


@dataclass(frozen=True, slots=True)
class HubPart:
    """The images of a split.

    Args:
        rows: a `datasets.Dataset` whose images are not decoded.
    """

    rows: Any
    column: str
    labels: NDArray[np.int32]
    named: str
    sha256: str
    group: str = ""

    def image(self, row: int) -> HubImage | FileImage | AbsentImage:
        return image_of(self.rows, self.column, row, self.named)


def image_of(rows: Any, column: str, row: int, named: str) -> HubImage | FileImage | AbsentImage:
    """The image of a row: its bytes, or the file whose path it has; what is larger than `MAX_BYTES` is not read."""
    name, cell = f"{named}:{row + 1}", rows.data.column(column)[row]
    if not cell.is_valid or not (cell["bytes"].is_valid or cell["path"].is_valid):
        return AbsentImage(name, "the row has no image")
    if not cell["bytes"].is_valid:
        return FileImage(name, cell["path"].as_py())
    if cell["bytes"].as_buffer().size > MAX_BYTES:
        return AbsentImage(name, os.strerror(errno.EFBIG))
    return HubImage(name, rows, column, row)


def content_of(image: ImageSource) -> bytes:
    """Nothing where it cannot be had, which those who decode it report."""
    try:
        return image.read()
    except OSError:
        return b""


def hub_images(
    dataset: str, split: str, revision: str | None, image_column: str | None, label_column: str
) -> tuple[LabelledImages, tuple[str, ...]]:
    """The images of a split, and the names of the classes, which are numbers where the data set has none.

    Args:
        image_column: None: the only column of images.

    Raises:
        DataError: the split cannot be had, or a column is missing or not of images or labels.
    """
    import datasets

    rows, named = hub_split(dataset, None, split, revision), f"{dataset}/{split}"
    of_images = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    chosen = of_images if image_column is None else [column for column in of_images if column == image_column]
    if len(chosen) != 1:
        raise no_column(named, "image_column", image_column, "images", rows)
    (column,) = chosen
    feature = rows.features.get(label_column)
    whole = isinstance(feature, datasets.ClassLabel) or str(getattr(feature, "dtype", "")).startswith(("int", "uint"))
    if not whole:
        raise no_column(named, "label_column", label_column, "classes (ClassLabel, or whole numbers)", rows)
    rows = rows.cast_column(column, datasets.Image(decode=False))
    labels = np.array([-1 if label is None else label for label in rows[label_column][:]], dtype=np.int64)
    if not len(labels):
        raise DataError(f"{named} has no row: give a split with images")
    if labels.min() < 0:
        raise DataError(
            f"{named}:{int(labels.argmin()) + 1} has no class in column {label_column!r}: give a split whose classes"
            " are public"
        )
    names = feature.names if isinstance(feature, datasets.ClassLabel) else map(str, range(int(labels.max()) + 1))
    digest = hashlib.sha256(labels.astype("<i8").tobytes())
    for row in np.linspace(0, len(labels) - 1, min(DIGESTED, len(labels))).astype(int):
        digest.update(hashlib.sha256(content_of(image_of(rows, column, int(row), named))).digest())
    part = HubPart(rows, column, labels.astype(np.int32), named, digest.hexdigest())
    return LabelledImages([part]), tuple(names)


def no_column(named: str, key: str, column: str | None, of: str, rows: Any) -> DataError:
    has = f"not one column of {of}" if column is None else f"no column {column!r} of {of}"
    columns = ", ".join(rows.column_names)
    return DataError(f"{named} has {has}; it has {columns}: set task.{key} to one of them")
