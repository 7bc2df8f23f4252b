"""The cascade in `transformers.Trainer`, and in TRL's trainers, which are built on it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import SchedulerType, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorasc_ds.algorithm.plan import DECAYS
from lorasc_ds.errors import ConfigError
from lorasc_ds.plugin import PROBE_ROWS, Cascade


class CascadeCallback(TrainerCallback):
    """Turns a `transformers.Trainer` or TRL `SFTTrainer` run with PEFT's LoRA into a cascade.

    Plain, DDP and ZeRO-1 to 3. The Trainer's schedule gives way to the method's, with the Trainer's learning rate,
    decay and warm-up. A checkpoint of the Trainer, which has the pairs alone, is made whole by `lorasc/` inside it, and
    a run resumes from one in its own `output_dir`. At the end the merged model is in `output_dir/merged`; the pairs
    are zero then, and so is what `Trainer.save_model` would write.

    Args:
        probe: see `Cascade`; None: the first rows of the training data.
        settings: of `Cascade`, except for what the Trainer knows: model, optimizer, steps, epochs, seed, warm-up.

    Raises:
        ConfigError: when training begins; see `Cascade`.
    """

    def __init__(self, *, probe: dict[str, Tensor] | None = None, **settings: Any) -> None:
        self.probe = probe
        self.settings = settings
        self.cascade: Cascade | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Build the cascade on the prepared model; resume it where the Trainer has resumed."""
        if args.load_best_model_at_end:
            raise ConfigError(
                "load_best_model_at_end would load the pairs of one expert onto the weights of another: set it to False"
            )
        settings: dict[str, Any] = {"schedule": decay_of(args, parts["lr_scheduler"])} | self.settings
        if settings["schedule"] not in DECAYS:
            raise ConfigError(
                f"lr_scheduler_type is {settings['schedule']}: take {', '.join(DECAYS)}, or give CascadeCallback a"
                " schedule"
            )
        rows = min(PROBE_ROWS, args.per_device_train_batch_size)  # not more memory than a training step
        self.cascade = Cascade(
            parts["model"],
            parts["optimizer"],
            steps=state.max_steps,
            epochs=args.num_train_epochs if args.max_steps <= 0 else None,
            probe=self.probe if self.probe is not None else first_rows(parts["train_dataloader"], rows),
            directory=output_dir(args),
            seed=args.seed,
            warmup_steps=args.get_warmup_steps(state.max_steps),
            **settings,
        )
        if state.global_step > 0:
            self.cascade.resume(checkpoint(args, state) / "lorasc", state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Open an expert, where one begins, and set the learning rates of the step."""
        assert self.cascade is not None
        self.cascade.open(state.global_step)
        factor = self.cascade.learning_rate_factor(state.global_step)
        scheduler: LambdaLR = parts["lr_scheduler"]
        rates = [rate * factor for rate in scheduler.base_lrs]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates  # what the Trainer logs

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close an expert, where one ends: before the Trainer evaluates or saves."""
        assert self.cascade is not None
        self.cascade.close(state.global_step - 1)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Make the checkpoint whole."""
        assert self.cascade is not None
        self.cascade.save(checkpoint(args, state) / "lorasc")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Close what is open, where the run ended early, and write the merged model."""
        assert self.cascade is not None
        self.cascade.finish(state.global_step - 1)
        merged = output_dir(args) / "merged"
        if state.is_world_process_zero and (merged / "config.json").is_file():
            shutil.rmtree(merged)  # an earlier run's
        self.cascade.save_pretrained(merged, parts.get("processing_class"))


def decay_of(args: TrainingArguments, scheduler: Any) -> str:
    """What the Trainer was asked for, in the words of `Cascade`.

    Raises:
        ConfigError: the schedule is not the Trainer's own, so that its rates would be lost without a word.
    """
    if type(scheduler) is not LambdaLR:
        raise ConfigError(
            f"the Trainer's schedule is a {type(scheduler).__name__}: take an lr_scheduler_type like linear, and no"
            " scheduler in the DeepSpeed settings"
        )
    decay = SchedulerType(args.lr_scheduler_type).value
    return "constant" if decay == "constant_with_warmup" else decay


def output_dir(args: TrainingArguments) -> Path:
    """Where the Trainer writes; it has a default."""
    assert args.output_dir is not None
    return Path(args.output_dir)


def checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer keeps what it saved at this step."""
    return output_dir(args) / f"checkpoint-{state.global_step}"


def first_rows(loader: Any, rows: int) -> dict[str, Tensor]:
    """A batch of the first training rows, made without touching the loader's order.

    Raises:
        ConfigError: the data are a stream.
    """
    if isinstance(loader.dataset, IterableDataset):
        raise ConfigError(
            "the training data are a stream, whose rows cannot be read twice: give CascadeCallback a probe"
        )
    with torch.random.fork_rng(devices=[]):  # a collator may draw
        return loader.collate_fn([loader.dataset[row] for row in range(min(rows, len(loader.dataset)))])
