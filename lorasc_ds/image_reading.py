"""A task of images as a model of images reads it: the geometry it expects, and the head that tells classes apart."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorasc_ds import models
from lorasc_ds.class_order import ClassOrder, class_order
from lorasc_ds.classifier import Head, ImageClassifier, Prompts, head_of, prompts_of
from lorasc_ds.config import Config, ModelConfig, TrainingConfig
from lorasc_ds.errors import ConfigError
from lorasc_ds.image_data import ImageBatch, ImageLayout, TrainingImages, evaluation_batch
from lorasc_ds.images import preprocessing_of
from lorasc_ds.order import Order
from lorasc_ds.tasks.base import Classes, Example, Task
from lorasc_ds.tasks.class_names import check_words
from lorasc_ds.tasks.images import LabelledImages, known_of

MOST_WORKERS = 8


@dataclass(frozen=True, slots=True)
class ImageReading:
    """A task of kind `classes`.

    Args:
        processor: Hugging Face's image processor of the model, which is saved beside it.
        tokenizer: of its text tower; None where it has none.
        prompts: of all classes; None where the head is not made of text.
        remark: how the classes were matched with the classifier's outputs; None: in their order.
    """

    task: Task
    classes: Classes
    head: Head
    layout: ImageLayout
    processor: Any
    tokenizer: PreTrainedTokenizerBase | None
    prompts: Prompts | None
    remark: str | None = None

    @property
    def splits(self) -> Mapping[str, Sequence[Example]]:
        return self.task.splits

    @property
    def data_sha256(self) -> dict[str, str]:
        """Digest of the names and classes of every split's images, in their order."""
        return {split: digest_of_images(examples) for split, examples in self.splits.items()}

    def training_data(
        self, training: TrainingConfig, micro_batch_size: int, rank: int, world_size: int
    ) -> TrainingImages:
        examples = self.splits["train"]
        return TrainingImages(
            examples,
            order=Order(len(examples), training.seed, training.batch_size),
            micro_batch_size=micro_batch_size,
            layout=self.layout,
            rank=rank,
            world_size=world_size,
        )

    def probe(self, split: str, examples: int, tokens: int) -> ImageBatch:
        """The first images of a split."""
        images = self.splits[split]
        return evaluation_batch([images[at] for at in range(min(examples, len(images)))], self.layout)

    @property
    def workers(self) -> int:
        return self.layout.workers

    @property
    def saved(self) -> list[Any]:
        """What belongs in the folder of a model."""
        return [self.processor] if self.tokenizer is None else [self.processor, self.tokenizer]

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the outputs of the classifier, or of trained prototypes, stand for; () where they follow the names."""
        return self.classes.by_output if self.head == "classifier" or self.classes.train_head else ()

    def network(self, model: PreTrainedModel) -> ImageClassifier:
        """What an engine is given."""
        return ImageClassifier(model, self.classes, self.layout.how, self.prompts)

    def tower(self, shape: PreTrainedModel) -> PretrainedConfig:
        """The configuration of what reads images."""
        return getattr(shape.config, "vision_config", shape.config)

    def tokens(self, shape: PreTrainedModel) -> int:
        """Of an image: patches, and one that stands for the whole."""
        height, width = self.layout.how.size
        patch = self.tower(shape).patch_size
        return (height // patch) * (width // patch) + 1

    def parameters(self, shape: PreTrainedModel) -> int:
        """That every token of an image is multiplied by."""
        return sum(p.numel() for name, p in shape.named_parameters() if not name.startswith("text_"))

    def in_words(self) -> str:
        height, width = self.layout.how.size
        head = {"classifier": "the model's classifier", "prototypes": "prototypes", "text": "the text tower"}[self.head]
        trained = ", trained" if self.classes.train_head else ""
        return (
            f"{len(self.classes.names)} classes told apart by {head}{trained}; {height} x {width} pixels, decoded by"
            f" {self.layout.workers or 'no'} worker{'' if self.layout.workers == 1 else 's'}"
        )

    def stream(self) -> Iterator[str]:
        yield from ()

    def losses(self) -> Iterator[str]:
        """What is to be known of the scores."""
        if self.remark is not None:
            yield self.remark

    def notes(self) -> Iterator[str]:
        """What a user may not expect of the data."""
        yield from self.losses()
        for split, examples in self.splits.items():
            known = known_of(examples, self.splits["train"]) if split != "train" else 0
            if known:
                yield f"{known} of {len(examples)} images of {split} are training images too: its score is no test"


def digest_of_images(examples: Sequence[Example]) -> str:
    """sha256 over ids and classes, in their order; the files are not read."""
    if isinstance(examples, LabelledImages):
        return examples.sha256
    total = sha256()
    for example in examples:
        total.update(f"{example.id}\0{example.gold[0]}\0".encode())
    return total.hexdigest()


def with_labels(model: ModelConfig, task: Task) -> ModelConfig:
    """The model with a new classifier, where the task trains one; a model with a text tower takes no notice."""
    if model.labels is not None or task.classes is None or not task.classes.train_head:
        return model
    return model.model_copy(update={"labels": max(2, len(task.classes.names))})


def workers_of(asked: int | None) -> int:
    """Processes that decode ahead, for each process of the run: as asked for, or its share of the cores."""
    if asked is not None:
        return asked
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(MOST_WORKERS, max(1, len(os.sched_getaffinity(0)) // local))


def read_images(config: Config, task: Task, shape: PreTrainedModel) -> ImageReading:
    """
    Args:
        shape: the model on the meta device.

    Raises:
        ConfigError: the model is none of images, or its head does not fit the task.
    """
    assert task.classes is not None
    training = config.training
    refuse_text_settings(training)
    return image_reading(config.model, task, task.classes, shape, training.seed, workers_of(training.data_workers))


def image_reading(
    model: ModelConfig,
    task: Task,
    classes: Classes,
    shape: PreTrainedModel,
    seed: int,
    workers: int,
    trained: tuple[str, ...] | None = None,
) -> ImageReading:
    """
    Args:
        trained: what the outputs of the head that a run trained stand for; None: there is no such head, and a
            classifier's are named by the model.

    Raises:
        ConfigError: as for `read_images`.
    """
    if models.kind_of(model, shape.config) != "classes":
        raise ConfigError(
            f"task.name is {task.name}, but model.name_or_path {model.name_or_path} is a {type(shape).__name__}, which"
            " is no model of images alone: give a CLIP, SigLIP, ViT or DINOv2 model, for instance"
        )
    head = head_of(classes, shape)
    outputs = shape.config.num_labels
    if head == "classifier" and outputs != len(classes.names):
        raise ConfigError(
            f"task.head is classifier, but model.name_or_path {model.name_or_path} tells {outputs} classes apart and"
            f" the task has {len(classes.names)}: give a model of these classes, or train a new classifier"
            " (launch/train.py, task.train_head true)"
        )
    order = order_of(classes, head, shape, trained)
    processor = models.load_image_processor(model)
    layout = ImageLayout(
        preprocessing_of(processor.to_dict()), classes.crop_scale, classes.unreadable == "refuse", seed, workers
    )
    check_size(model, shape, layout.how.size)
    if head != "classifier":
        check_words(classes.names)
    tokenizer = None if head == "classifier" else models.load_tokenizer(model)
    prompts = None
    if tokenizer is not None:
        length = models.longest_sequence(shape) or 77
        prompts = prompts_of(classes, tokenizer, length, models.pools_last_position(shape.config))
    classes = replace(classes, outputs=order.outputs)
    return ImageReading(task, classes, head, layout, processor, tokenizer, prompts, order.remark)


def order_of(classes: Classes, head: Head, shape: PreTrainedModel, trained: tuple[str, ...] | None) -> ClassOrder:
    """Which outputs stand for the classes: a head made of their prompts has one for each, in their order."""
    if head == "text" or (head == "prototypes" and trained is None):
        return ClassOrder()
    known = models.class_names(shape.config) if trained is None else trained
    return ClassOrder() if classes.train_head and not known else class_order(classes.names, known)


def check_size(model: ModelConfig, shape: PreTrainedModel, size: tuple[int, int]) -> None:
    """Try it on the meta device: DINOv2 and BEiT interpolate their positions; CLIP, SigLIP, ViT and DeiT do not.

    Args:
        size: height and width of the pixels.

    Raises:
        ConfigError: the model takes no pixels of that size.
    """
    read: Any = shape.get_image_features if models.has_text_tower(shape.config) else shape
    try:
        read(pixel_values=torch.empty(1, 3, *size, dtype=shape.dtype, device=shape.device))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"model.name_or_path {model.name_or_path}: its preprocessor_config.json makes {size[0]} x {size[1]} pixels,"
            f" which {type(shape).__name__} does not take ({' '.join(str(error).split())[:200]}): set size and"
            " crop_size there to those of the model"
        ) from error


def refuse_text_settings(training: TrainingConfig) -> None:
    """
    Raises:
        ConfigError: a setting asks for what only texts have.
    """
    asked = {"packing": training.packing, "group_by_length": training.group_by_length}
    asked["max_length"] = training.max_length is not None
    for key, is_asked in asked.items():
        if is_asked:
            raise ConfigError(f"training.{key} is {getattr(training, key)}, but the task is about images: leave it out")
