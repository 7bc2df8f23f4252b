"""Everything that is known and checked before a weight is loaded: data, shapes, steps, derived numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorasc_ds import models
from lorasc_ds.adapters import AdaptedWeight, attach
from lorasc_ds.algorithm.plan import Expert, Plan, compressed_warmup, learning_rate_factor
from lorasc_ds.config import STRATEGIES, Config, TextConfig, TrainingConfig
from lorasc_ds.data import TrainingData
from lorasc_ds.encoding import EncodedExample, Encoder
from lorasc_ds.errors import ConfigError
from lorasc_ds.tasks import Task, load_task


@dataclass(frozen=True, slots=True)
class Preparation:
    """A checked run.

    Args:
        shape: the adapted model on the meta device; `weights` are its adapted weights.
        splits: the task's examples as tokens.
        slow_retention, noise_intensity: α and λ as the strategy uses them, 0 where it does not.
        evaluation_steps: after how many optimizer steps every split is scored.
        selection_steps: of them, the ends of epochs, which `training.select` chooses from: the same for every strategy.
    """

    config: Config
    tokenizer: PreTrainedTokenizerBase
    shape: PreTrainedModel
    weights: list[AdaptedWeight]
    task: Task
    splits: dict[str, list[EncodedExample]]
    data: TrainingData
    plan: Plan
    slow_retention: float
    noise_intensity: float
    evaluation_steps: frozenset[int]
    selection_steps: frozenset[int]
    truncated: int

    @property
    def accumulation(self) -> int:
        """Micro batches of a process in a full global batch."""
        return self.data.batch_size // (self.data.micro_batch_size * self.data.world_size)

    def learning_rate(self, expert: Expert, step: int) -> float:
        """Of optimizer step `step` of the run, which lies in `expert`."""
        training = self.config.training
        whole_run = training.schedule_span == "run"
        steps = self.plan.steps if whole_run else expert.steps
        warmup = compressed_warmup(training.warmup_steps, steps, self.plan.steps)
        done = step if whole_run else step - expert.start
        return training.learning_rate * learning_rate_factor(training.schedule, done, steps, warmup)

    def derived_numbers(self) -> list[str]:
        """What follows from the configuration, a line each."""
        training, cascade, plan = self.config.training, self.config.cascade, self.plan
        sizes = ", ".join(f"{len(examples)} {split}" for split, examples in self.splits.items())
        lengths = [len(c.ids) for examples in self.splits.values() for e in examples for c in e.candidates]
        trained = sum(one.A.numel() + one.B.numel() for one in self.weights)
        frozen = sum(p.numel() for p in self.shape.parameters() if not p.requires_grad)
        first = plan.expert(1)
        experts = (
            "1 expert" if plan.experts == 1 else f"{plan.experts} experts of about {plan.steps / plan.experts:g} steps"
        )
        span = "over the whole run" if training.schedule_span == "run" else "once per expert"
        warmup = compressed_warmup(
            training.warmup_steps, plan.steps if training.schedule_span == "run" else first.steps, plan.steps
        )
        lines = [
            f"task      {self.task.name}: {sizes}; sequences of {min(lengths)} to {max(lengths)} tokens,"
            f" {self.truncated} truncated; padded with token {self.data.pad_id}, masked by length",
            f"model     {self.config.model.name_or_path}, {self.config.model.dtype}: {frozen:,} frozen parameters",
            f"adapter   {self.config.adapter.method}, rank {self.config.adapter.rank}, s = {self.weights[0].scaling:g}:"
            f" {len(self.weights)} weights, {trained:,} trainable parameters",
            f"batch     {training.batch_size} = {self.data.micro_batch_size} micro x {self.data.world_size}"
            f" {'process' if self.data.world_size == 1 else 'processes'} x {self.accumulation} accumulation",
            f"steps     {plan.steps} = {training.epochs:g} epochs x {self.data.steps_per_epoch}; {experts}",
            f"cascade   strategy {cascade.strategy}: slow retention {self.slow_retention:g},"
            f" noise intensity {self.noise_intensity:g}",
            f"schedule  {training.schedule} from {training.learning_rate:g}, {span}, {warmup} warm-up steps",
        ]
        unused = [
            f"cascade.{key} {value:g}"
            for key, value, used in (
                ("slow_retention", cascade.slow_retention, STRATEGIES[cascade.strategy].averages),
                ("noise_intensity", cascade.noise_intensity, STRATEGIES[cascade.strategy].noises),
            )
            if not used and value
        ]
        if unused:
            lines.append(f"note      strategy {cascade.strategy} does not use {' and '.join(unused)}")
        return lines


def make_plan(config: Config, steps_per_epoch: int) -> Plan:
    """Experts over optimizer steps; by default one per epoch.

    Raises:
        ConfigError: more experts than steps.
    """
    steps = math.ceil(round(config.training.epochs * steps_per_epoch, 6))  # 0.1 * 30 is a little over 3
    one_per_epoch = math.ceil(config.training.epochs) if STRATEGIES[config.cascade.strategy].many_experts else 1
    experts = config.cascade.experts or one_per_epoch
    if experts > steps:
        raise ConfigError(
            f"cascade.experts is {experts}, but {config.training.epochs:g} epochs of {steps_per_epoch} steps are only"
            f" {steps} optimizer steps: an expert needs at least one; lower experts or raise training.epochs"
        )
    if config.training.warmup_steps >= steps:
        raise ConfigError(
            f"training.warmup_steps is {config.training.warmup_steps}, but the run has only {steps} optimizer steps:"
            " lower it, or raise training.epochs"
        )
    return Plan(steps, experts)


def evaluation_steps(config: Config, plan: Plan, epoch_ends: frozenset[int]) -> frozenset[int]:
    if config.training.evaluate == "end":
        return frozenset([plan.steps])
    few_experts = plan.experts <= len(epoch_ends)
    return epoch_ends | ({expert.stop for expert in plan} if few_experts else set())


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
    encoder = Encoder(
        tokenizer,
        max_length=config.training.max_length,
        model_limit=models.longest_sequence(shape),
        vocabulary_size=models.vocabulary_size(shape),
        block_size=config.task.block_size if isinstance(config.task, TextConfig) else None,
    )
    weights = attach_adapters(config, shape)
    splits = encoder.encode(task)
    training = config.training
    if training.batch_size > len(splits["train"]):
        raise ConfigError(
            f"training.batch_size is {training.batch_size}, but there are only {len(splits['train'])} training"
            " examples: lower it"
        )
    data = TrainingData(
        splits["train"],
        loss=task.loss,
        batch_size=training.batch_size,
        micro_batch_size=micro,
        seed=training.seed,
        pad_id=encoder.pad_id,
        rank=rank,
        world_size=world_size,
    )
    plan = make_plan(config, data.steps_per_epoch)
    strategy = STRATEGIES[config.cascade.strategy]
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
        slow_retention=config.cascade.slow_retention if strategy.averages else 0.0,
        noise_intensity=config.cascade.noise_intensity if strategy.noises else 0.0,
        evaluation_steps=evaluation_steps(config, plan, epoch_ends),
        selection_steps=epoch_ends,
        truncated=encoder.truncated,
    )


def attach_adapters(config: Config, model: PreTrainedModel) -> list[AdaptedWeight]:
    """Put the configured pairs on a model; see `adapters.attach`."""
    adapter = config.adapter
    return attach(
        model,
        rank=adapter.rank,
        lora_alpha=adapter.lora_alpha,
        use_rslora=adapter.use_rslora,
        dropout=adapter.dropout,
        target_modules=adapter.target_modules,
    )
