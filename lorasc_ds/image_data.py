"""From images to tensors: batches of pixels, decoded where they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lorasc_ds.data import TrainingData
from lorasc_ds.errors import DataError
from lorasc_ds.images import Preprocessing, Unreadable, evaluation_pixels, training_pixels
from lorasc_ds.order import Order, derived_seed
from lorasc_ds.prefetching import on_its_way
from lorasc_ds.tasks.base import Example


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """How images become a batch.

    Args:
        how: the geometry that the model expects.
        crop_scale: as in `Classes`, of training images.
        refuse: whether an image that cannot be decoded ends the run.
        seed: of the random crops.
        workers: processes that decode ahead, for each process of the run; 0: none.
    """

    how: Preprocessing
    crop_scale: tuple[float, float] | None
    refuse: bool
    seed: int
    workers: int


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """Images as tensors.

    Args:
        pixels: uint8 of (images, 3, height, width), as `ImageClassifier` takes them; black where unreadable.
        labels: int64 of (images,): the right class among those of the task.
        readable: bool of (images,).
        unreadable: what is wrong with the others, a line each.
    """

    pixels: Tensor
    labels: Tensor
    readable: Tensor
    unreadable: tuple[str, ...] = ()
    also_lower: ClassVar[str] = ""

    @property
    def input_tokens(self) -> int:
        """What the speed of a run is counted in: images."""
        return len(self.labels)

    def to(self, device: torch.device) -> ImageBatch:
        return replace(
            self,
            pixels=on_its_way(self.pixels, device),
            labels=on_its_way(self.labels, device),
            readable=on_its_way(self.readable, device),
        )

    @property
    def size(self) -> str:
        """In words, for an error."""
        count, _, height, width = self.pixels.shape
        return f"{count} images of {height} x {width} pixels"


def collate_images(
    examples: Sequence[Example], layout: ImageLayout, pixels_of: Callable[[int], np.ndarray]
) -> ImageBatch:
    """
    Args:
        pixels_of: gives the pixels of the example at a position, uint8 of (3, height, width).

    Raises:
        DataError: an image cannot be decoded, and that is to end the run.
    """
    pixels = torch.zeros(len(examples), 3, *layout.how.size, dtype=torch.uint8)
    readable = torch.ones(len(examples), dtype=torch.bool)
    unreadable: list[str] = []
    for at in range(len(examples)):
        try:
            pixels[at] = torch.from_numpy(pixels_of(at))
        except Unreadable as error:
            if layout.refuse:
                raise DataError(f"{error}; mend or remove it, or set task.unreadable skip") from error
            readable[at] = False
            unreadable.append(str(error))
    labels = torch.tensor([example.gold[0] for example in examples])
    return ImageBatch(pixels, labels, readable, tuple(unreadable))


def evaluation_batch(examples: Sequence[Example], layout: ImageLayout) -> ImageBatch:
    """Images in the geometry of an evaluation."""
    return collate_images(examples, layout, lambda at: evaluation_pixels(examples[at].images[0], layout.how))


class TrainingImages(TrainingData[Example, ImageBatch]):
    """The batches of images of a run; a random crop is a function of the seed, the step and the place in the batch."""

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        order: Order,
        micro_batch_size: int,
        layout: ImageLayout,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(examples, order=order, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size)
        self.layout = layout

    def collate(self, examples: Sequence[Example], step: int, first: int) -> ImageBatch:
        layout = self.layout

        def pixels_of(at: int) -> np.ndarray:
            source = examples[at].images[0]
            if layout.crop_scale is None:
                return evaluation_pixels(source, layout.how)
            return training_pixels(source, layout.how, layout.crop_scale, derived_seed(layout.seed, step, first + at))

        return collate_images(examples, layout, pixels_of)

    def normaliser(self, examples: Sequence[Example]) -> int:
        return len(examples)
