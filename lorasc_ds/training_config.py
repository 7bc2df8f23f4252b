"""The settings of the training itself: batches, steps, rates, what is scored and kept. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lorasc_ds.section import Section


class TrainingConfig(Section):
    epochs: float = Field(default=5.0, gt=0, description="Passes over the training examples; fractions are allowed.")
    max_steps: int | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps of the run, in place of training.epochs, which then is not used; null: epochs.",
    )
    batch_size: int = Field(
        default=4, ge=1, description="Global batch: examples per optimizer step, over all processes and accumulation."
    )
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Examples per forward pass of a process; null: its whole share of the batch. Less memory; the same"
        " result up to rounding, except for dropout's masks.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in the backward pass: less memory, more time.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the model's layers for training (torch.compile): a tenth faster on a CPU, once they are"
        " compiled, which takes a minute or two. The same results up to rounding.",
    )
    data_workers: int | None = Field(
        default=None,
        ge=0,
        description="Processes that decode images ahead, for each process of the run; null: its share of the cores, at"
        " most 8. Texts need none.",
    )
    share_prefixes: bool = Field(
        default=True,
        description="Read what the candidates of a question begin with once; false, or with a model that cannot:"
        " candidate by candidate.",
    )
    packing: bool | None = Field(
        default=None,
        description="Put sequences into a row together instead of padding; none sees another. null: all of a pass into"
        " one row, where the model's attention can be told where each begins and their lengths differ.",
    )
    group_by_length: bool = Field(
        default=False,
        description="Put training sequences of like length into a batch, so that little is padded: every 50 shuffled"
        " batches are sorted, longest first. The batch with the longest is the first of an epoch.",
    )
    eval_batch_size: int = Field(default=16, ge=1, description="Sequences per forward pass of an evaluation.")
    learning_rate: float = Field(default=1e-4, gt=0, le=100, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay.")
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="Gradients are clipped to this norm; null: not clipped."
    )
    schedule: Literal["linear", "cosine", "constant"] | None = Field(
        default=None, description="Decay of the learning rate; null: cosine with strategy relora, else linear."
    )
    schedule_span: Literal["expert", "run", "jagged"] | None = Field(
        default=None,
        description="The schedule starts again, compressed, with every expert; or spans the whole run; or that, with"
        " a warm-up after every restart (cascade.rewarmup_steps). null: jagged with relora, run with lora, noisytune"
        " and cola, else expert.",
    )
    warmup_steps: int = Field(
        default=0,
        ge=0,
        description="Warm-up of the run in optimizer steps; compressed with the schedule into each expert.",
    )
    max_length: int | None = Field(
        default=None,
        ge=2,
        description="Longest sequence in tokens; longer ones keep their end. null: the model's limit, and longer is"
        " an error.",
    )
    seed: int = Field(default=0, ge=0, lt=2**64, description="Seed of everything: data, order, dropout, pairs, noise.")
    evaluate: Literal["epoch", "end"] = Field(
        default="epoch",
        description="Score every split before training and after every epoch (and every expert, where there are no more"
        " of them than epochs), or before and after only.",
    )
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        description="End the run after so many epochs without a new lowest dev loss; an open expert is closed there."
        " null: it goes on to its end.",
    )
    select: Literal["last", "best_dev"] = Field(
        default="last", description="What ships: the last weights, or those of the epoch with the lowest dev loss."
    )
    save_model: bool = Field(default=True, description="Write the merged model to `model/`.")
    checkpoint_steps: int | None = Field(
        default=100,
        ge=1,
        description="Optimizer steps between two checkpoints; null: none but where the run is asked to stop.",
    )
    checkpoints_kept: int = Field(default=2, ge=1, description="How many checkpoints stay; older ones are removed.")
    save_failures_allowed: int = Field(
        default=3,
        ge=0,
        description="Checkpoints that may fail one after the other, on a full disk for instance, before the run ends.",
    )
    non_finite: Literal["stop", "skip"] = Field(
        default="stop",
        description="A step whose loss or gradient is not finite is never taken: end the run, or leave the step out.",
    )
    max_skipped_steps: int = Field(
        default=10, ge=1, description="Steps that a run may leave out before it ends (non_finite skip)."
    )
    ddp_timeout: int = Field(
        default=1800, ge=1, description="Seconds that a process waits for the others before it gives up."
    )

    @model_validator(mode="after")
    def consistent(self) -> TrainingConfig:
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise ValueError(
                f"training.batch_size {self.batch_size} is not divisible by training.micro_batch_size {micro}:"
                " change one so that every forward pass has the same size"
            )
        if self.select == "best_dev" and self.evaluate == "end":
            raise ValueError(
                "training.select best_dev needs the dev loss of every epoch, but training.evaluate is end:"
                " take evaluate epoch, or select last"
            )
        if self.early_stopping_patience is not None and self.evaluate == "end":
            raise ValueError(
                f"training.early_stopping_patience {self.early_stopping_patience} needs every epoch's dev loss, but"
                " training.evaluate is end: take evaluate epoch, or leave it out"
            )
        return self
