"""The configuration of a run: frozen, validated, with every field's meaning. No torch here.

`cli.py` reads YAML files and dotted overrides into these models; `train.py` hands plain values on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


@dataclass(frozen=True, slots=True)
class Strategy:
    """A row of the table of methods: which settings of the one loop make it.

    Args:
        many_experts: `cascade.experts` holds (default one per epoch); else the run is one expert.
        averages: `cascade.slow_retention` (α) holds; else α = 0 and the slow expert is the fast one.
        noises: `cascade.noise_intensity` (λ) holds, before every expert but the first; else λ = 0.
    """

    many_experts: bool
    averages: bool
    noises: bool


STRATEGIES = {
    "lora": Strategy(many_experts=False, averages=False, noises=False),
    "cascade": Strategy(many_experts=True, averages=False, noises=False),
    "slow": Strategy(many_experts=True, averages=True, noises=False),
    "lorasc": Strategy(many_experts=True, averages=True, noises=True),
}


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    name_or_path: str = Field(
        default="quickstart", description="Hub id or local folder of the model; `quickstart` is the one in the package."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Storage dtype of the weights; the LoRA pairs are float32 in any case."
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model.")


class AdapterConfig(Section):
    method: Literal["lora"] = Field(default="lora", description="The adapter of each expert.")
    rank: int = Field(default=8, ge=1, description="Rank r of each expert.")
    lora_alpha: float = Field(default=16.0, gt=0, description="Scaling numerator: s = lora_alpha / rank.")
    use_rslora: bool = Field(default=False, description="Rank-stabilised scaling: s = lora_alpha / sqrt(rank).")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the input of the LoRA branch.")
    target_modules: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        default=("q_proj", "v_proj"), description="Names, or ends of dotted paths, of the linear layers to adapt."
    )


class CascadeConfig(Section):
    strategy: Literal["lora", "cascade", "slow", "lorasc"] = Field(
        default="lorasc",
        description="lora: one expert; cascade: one after the other; slow: with averaging; lorasc: with averaging"
        " and noise.",
    )
    experts: int | None = Field(default=None, ge=1, description="Number of experts T; null: one per epoch.")
    slow_retention: float = Field(
        default=0.6, ge=0, lt=1, description="α: how much of the slow expert stays at each boundary (slow, lorasc)."
    )
    noise_intensity: float = Field(
        default=0.1,
        ge=0,
        description="λ: width of the noise, in standard deviations of the slow expert's change (lorasc).",
    )
    accumulator: Literal["device", "host"] = Field(
        default="device",
        description="Where the float32 sums behind bfloat16 weights live: beside the weights, or in host memory.",
    )
    merge_path: Literal["auto", "local", "gather"] = Field(
        default="auto",
        description="How a boundary edits weights that ZeRO-3 has cut up: each rank its own slices, or rank 0 one"
        " gathered weight at a time; the same bits. auto: local where a trial on the live model succeeds.",
    )
    max_boundary_drift: float | None = Field(
        default=None,
        gt=0,
        description="Largest change of the probe batch's logits that a merge may make, over their standard deviation;"
        " null: 1e-3 in float32, 2e-1 in bfloat16.",
    )

    @model_validator(mode="after")
    def lora_is_one_expert(self) -> CascadeConfig:
        if not STRATEGIES[self.strategy].many_experts and self.experts not in (None, 1):
            raise ValueError(
                f"cascade.experts is {self.experts}, but cascade.strategy {self.strategy} trains one expert:"
                " leave experts out, or take strategy cascade, slow or lorasc"
            )
        return self


class DigitsConfig(Section):
    name: Literal["digits"] = Field(
        default="digits", description="Handwritten digits as text, from one domain to another."
    )
    domain: Literal["upright", "mirrored", "rotated", "blurred"] = Field(
        default="mirrored", description="The new domain; the model in the package knows upright digits."
    )
    train_examples: int = Field(default=100, ge=1, le=296, description="Training examples in the new domain.")
    dev_examples: int = Field(
        default=100, ge=1, le=296, description="Examples for selection; 297 images are left for both."
    )
    test_examples: int = Field(default=500, ge=1, le=500, description="Test images, the same ones in every domain.")
    label_noise: float = Field(default=0.3, ge=0, le=1, description="Share of training examples with a wrong label.")
    loss: Literal["lm", "classification"] = Field(
        default="lm", description="Cross-entropy over the answer's tokens, or over the candidates."
    )

    @model_validator(mode="after")
    def enough_images(self) -> DigitsConfig:
        if self.train_examples + self.dev_examples > 297:
            raise ValueError(
                f"task.train_examples {self.train_examples} + task.dev_examples {self.dev_examples} is more than the"
                " 297 images that neither the base model nor the test has: lower one"
            )
        return self


class TextConfig(Section):
    name: Literal["text"] = Field(default="text", description="Causal language modelling on your own files.")
    train_file: str = Field(description="A .txt file (one document), or .jsonl with one document a row.")
    eval_file: str | None = Field(default=None, description="Held-out text; null: the last tenth of train_file.")
    text_field: str = Field(
        default="text", min_length=1, description="The field of a .jsonl row that holds the document."
    )
    block_size: int = Field(
        default=256, ge=2, description="Tokens in a training sequence; documents are packed end to end."
    )

    @model_validator(mode="after")
    def known_suffixes(self) -> TextConfig:
        for key, value in (("train_file", self.train_file), ("eval_file", self.eval_file)):
            if value is not None and PurePath(value).suffix.lower() not in (".txt", ".jsonl"):
                raise ValueError(f"task.{key} is {value!r}: a name that ends in .txt or .jsonl is needed")
        return self


class TrainingConfig(Section):
    epochs: float = Field(default=5.0, gt=0, description="Passes over the training examples; fractions are allowed.")
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
    eval_batch_size: int = Field(default=16, ge=1, description="Sequences per forward pass of an evaluation.")
    learning_rate: float = Field(default=1e-4, gt=0, le=100, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay.")
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="Gradients are clipped to this norm; null: not clipped."
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="Decay of the learning rate."
    )
    schedule_span: Literal["expert", "run"] = Field(
        default="expert",
        description="The schedule starts again, compressed, with every expert, or spans the whole run.",
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
    select: Literal["last", "best_dev"] = Field(
        default="last", description="What ships: the last weights, or those of the epoch with the lowest dev loss."
    )
    save_model: bool = Field(default=True, description="Write the merged model to `model/`.")
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
        return self


class TrackingConfig(Section):
    log_steps: int = Field(default=10, ge=1, description="Optimizer steps between two records of the loss.")
    tensorboard: bool = Field(default=True, description="Write `tensorboard/`.")


class Config(Section):
    """Everything a run is made of. Written resolved to `config.yaml` in the run directory."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    cascade: CascadeConfig = Field(default_factory=CascadeConfig)
    task: Annotated[DigitsConfig | TextConfig, Field(discriminator="name")] = Field(default_factory=DigitsConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
