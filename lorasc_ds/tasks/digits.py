"""Task `digits`: scikit-learn's 1797 handwritten digits (8x8 pixels, 17 grey levels) as text.

An image is 64 letters, one per pixel in reading order (`a` white to `q` black), then `=`; the answer is
the digit. A base model that reads upright digits is adapted to another domain from few examples, some of
them with wrong labels. Nothing is downloaded: the images are part of scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import distribution
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lorasc_ds.tasks.base import Example, Task

Image = NDArray[np.float64]  # (count, 8, 8), grey levels 0 to 16

FILE = "sklearn/datasets/data/digits.csv.gz"
GREY_LETTERS = "abcdefghijklmnopq"
PRETRAINING_IMAGES = 1000  # of the shuffled 1797: the base model's own
ADAPTATION_IMAGES = 297  # `train` and `dev` are drawn from these
TEST_IMAGES = 500  # the rest, the same images in every domain


def blurred(images: Image) -> Image:
    """A 3x3 blur: 70 % of a pixel stays in each direction, edges repeated."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), mode="edge")
    side, middle = 0.15, 0.7
    rows = side * padded[:, :-2] + middle * padded[:, 1:-1] + side * padded[:, 2:]
    return side * rows[:, :, :-2] + middle * rows[:, :, 1:-1] + side * rows[:, :, 2:]


def noisy(images: Image) -> Image:
    """Normal noise with a standard deviation of 2 of the 16 grey levels, the same at every call."""
    return images + np.random.default_rng(0).normal(0.0, 2.0, images.shape)


DOMAINS: dict[str, Callable[[Image], Image]] = {
    "upright": lambda images: images,
    "mirrored": lambda images: images[:, :, ::-1],
    "rotated": lambda images: np.rot90(images, axes=(1, 2)),
    "blurred": blurred,
}


def load_images() -> tuple[Image, NDArray[np.int64]]:
    """All images and labels in one fixed shuffled order: pretraining, then adaptation, then test."""
    # the file itself: to import scikit-learn takes longer than all else that a task does
    rows = np.loadtxt(str(distribution("scikit-learn").locate_file(FILE)), delimiter=",")
    pixels, labels = rows[:, :-1], rows[:, -1].astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    return pixels.reshape(-1, 8, 8)[order], labels[order]


def prompt_of(image: NDArray[np.float64]) -> str:
    """One image of shape (8, 8) as 64 letters and an equals sign."""
    levels = np.clip(np.rint(image), 0, 16).astype(int).ravel()
    return " ".join(GREY_LETTERS[level] for level in levels) + " ="


def examples(split: str, images: Image, labels: NDArray[np.int64]) -> list[Example]:
    """Images of shape (count, 8, 8) with the digits 0 to 9 as candidates."""
    found = []
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        prompt = prompt_of(image)
        texts = tuple(f"{prompt} {digit}" for digit in range(10))
        found.append(Example(f"digits/{split}:{i}", prompt, texts, (int(label),)))
    return found


def draw(
    labels: NDArray[np.int64], train_examples: int, dev_examples: int, test_examples: int, label_noise: float, seed: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The indices and the labels of train, dev and test, each (count,).

    Only train has wrong labels: of exactly `round(label_noise * train_examples)` images, each drawn uniformly from the
    nine wrong digits.

    Args:
        labels: of all images, in their fixed order.
    """
    rng = np.random.default_rng(seed)
    adaptation = PRETRAINING_IMAGES + rng.permutation(ADAPTATION_IMAGES)
    train, dev = adaptation[:train_examples], adaptation[train_examples:][:dev_examples]
    test = PRETRAINING_IMAGES + ADAPTATION_IMAGES + np.arange(test_examples)

    train_labels = labels[train].copy()
    wrong = rng.permutation(train_examples)[: round(label_noise * train_examples)]
    train_labels[wrong] = (train_labels[wrong] + rng.integers(1, 10, len(wrong))) % 10
    return [(train, train_labels), (dev, labels[dev]), (test, labels[test])]


def digits(
    *,
    domain: str,
    train_examples: int,
    dev_examples: int,
    test_examples: int,
    label_noise: float,
    loss: Literal["lm", "classification"],
    seed: int,
) -> Task:
    """Adaptation from upright digits to `domain`.

    Splits: `train` and `dev` in the new domain, `new_domain`, that domain blurred and with noise, and
    `old_domain` (upright: what was forgotten).
    """
    images, labels = load_images()
    drawn = draw(labels, train_examples, dev_examples, test_examples, label_noise, seed)
    (train, train_labels), (dev, dev_labels), (test, test_labels) = drawn
    shifted = DOMAINS[domain](images)
    return Task(
        name="digits",
        kind="candidates",
        loss=loss,
        headline="accuracy",
        splits={
            "train": examples("train", shifted[train], train_labels),
            "dev": examples("dev", shifted[dev], dev_labels),
            "new_domain": examples("new_domain", shifted[test], test_labels),
            "new_domain_blurred": examples("new_domain_blurred", blurred(shifted[test]), test_labels),
            "new_domain_noisy": examples("new_domain_noisy", noisy(shifted[test]), test_labels),
            "old_domain": examples("old_domain", images[test], test_labels),
        },
    )
