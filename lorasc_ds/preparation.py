"""Everything that is known and checked before a weight is loaded: data, shapes, steps, derived numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from lorasc_ds import models
from lorasc_ds.adapters import AdaptedWeight, attach
from lorasc_ds.algorithm.plan import Expert, Plan, Schedule, compressed_warmup
from lorasc_ds.config import Config, ModelConfig, TrainingConfig
from lorasc_ds.data import TrainingData
from lorasc_ds.errors import ConfigError
from lorasc_ds.image_reading import ImageReading, read_images, with_labels
from lorasc_ds.kernels.lean import is_lean, make_lean
from lorasc_ds.method import Method, make_method, make_plan, make_schedule, unused_settings
from lorasc_ds.tasks import Task, load_task
from lorasc_ds.text_reading import TextReading, read_text, refuse_unseen

Reading = TextReading | ImageReading

AUTO_SHARE = 0.08
AUTO_LEAST = 32


@dataclass(frozen=True, slots=True)
class Preparation:
    """A checked run.

    Args:
        model: what is loaded: `config.model`, with as many outputs as a classifier that is trained has classes.
        shape: the adapted model on the meta device; `weights` are its adapted weights.
        network: what an engine would be given of it.
        reading: the task's examples as the model reads them.
        method: what a boundary does.
        auto_examples: how many dev examples a boundary looks at to choose α or λ; 0 where neither is auto.
        evaluation_steps: after how many optimizer steps every split is scored.
        selection_steps: of them, the ends of epochs, which `training.select` chooses from: the same for every strategy.
    """

    config: Config
    model: ModelConfig
    shape: PreTrainedModel
    network: nn.Module
    weights: list[AdaptedWeight]
    task: Task
    reading: Reading
    data: TrainingData
    plan: Plan
    schedule: Schedule
    method: Method
    auto_examples: int
    evaluation_steps: frozenset[int]
    selection_steps: frozenset[int]

    @property
    def splits(self) -> Mapping[str, Sequence[Any]]:
        """The task's examples as they are read."""
        return self.reading.splits

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
        method, dev = self.method, len(self.splits.get("dev", ()))
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
        trained, frozen = (
            sum(p.numel() for p in self.network.parameters() if p.requires_grad is r) for r in (True, False)
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
            f"task      {self.task.name}: {sizes}; {self.reading.in_words()}",
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
        lines += [f"stream    {line}" for line in self.reading.stream()]
        lines += [f"protocol  {line}" for line in self.task.notes]
        lines += [f"note      {line}" for line in self.reading.notes()]
        if self.config.model.dtype != "float32" and not is_lean(self.shape):
            lines.append(
                f"note      the MLPs of {type(self.shape).__name__} are not gated as Llama's: they keep all that they"
                " were written to keep for the backward pass"
            )
        unused = unused_settings(cascade)
        if unused:
            lines.append(f"note      strategy {cascade.strategy} does not use {' and '.join(unused)}")
        return lines


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


def prepare(config: Config, rank: int = 0, world_size: int = 1) -> Preparation:
    """Read the data, lay the model out on the meta device and plan the steps.

    Args:
        rank, world_size: which process this is, of how many.

    Raises:
        ConfigError, DataError: in one line.
    """
    training = config.training
    micro = micro_batch_size(training, world_size)
    task = load_task(config.task, training.seed)
    model = with_labels(config.model, task)
    shape = models.load_shape(model)
    reading: Reading = read_text(config, task, shape) if task.classes is None else read_images(config, task, shape)
    weights = attach_adapters(config, shape)
    if isinstance(reading, TextReading):
        refuse_unseen(reading.encoder, shape, weights)
    if isinstance(reading, ImageReading):
        check_all_train(reading, weights)
    network = reading.network(shape)
    if training.batch_size > len(reading.splits["train"]):
        raise ConfigError(
            f"training.batch_size is {training.batch_size}, but there are only {len(reading.splits['train'])} training"
            " examples: lower it"
        )
    data = reading.training_data(training, micro, rank, world_size)
    if training.max_steps is None:
        steps = math.ceil(round(training.epochs * data.steps_per_epoch, 6))  # 0.1 * 30 is a little over 3
        plan = make_plan(config.cascade, steps, training.epochs)
    else:
        plan = make_plan(config.cascade, training.max_steps, training.max_steps / data.steps_per_epoch)
    schedule = make_schedule(
        config.cascade, plan, decay=training.schedule, span=training.schedule_span, warmup_steps=training.warmup_steps
    )
    method = make_method(config.cascade)
    if "dev" not in reading.splits:
        check_nothing_selected(training, method)
    epoch_ends = frozenset([*range(data.steps_per_epoch, plan.steps, data.steps_per_epoch), plan.steps])
    return Preparation(
        config=config,
        model=model,
        shape=shape,
        network=network,
        weights=weights,
        task=task,
        reading=reading,
        data=data,
        plan=plan,
        schedule=schedule,
        method=method,
        auto_examples=auto_examples(config, plan, method, len(reading.splits.get("dev", ()))),
        evaluation_steps=evaluation_steps(config, plan, epoch_ends),
        selection_steps=epoch_ends,
    )


def check_nothing_selected(training: TrainingConfig, method: Method) -> None:
    """
    Raises:
        ConfigError: a setting needs a dev split, which is not there.
    """
    asked = {
        "training.select best_dev": training.select == "best_dev",
        f"training.early_stopping_patience {training.early_stopping_patience}": (
            training.early_stopping_patience is not None
        ),
        "cascade.slow_retention or noise_intensity auto": bool(method.candidates),
    }
    for key, is_asked in asked.items():
        if is_asked:
            raise ConfigError(
                f"{key} needs the dev loss, but task.dev_examples is 0: hold some examples out, or leave it out"
            )


def check_all_train(reading: ImageReading, weights: Sequence[AdaptedWeight]) -> None:
    """
    Raises:
        ConfigError: a pair is on a text tower that no training step asks.
    """
    asleep = [one.name for one in weights if one.name.startswith("text_")] if reading.head == "prototypes" else []
    if asleep:
        raise ConfigError(
            f"adapter.target_modules matches {asleep[0]}, but task.head prototypes are made once, so that no text is"
            " read in training: name the other tower's, as in vision_model.*.q_proj, or take task.head text"
        )


def attach_adapters(config: Config, model: PreTrainedModel) -> list[AdaptedWeight]:
    """Put the configured pairs on a model, and lean layers into it; see `adapters.attach` and `make_lean`."""
    adapter = config.adapter
    weights = attach(
        model,
        method=adapter.method,
        rank=adapter.rank,
        lora_alpha=adapter.lora_alpha,
        use_rslora=adapter.use_rslora,
        dropout=adapter.dropout,
        target_modules=adapter.target_modules,
    )
    make_lean(model)
    return weights
