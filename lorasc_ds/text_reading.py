"""A task of texts as a language model reads it: tokens, laid out in rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorasc_ds import models
from lorasc_ds.adapters import AdaptedWeight
from lorasc_ds.config import Config, TrainingConfig
from lorasc_ds.data import Batch, TrainingSequences, batch_for
from lorasc_ds.encoded import EncodedExample, digest_of
from lorasc_ds.encoding import Encoder
from lorasc_ds.errors import ConfigError
from lorasc_ds.layout import Layout
from lorasc_ds.order import Order, Source, sources_of
from lorasc_ds.processing import processor_of
from lorasc_ds.streaming import EncodedStream, looked_at
from lorasc_ds.task_config import TextConfig
from lorasc_ds.tasks import Task


@dataclass(frozen=True, slots=True)
class TextReading:
    """A task as tokens.

    Args:
        encoder: made them, and knows what was cut.
        splits: the task's examples.
    """

    encoder: Encoder
    splits: Mapping[str, Sequence[EncodedExample]]
    layout: Layout

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.encoder.tokenizer

    @property
    def data_sha256(self) -> dict[str, str]:
        """Digest of the tokens of every split, in their order."""
        return {
            split: examples.sha256 if isinstance(examples, EncodedStream) else digest_of(examples)
            for split, examples in self.splits.items()
        }

    def training_data(
        self, training: TrainingConfig, micro_batch_size: int, rank: int, world_size: int
    ) -> TrainingSequences:
        return TrainingSequences(
            self.splits["train"],
            order=order_of(self.splits["train"], self.encoder.task, training),
            loss=self.encoder.task.loss,
            micro_batch_size=micro_batch_size,
            layout=self.layout,
            rank=rank,
            world_size=world_size,
        )

    def probe(self, split: str, examples: int, tokens: int) -> Batch:
        """The first examples of a split, and of their scored tokens the last ones."""
        scored = (example for example in self.splits[split] if example.target.scored)
        return batch_for(self.encoder.task.loss, list(islice(scored, examples)), self.layout).last_scored(tokens)

    workers: ClassVar[int] = 0

    @property
    def saved(self) -> list[Any]:
        """What belongs in the folder of a model."""
        return [self.tokenizer if self.encoder.processor is None else self.encoder.processor.processor]

    def network(self, model: PreTrainedModel) -> PreTrainedModel:
        """What an engine is given."""
        return model

    def in_words(self) -> str:
        lengths = [len(c.ids) for examples in self.splits.values() for e in looked_at(examples) for c in e.candidates]
        return f"sequences of {min(lengths)} to {max(lengths)} tokens, {self.encoder.truncated} truncated; " + (
            "those of a pass in one row" if self.layout.flat else f"padded with token {self.layout.pad_id}, masked"
        )

    def stream(self) -> Iterator[str]:
        """What is read when it is needed, in words."""
        if isinstance(self.splits["train"], EncodedStream):
            yield self.splits["train"].about()

    def notes(self) -> Iterator[str]:
        """What a user may not expect of the data."""
        yield from self.losses()
        yield from repeated(self.splits)

    def losses(self) -> Iterator[str]:
        """What the limit cost, and images that cannot be decoded, a line each."""
        if self.encoder.left_out:
            yield f"{self.encoder.left_out} rows are left out: cut to length, nothing of them is scored"
        if self.encoder.truncated:
            yield f"{self.encoder.truncated} sequences were too long and are cut"
        if self.encoder.shots_left_out:
            yield f"{self.encoder.shots_left_out} demonstrations are left out of prompts that were too long"
        yield from self.encoder.unreadable_lines()


def read_text(config: Config, task: Task, shape: PreTrainedModel) -> TextReading:
    """
    Raises:
        ConfigError, DataError: in one line.
    """
    encoder = make_encoder(config, task, models.load_tokenizer(config.model), shape)
    return TextReading(encoder, encoder.encode(), layout_of(config.training, shape, encoder))


def make_encoder(config: Config, task: Task, tokenizer: PreTrainedTokenizerBase, shape: PreTrainedModel) -> Encoder:
    """What makes tokens of the task for this model."""
    return Encoder(
        tokenizer,
        task,
        max_length=config.training.max_length,
        model_limit=models.longest_sequence(shape),
        vocabulary_size=models.vocabulary_size(shape),
        block_size=config.task.block_size if isinstance(config.task, TextConfig) else None,
        processor=processor_of(config.model, shape),
    )


def refuse_unseen(encoder: Encoder, shape: PreTrainedModel, weights: Sequence[AdaptedWeight]) -> None:
    """
    Raises:
        ConfigError: all adapted weights are for images, and there are none.
    """
    read = {id(parameter) for parameter in shape.get_decoder().parameters()}
    if encoder.processor is not None and encoder.pixels is None and not any(id(one.weight) in read for one in weights):
        raise ConfigError(
            f"adapter.target_modules: {weights[0].name} and the others are for images, and the rows of task"
            f" {encoder.task.name} have none: name layers of the language model too, or give the rows images"
            " (task.use_images)"
        )


def repeated(splits: Mapping[str, Sequence[EncodedExample]]) -> Iterator[str]:
    """What stands in the training examples twice, or in another split too, token for token."""
    seen = looked_at(splits["train"])
    train = {same_as(example) for example in seen}
    twice = len(seen) - len(train)
    if twice:
        yield f"{twice} of {len(seen)} training examples are repetitions of others"
    for split, examples in splits.items():
        if split == "train":  # of a stream not to be read whole
            continue
        known = sum(bool(example.candidates) and same_as(example) in train for example in examples)
        if known:
            yield f"{known} of {len(examples)} examples of {split} are training examples too: its score is no test"


def same_as(example: EncodedExample) -> tuple[tuple[int, ...], str]:
    """What examples that repeat each other have in common: tokens and images."""
    return example.target.ids, "" if example.visuals is None else example.visuals.sha256


def layout_of(training: TrainingConfig, shape: PreTrainedModel, encoder: Encoder) -> Layout:
    """
    Raises:
        ConfigError: rows cannot be packed for this model, or with images in them.
    """
    pixels = encoder.pixels
    if training.packing and pixels is not None:
        raise ConfigError(
            f"training.packing is true, but the rows of task {encoder.task.name} have images, which stand in rows of"
            " their own: set it false"
        )
    able = pixels is None and models.takes_attention_bias(shape)
    if training.packing and not able:
        raise ConfigError(
            f"training.packing is true, but {type(shape).__name__} has layers that do not attend to all that stands"
            " before, so that sequences in one row would see each other: set it false"
        )
    flat = training.packing is not False and able and models.takes_sequences(shape)
    return Layout(encoder.pad_id, training.share_prefixes and able, bool(training.packing), flat, pixels)


def order_of(examples: Sequence[EncodedExample], task: Task, training: TrainingConfig) -> Order:
    """How the examples of every epoch follow one another.

    Raises:
        ConfigError: a source has no share.
    """
    sources: tuple[Source, ...] = ()
    lengths = None
    if task.weights is not None:
        streamed = isinstance(examples, EncodedStream)
        sources = sources_of(examples.groups if streamed else [e.group for e in examples], task.weights)
    if training.group_by_length and isinstance(examples, EncodedStream):
        lengths = torch.from_numpy(examples.lengths)
    elif training.group_by_length:
        scored = [(e.target,) if task.loss == "lm" else e.candidates for e in examples]
        lengths = torch.tensor([max(len(tokens.ids) for tokens in candidates) for candidates in scored])
    return Order(len(examples), training.seed, training.batch_size, sources, lengths)
