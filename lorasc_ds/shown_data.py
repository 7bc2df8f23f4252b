"""A recipe's data as the model will see it: lengths, what is cut and scored, what padding costs, and examples.

No weight is loaded: the tokenizer and the model's configuration are enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from transformers import PreTrainedTokenizerBase

from lorasc_ds import models
from lorasc_ds.config import TrainingConfig
from lorasc_ds.data import TrainingSequences
from lorasc_ds.data_report import epoch_cost, length_table, split_lines, table
from lorasc_ds.encoded import EncodedExample
from lorasc_ds.errors import ConfigError
from lorasc_ds.image_reading import ImageReading, image_reading
from lorasc_ds.layout import Layout
from lorasc_ds.preparation import prepare
from lorasc_ds.preview import example_lines, image_lines
from lorasc_ds.show_data import ShownConfig
from lorasc_ds.task_config import Benchmark
from lorasc_ds.tasks import Task, load_task
from lorasc_ds.tasks.images import labels_of
from lorasc_ds.text_reading import layout_of, make_encoder, order_of, repeated


@dataclass(frozen=True, slots=True)
class Shown:
    """A task as tokens.

    Args:
        data: the batches that are trained on; None: the task is only evaluated.
        layouts: by `training.packing`, as far as the model can.
    """

    task: Task
    tokenizer: PreTrainedTokenizerBase
    splits: Mapping[str, Sequence[EncodedExample]]
    data: TrainingSequences | None
    layouts: Mapping[bool | None, Layout]
    training: TrainingConfig


def load(config: ShownConfig, processes: int) -> Shown | ImageReading:
    """
    Raises:
        ConfigError, DataError: in one line, as training would say it.
    """
    if isinstance(config.task, Benchmark):
        task, shape = load_task(config.task, config.training.seed), models.load_shape(config.model)
        if task.classes is not None:
            return image_reading(config.model, task, task.classes, shape, config.training.seed, 0)
        encoder = make_encoder(config, task, models.load_tokenizer(config.model), shape)
        return Shown(task, encoder.tokenizer, encoder.encode(), None, {}, config.training)
    run = prepare(config, world_size=processes)
    if isinstance(run.reading, ImageReading):
        return run.reading
    assert isinstance(run.data, TrainingSequences)
    training, encoder = config.training, run.reading.encoder
    packings = (None, False, True) if encoder.pixels is None and models.takes_attention_bias(run.shape) else (False,)
    layouts = {one: layout_of(training.model_copy(update={"packing": one}), run.shape, encoder) for one in packings}
    return Shown(run.task, run.reading.tokenizer, run.reading.splits, run.data, layouts, training)


def padding_lines(
    data: TrainingSequences, task: Task, training: TrainingConfig, layouts: Mapping[bool | None, Layout]
) -> Iterator[str]:
    """What the first epoch's batches cost as they are configured, and otherwise."""
    rows = [["packing", "group_by_length", "tokens", "computed", "efficiency", ""]]
    packing = training.packing if training.packing in layouts else False
    for pack, group in product(layouts, (False, True)):
        order = order_of(data.examples, task, training.model_copy(update={"group_by_length": group}))
        cost = epoch_cost(data, order(0).tolist(), layouts[pack])
        chosen = "configured" if (pack, group) == (packing, training.group_by_length) else ""
        numbers = f"{cost.valid:,}", f"{cost.computed:,}", f"{cost.valid / cost.computed:.1%}"
        rows.append(["auto" if pack is None else str(pack).lower(), str(group).lower(), *numbers, chosen])
    processes = "1 process" if data.world_size == 1 else f"{data.world_size} processes"
    yield (
        f"the first epoch, {data.steps_per_epoch} steps of {data.batch_size}, in micro batches of"
        f" {data.micro_batch_size} on {processes}: tokens that the model reads, and computes with padding"
    )
    yield from (f"  {line}" for line in table(rows, 2))


def report(shown: Shown | ImageReading, split: str | None, examples: int, full: bool) -> Iterator[str]:
    """
    Raises:
        ConfigError: the task has no such split.
    """
    split = split or next(iter(shown.splits))
    if split not in shown.splits:
        raise ConfigError(f"--split {split}: task {shown.task.name} has {', '.join(shown.splits)}")
    if isinstance(shown, ImageReading):
        yield from image_report(shown, split, examples)
        return
    task, splits = shown.task, shown.splits
    training = f", loss {task.loss}" if shown.data else ""
    yield f"task      {task.name}: {task.kind}{training}"
    yield from (f"protocol  {line}" for line in task.notes)
    if shown.data:
        yield from (f"note      {line}" for line in repeated(dict(splits)))
    yield ""
    yield from length_table(splits)
    # A split of documents is cut into blocks: how many documents there were says nothing about them.
    given = splits if task.kind == "documents" else task.splits
    yield from split_lines(splits, {name: len(given[name]) for name in splits})
    if shown.data:
        yield ""
        yield from padding_lines(shown.data, task, shown.training, shown.layouts)
    yield ""
    yield f"the first examples of {split}; what is scored stands between [[ and ]]"
    for example in splits[split][:examples]:
        yield from example_lines(shown.tokenizer, example, full=full)


def image_report(shown: ImageReading, split: str, examples: int) -> Iterator[str]:
    """Of every split how many images there are and of how many classes; the first images of one of them."""
    yield f"task      {shown.task.name}: {shown.task.kind}, {shown.in_words()}"
    yield from (f"protocol  {line}" for line in shown.task.notes)
    yield f"pixels    {shown.layout.how}"
    yield ""
    for name, images in shown.splits.items():
        counts = Counter(labels_of(images)).values()
        yield f"{name}: {len(images)} images of {len(counts)} classes, {min(counts)} to {max(counts)} of each"
    yield ""
    yield f"the first images of {split} and their classes"
    yield from image_lines(shown.splits[split], shown.classes, examples)
