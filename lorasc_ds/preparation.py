"""Everything that is known and checked before a weight is loaded: data, shapes, steps, derived numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from lorasc_ds import models
from lorasc_ds.adapters import AdaptedWeight, attach
from lorasc_ds.algorithm.plan import Expert, Plan, Schedule, compressed_warmup
from lorasc_ds.config import Config, TrainingConfig
from lorasc_ds.data import Layout, TrainingSequences
from lorasc_ds.encoded import EncodedExample, digest_of
from lorasc_ds.encoding import Encoder
from lorasc_ds.errors import ConfigError
from lorasc_ds.method import Method, make_method, make_plan, make_schedule, unused_settings
from lorasc_ds.order import Order, Source, sources_of
from lorasc_ds.processing import processor_of
from lorasc_ds.streaming import EncodedStream, looked_at
from lorasc_ds.task_config import TextConfig
from lorasc_ds.tasks import Task, load_task

AUTO_SHARE = 0.08
AUTO_LEAST = 32


@dataclass(frozen=True, slots=True)
class Preparation:
    """A checked run.

    Args:
        shape: the adapted model on the meta device; `weights` are its adapted weights.
        splits: the task's examples as tokens.
        method: what a boundary does.
        auto_examples: how many dev examples a boundary looks at to choose α or λ; 0 where neither is auto.
        evaluation_steps: after how many optimizer steps every split is scored.
        selection_steps: of them, the ends of epochs, which `training.select` chooses from: the same for every strategy.
        unreadable: rows that are left out for their images, a line each.
        processor: of a vision-language model, which ships with it.
    """

    config: Config
    tokenizer: PreTrainedTokenizerBase
    shape: PreTrainedModel
    weights: list[AdaptedWeight]
    task: Task
    splits: dict[str, Sequence[EncodedExample]]
    data: TrainingSequences
    plan: Plan
    schedule: Schedule
    method: Method
    auto_examples: int
    evaluation_steps: frozenset[int]
    selection_steps: frozenset[int]
    truncated: int
    shots_left_out: int
    left_out: int
    unreadable: tuple[str, ...]
    processor: ProcessorMixin | None

    @property
    def data_sha256(self) -> dict[str, str]:
        """Digest of the tokens of every split, in their order."""
        return {
            split: examples.sha256 if isinstance(examples, EncodedStream) else digest_of(examples)
            for split, examples in self.splits.items()
        }

    @property
    def accumulation(self) -> int:
        """Micro batches of a process in a full global batch."""
        return self.data.batch_size // (self.data.micro_batch_size * self.data.world_size)

    def learning_rate(self, expert: Expert, step: int) -> float:
        """Of optimizer step `step` of the run, which lies in `expert`."""
        return self.config.training.learning_rate * self.schedule.factor(self.plan, expert, step)

    @property
    def loraplus_lr_ratio(self) -> float:
        """The learning rate of `B` over that of `A`; 1 for all methods but LoRA+."""
        adapter = self.config.adapter
        return adapter.loraplus_lr_ratio if adapter.method == "lora+" else 1.0

    def asked(self, key: Literal["slow_retention", "noise_intensity"]) -> float | str:
        """α or λ as the strategy uses it: a number, 0 where it does not, or `auto`."""
        values = getattr(self.method, key)
        return values[0] if len(values) == 1 else "auto"

    def cascade_numbers(self) -> Iterator[str]:
        """What a boundary does, in words."""
        method, dev = self.method, len(self.splits["dev"])
        for name, values in (("slow retention", method.slow_retention), ("noise intensity", method.noise_intensity)):
            yield f"{name} {' or '.join(f'{value:g}' for value in values)}"
        if method.noise == "once":
            yield f"once on {method.noise_on} matrices"
        if method.pruning is not None:
            share = "all" if method.pruning.method == "full" else f"{method.pruning.fraction:.2%}"
            yield f"{share} of the moments pruned ({method.pruning.method})"
        if method.candidates:
            yield f"chosen by the loss on {self.auto_examples} of {dev} dev examples at every boundary"

    def derived_numbers(self) -> list[str]:
        """What follows from the configuration, a line each."""
        training, cascade, plan = self.config.training, self.config.cascade, self.plan
        sizes = ", ".join(f"{len(examples)} {split}" for split, examples in self.splits.items())
        lengths = [len(c.ids) for examples in self.splits.values() for e in looked_at(examples) for c in e.candidates]
        trained, frozen = (
            sum(p.numel() for p in self.shape.parameters() if p.requires_grad is r) for r in (True, False)
        )
        first, max_steps = plan.expert(1), training.max_steps
        experts = (
            "1 expert" if plan.experts == 1 else f"{plan.experts} experts of about {plan.steps / plan.experts:g} steps"
        )
        restarted = {"run": "over the whole run", "expert": "once per expert", "jagged": "over the whole run, jagged"}
        epochs = training.epochs if max_steps is None else plan.steps / self.data.steps_per_epoch
        asked = "" if max_steps is None else f" (training.max_steps; epochs {training.epochs:g} is not used)"
        restarts = self.schedule.span == "expert"
        warmup = compressed_warmup(training.warmup_steps, first.steps if restarts else plan.steps, plan.steps)
        jagged = self.schedule.span == "jagged" and plan.experts > 1
        lines = [
            f"task      {self.task.name}: {sizes}; sequences of {min(lengths)} to {max(lengths)} tokens,"
            f" {self.truncated} truncated; padded with token {self.data.layout.pad_id}, masked by length",
            f"model     {self.config.model.name_or_path}, {self.config.model.dtype}: {frozen:,} frozen parameters",
            f"adapter   {self.config.adapter.method}, rank {self.config.adapter.rank}, s = {self.weights[0].scaling:g}:"
            f" {len(self.weights)} weights, {trained:,} trainable parameters",
            f"batch     {training.batch_size} = {self.data.micro_batch_size} micro x {self.data.world_size}"
            f" {'process' if self.data.world_size == 1 else 'processes'} x {self.accumulation} accumulation",
            f"steps     {plan.steps} = {epochs:.4g} epochs x {self.data.steps_per_epoch}{asked}; {experts}",
            f"cascade   strategy {cascade.strategy}: {', '.join(self.cascade_numbers())}",
            f"schedule  {self.schedule.decay} from {training.learning_rate:g}, {restarted[self.schedule.span]},"
            f" {warmup} warm-up steps"
            + (f", {self.schedule.rewarmup(plan.expert(2))} after a restart" if jagged else ""),
        ]
        if training.early_stopping_patience is not None:
            lines.append(f"stopping  after {training.early_stopping_patience} epochs without a new lowest dev loss")
        if self.data.order.sources:
            shares = (f"{one.share / self.data.order.count:.1%} {one}" for one in self.data.order.sources)
            lines.append(f"sources   {'; '.join(shares)} examples")
        if isinstance(self.data.examples, EncodedStream):
            lines.append(f"stream    {self.data.examples.about()}")
        lines += [f"protocol  {line}" for line in self.task.notes]
        if self.shots_left_out:
            lines.append(f"note      {self.shots_left_out} demonstrations are left out of prompts that were too long")
        if self.left_out:
            lines.append(
                f"note      {self.left_out} rows are left out: cut to length, nothing of them is scored; raise"
                " training.max_length"
            )
        lines += [f"note      {line}" for line in self.unreadable]
        lines += [f"note      {line}" for line in repeated(self.splits)]
        unused = unused_settings(cascade)
        if unused:
            lines.append(f"note      strategy {cascade.strategy} does not use {' and '.join(unused)}")
        return lines


def repeated(splits: dict[str, Sequence[EncodedExample]]) -> Iterator[str]:
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


def evaluation_steps(config: Config, plan: Plan, epoch_ends: frozenset[int]) -> frozenset[int]:
    if config.training.evaluate == "end":
        return frozenset([plan.steps])
    few_experts = plan.experts <= len(epoch_ends)
    return epoch_ends | ({expert.stop for expert in plan} if few_experts else set())


def auto_examples(config: Config, plan: Plan, method: Method, dev_examples: int) -> int:
    """Dev examples on which every candidate is tried at a boundary.

    By default so many that they cost `AUTO_SHARE` of an expert's training, a forward pass each, where a training
    example takes a forward and a backward pass, three times as much; but not so few that chance decides.
    """
    if not method.candidates:
        return 0
    trained = config.training.batch_size * plan.steps / plan.experts
    affordable = max(AUTO_LEAST, int(AUTO_SHARE * 3 * trained / method.candidates))
    return min(dev_examples, config.cascade.auto_examples or affordable)


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
    return Layout(encoder.pad_id, training.share_prefixes and able, training.packing, pixels)


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


def micro_batch_size(training: TrainingConfig, world_size: int) -> int:
    """Examples per forward pass of a process.

    Raises:
        ConfigError: the global batch cannot be shared out evenly.
    """
    micro = training.micro_batch_size or max(1, training.batch_size // world_size)
    if training.batch_size % (micro * world_size):
        raise ConfigError(
            f"training.batch_size is {training.batch_size}, not a multiple of {world_size} processes x {micro} examples"
            " (training.micro_batch_size): change one so that every process has the same share"
        )
    return micro


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


def prepare(config: Config, rank: int = 0, world_size: int = 1) -> Preparation:
    """Read the data, tokenise it, lay the model out on the meta device and plan the steps.

    Args:
        rank, world_size: which process this is, of how many.

    Raises:
        ConfigError, DataError: in one line.
    """
    micro = micro_batch_size(config.training, world_size)
    task = load_task(config.task, config.training.seed)
    tokenizer = models.load_tokenizer(config.model)
    shape = models.load_shape(config.model)
    encoder = make_encoder(config, task, tokenizer, shape)
    weights = attach_adapters(config, shape)
    splits = encoder.encode()
    training = config.training
    if training.batch_size > len(splits["train"]):
        raise ConfigError(
            f"training.batch_size is {training.batch_size}, but there are only {len(splits['train'])} training"
            " examples: lower it"
        )
    data = TrainingSequences(
        splits["train"],
        order=order_of(splits["train"], task, training),
        loss=task.loss,
        micro_batch_size=micro,
        layout=layout_of(training, shape, encoder),
        rank=rank,
        world_size=world_size,
    )
    if training.max_steps is None:
        steps = math.ceil(round(training.epochs * data.steps_per_epoch, 6))  # 0.1 * 30 is a little over 3
        plan = make_plan(config.cascade, steps, training.epochs)
    else:
        plan = make_plan(config.cascade, training.max_steps, training.max_steps / data.steps_per_epoch)
    schedule = make_schedule(
        config.cascade, plan, decay=training.schedule, span=training.schedule_span, warmup_steps=training.warmup_steps
    )
    method = make_method(config.cascade)
    epoch_ends = frozenset([*range(data.steps_per_epoch, plan.steps, data.steps_per_epoch), plan.steps])
    return Preparation(
        config=config,
        tokenizer=tokenizer,
        shape=shape,
        weights=weights,
        task=task,
        splits=splits,
        data=data,
        plan=plan,
        schedule=schedule,
        method=method,
        auto_examples=auto_examples(config, plan, method, len(splits["dev"])),
        evaluation_steps=evaluation_steps(config, plan, epoch_ends),
        selection_steps=epoch_ends,
        truncated=encoder.truncated,
        shots_left_out=encoder.shots_left_out,
        left_out=encoder.left_out,
        unreadable=encoder.unreadable_lines(),
        processor=None if encoder.processor is None else encoder.processor.processor,
    )


def attach_adapters(config: Config, model: PreTrainedModel) -> list[AdaptedWeight]:
    """Put the configured pairs on a model; see `adapters.attach`."""
    adapter = config.adapter
    return attach(
        model,
        method=adapter.method,
        rank=adapter.rank,
        lora_alpha=adapter.lora_alpha,
        use_rslora=adapter.use_rslora,
        dropout=adapter.dropout,
        target_modules=adapter.target_modules,
    )
