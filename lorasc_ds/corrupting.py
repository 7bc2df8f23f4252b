"""What a worker process does: one image of the source, corrupted in every way that was asked for. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lorasc_ds.corruption_parameters import Parameters
from lorasc_ds.corruptions import corrupt
from lorasc_ds.errors import ConfigError
from lorasc_ds.images import MAX_PIXELS, Unreadable, rgb_image
from lorasc_ds.tasks.images import FileImage

JPEG = {"format": "JPEG", "quality": 85, "optimize": True}  # as ImageNet-C's files are
ENDINGS = {"jpeg": (".jpg", ".jpeg"), "png": (".png",)}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Where images come from, what is done to them and where they go.

    Args:
        frost: paths of textures; none: made-up ice.
        size: of the middle that is kept, in pixels; 0: every image keeps its own size.
        format: `jpeg` or `png`.
    """

    source: Path
    out: Path
    corruptions: tuple[str, ...]
    severities: tuple[int, ...]
    parameters: Parameters
    frost: tuple[Path, ...]
    size: int
    format: str
    seed: int

    def copies(self, name: str) -> Iterator[tuple[str, int, Path]]:
        """Every corruption and severity, and the file of the copy of an image, `name` in the source."""
        written = name if name.lower().endswith(ENDINGS[self.format]) else name + ENDINGS[self.format][0]
        for corruption in self.corruptions:
            for severity in self.severities:
                yield corruption, severity, self.out / corruption / str(severity) / written


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one image: how many copies were made now, and why none could be, or nothing."""

    name: str
    made: int
    unreadable: str = ""


def make_copies(recipe: Recipe, name: str) -> Outcome:
    """Write the copies of one image that are not there yet; each is whole or absent, whenever the process dies.

    Raises:
        ConfigError: a copy cannot be written.
    """
    missing = [copy for copy in recipe.copies(name) if not copy[2].exists()]
    if not missing:
        return Outcome(name, 0)
    try:
        image = np.asarray(middle(rgb_file(recipe.source / name), recipe.size, name))
    except Unreadable as error:
        return Outcome(name, 0, error.why)
    frost = textures(recipe.frost)
    for corruption, severity, path in missing:
        seed = seed_of(recipe.seed, corruption, severity, name)
        save(corrupt(image, corruption, severity, seed, frost, recipe.parameters), path, recipe.format)
    return Outcome(name, len(missing))


def seed_of(seed: int, corruption: str, severity: int, name: str) -> int:
    """64 bits that depend on nothing else, so that neither order nor processes do."""
    text = os.fsencode(f"{seed}/{corruption}/{severity}/{PurePosixPath(name)}")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def rgb_file(path: Path) -> Image.Image:
    """
    Raises:
        Unreadable: see `rgb_image`.
    """
    return rgb_image(FileImage(path.name, str(path)))


def middle(image: Image.Image, size: int, name: str) -> Image.Image:
    """The shorter side resized (bilinear) to `size` * 256 / 224, and of that the `size` x `size` in the middle.

    Raises:
        Unreadable: the image, of that name, is so long that this would take more than `MAX_PIXELS`.
    """
    if not size:
        return image
    width, height = image.size
    shorter = round(size * 256 / 224)
    longer = int(shorter * max(width, height) / min(width, height))
    if shorter * longer > MAX_PIXELS:
        raise Unreadable(name, f"{width} x {height} pixels are too far from a square to be cut to one")
    image = image.resize((shorter, longer) if width <= height else (longer, shorter), Image.Resampling.BILINEAR)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


@lru_cache(maxsize=1)
def textures(paths: tuple[Path, ...]) -> tuple[NDArray[np.uint8], ...]:
    """
    Raises:
        Unreadable: one is no image.
    """
    return tuple(np.asarray(rgb_file(path)) for path in paths)


def save(image: NDArray[np.uint8], path: Path, kind: str) -> None:
    """
    Raises:
        ConfigError: the disk is full, for instance.
    """
    temporary = path.with_name(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(temporary, **(JPEG if kind == "jpeg" else {"format": "PNG"}))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        why = error.strerror or error
        raise ConfigError(f"OUT: {str(path)!r} cannot be written ({why}); what was made is kept") from error
