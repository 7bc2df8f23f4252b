"""Task `digit_images`: the digits of task `digits` as images of 32 x 32 pixels, dark ink on white paper.

A model on images that reads upright digits is adapted to another domain, and scored there, on corrupted copies of
that, and on upright digits. The draw of train, dev and test and of wrong labels is that of `digits`.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorasc_ds.corruptions import corrupt
from lorasc_ds.tasks.base import Classes, Example, Task
from lorasc_ds.tasks.class_names import read_class_names, templates_of
from lorasc_ds.tasks.digits import DOMAINS, Image, draw, load_images
from lorasc_ds.tasks.images import StoredImage

SIDE = 32  # pixels
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CORRUPTIONS = {  # name -> severity; of each family, so strong that the model in the package loses some upright digits
    "gaussian_noise": 5,
    "impulse_noise": 5,
    "glass_blur": 5,
    "snow": 5,
    "fog": 3,
    "brightness": 5,
    "contrast": 3,
    "pixelate": 5,
}
Pixels = NDArray[np.uint8]  # (count, SIDE, SIDE, 3)


def enlarged(images: Image) -> Pixels:
    """Images of (count, 8, 8) at four times their size, by bilinear interpolation; level 0 is white, 16 black."""
    from PIL import Image as Pictures

    grey = np.rint(255 - np.clip(images, 0, 16) * (255 / 16)).astype(np.uint8)
    large = [Pictures.fromarray(one).resize((SIDE, SIDE), Pictures.Resampling.BILINEAR) for one in grey]
    return np.stack([np.asarray(one.convert("RGB")) for one in large])


def png(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image as Pictures

    file = io.BytesIO()
    Pictures.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def examples(split: str, images: Pixels, labels: NDArray[np.int64], group: str = "") -> list[Example]:
    found = []
    for at, (image, label) in enumerate(zip(images, labels, strict=True)):
        source = StoredImage("/".join(part for part in ("digit_images", split, group) if part) + f":{at}", png(image))
        found.append(Example(source.name, "", gold=(int(label),), group=group, images=(source,)))
    return found


def corrupted(split: str, images: Pixels, labels: NDArray[np.int64]) -> list[Example]:
    """Every image under every corruption, which are the groups."""
    found = []
    for name, severity in CORRUPTIONS.items():
        copies = np.stack([corrupt(image, name, severity, seed=at) for at, image in enumerate(images)])
        found += examples(split, copies, labels, f"{name}/{severity}")
    return found


def digit_images(
    *,
    domain: str,
    train_examples: int,
    dev_examples: int,
    test_examples: int,
    label_noise: float,
    class_names: str | None,
    templates: str | tuple[str, ...],
    seed: int,
    **settings: Any,
) -> Task:
    """Adaptation from upright digits to `domain`.

    Splits: `train` and `dev` in the new domain, `new_domain`, `new_domain_corrupted` (its images under each of
    CORRUPTIONS, the same at every call) and `old_domain` (upright: what was forgotten).

    Args:
        settings: of `Classes`.
    """
    names = NAMES if class_names is None else read_class_names(class_names, len(NAMES))
    images, labels = load_images()
    drawn = draw(labels, train_examples, dev_examples, test_examples, label_noise, seed)
    (train, train_labels), (dev, dev_labels), (test, test_labels) = drawn
    shifted = DOMAINS[domain](images)
    new_domain = enlarged(shifted[test])
    return Task(
        name="digit_images",
        kind="classes",
        loss="classification",
        headline="accuracy",
        splits={
            "train": examples("train", enlarged(shifted[train]), train_labels),
            "dev": examples("dev", enlarged(shifted[dev]), dev_labels),
            "new_domain": examples("new_domain", new_domain, test_labels),
            "new_domain_corrupted": corrupted("new_domain_corrupted", new_domain, test_labels),
            "old_domain": examples("old_domain", enlarged(images[test]), test_labels),
        },
        classes=Classes(names, templates_of(templates), **settings),
    )
