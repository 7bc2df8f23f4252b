"""The configuration of a run: frozen, validated, with every field's meaning. No torch here.

`cli.py` reads YAML files and dotted overrides into these models; `train.py` hands plain values on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lorasc_ds.section import Section
from lorasc_ds.task_config import DigitsConfig, TrainableTask
from lorasc_ds.training_config import TrainingConfig


@dataclass(frozen=True, slots=True)
class Strategy:
    """A row of the table of methods: which settings of the one loop make it.

    Args:
        experts: how many by default, and whether `cascade.experts` may say otherwise: not with `one`.
        averages: `cascade.slow_retention` (α) holds; else α = 0 and the slow expert is the fast one.
        noise: `once`, before training, in standard deviations of the pretrained weights, or before `every` expert but
            the first, in those of the slow expert's change; of `cascade.noise_intensity` (λ).
        optimizer: moments and step counts at a boundary: `emptied`, or moments `pruned` by `cascade.prune_method`.
        schedule, span: what `training.schedule` and `training.schedule_span` are where they are null.
    """

    experts: Literal["one", "two", "one per epoch"]
    averages: bool
    noise: Literal["none", "once", "every"]
    optimizer: Literal["emptied", "pruned"]
    schedule: Literal["linear", "cosine"]
    span: Literal["run", "expert", "jagged"]

    @property
    def many_experts(self) -> bool:
        return self.experts != "one"


STRATEGIES = {
    #           experts        averages  noise   optimizer  schedule  span
    "lora": Strategy("one", False, "none", "emptied", "linear", "run"),
    "noisytune": Strategy("one", False, "once", "emptied", "linear", "run"),
    "cola": Strategy("two", False, "none", "emptied", "linear", "run"),
    "relora": Strategy("one per epoch", False, "none", "pruned", "cosine", "jagged"),
    "cascade": Strategy("one per epoch", False, "none", "emptied", "linear", "expert"),
    "slow": Strategy("one per epoch", True, "none", "emptied", "linear", "expert"),
    "lorasc": Strategy("one per epoch", True, "every", "emptied", "linear", "expert"),
}


class ModelConfig(Section):
    name_or_path: str = Field(
        default="quickstart",
        description="Hub id or local folder of the model; `quickstart` and `quickstart-vit` are in the package.",
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Storage dtype of the weights; the LoRA pairs are float32 in any case."
    )
    kind: Literal["auto", "text", "image_text", "classes"] = Field(
        default="auto",
        description="text: a causal language model; image_text: a vision-language model; classes: a model of images,"
        " with a text tower or with a classifier; auto: the first of these that its configuration has.",
    )
    labels: int | None = Field(
        default=None,
        ge=2,
        description="Outputs of a new, random classifier on a model of images; null: those of its files, or one a class"
        " where task.train_head is true.",
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model.")


class AdapterConfig(Section):
    method: Literal["lora", "lora+", "dora", "lora-fa"] = Field(
        default="lora",
        description="lora; lora+: B learns faster than A; dora: every row has a trained magnitude besides, outside the"
        " cascade; lora-fa: A stays as drawn within an expert.",
    )
    rank: int = Field(default=8, ge=1, description="Rank r of each expert.")
    lora_alpha: float = Field(default=16.0, gt=0, description="Scaling numerator: s = lora_alpha / rank.")
    use_rslora: bool = Field(default=False, description="Rank-stabilised scaling: s = lora_alpha / sqrt(rank).")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the input of the LoRA branch.")
    loraplus_lr_ratio: float = Field(
        default=16.0, gt=0, description="Learning rate of B over that of A, which is training.learning_rate (lora+)."
    )
    lorafa_projection: bool = Field(
        default=True,
        description="The gradient of B is that of LoRA-FA's best match to full fine-tuning, g(AAᵀ)⁻¹/s²; false: g"
        " itself (lora-fa).",
    )
    target_modules: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        default=("q_proj", "v_proj"),
        description="Names, or ends of dotted paths, of the linear layers to adapt; * stands for any part of a path, as"
        " in vision_model.*.q_proj.",
    )


Candidates = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(strict=False, min_length=2)]


class CascadeConfig(Section):
    strategy: Literal["lora", "noisytune", "cola", "relora", "cascade", "slow", "lorasc"] = Field(
        default="lorasc",
        description="lora: one expert; noisytune: one, on noised weights; cola: two, one schedule over both; relora:"
        " moments pruned, jagged cosine; cascade: one after the other; slow: with averaging; lorasc: with averaging"
        " and noise.",
    )
    experts: int | None = Field(
        default=None, ge=1, description="Number of experts T; null: one per epoch (cola: two, the chain's length)."
    )
    restart_interval: int | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps of an expert, the last one's may be fewer; null: cascade.experts says when.",
    )
    slow_retention: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = Field(
        default=0.6,
        description="α: how much of the slow expert stays at each boundary; auto: the one of"
        " cascade.slow_retention_candidates with the lowest dev loss (slow, lorasc).",
    )
    slow_retention_candidates: Candidates = Field(
        default=(0.5, 0.6, 0.8), description="What cascade.slow_retention auto chooses from."
    )
    noise_intensity: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        default=0.1,
        description="λ: width of the noise, in standard deviations of the slow expert's change (lorasc) or of the"
        " pretrained weight (noisytune); auto: the one of cascade.noise_intensity_candidates with the lowest dev loss.",
    )
    noise_intensity_candidates: Candidates = Field(
        default=(0.1, 1.0, 10.0), description="What cascade.noise_intensity auto chooses from."
    )
    auto_examples: int | None = Field(
        default=None,
        ge=1,
        description="Dev examples that auto looks at, the first ones; null: so many that it costs about 8 % of the"
        " training, at least 32.",
    )
    noise_on: Literal["adapted", "all"] = Field(
        default="adapted", description="Noise on the adapted weights, or on every matrix of the model (noisytune)."
    )
    prune_method: Literal["magnitude", "random", "full"] = Field(
        default="magnitude",
        description="Which elements lose their moments at a restart: those of the smallest first moments, any, or all"
        " (relora).",
    )
    prune_fraction: float = Field(
        default=0.99, ge=0, le=1, description="How many of them: this share (relora with magnitude or random)."
    )
    rewarmup_steps: int | None = Field(
        default=None,
        ge=0,
        description="Optimizer steps in which the learning rate of schedule_span jagged comes back after a restart;"
        " null: a tenth of the expert's.",
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
    check_boundaries: bool = Field(
        default=True,
        description="Compare a probe batch's logits before and after every noise and merge; false: where nothing is"
        " scored or saved between two experts, the weights go from one to the next in one pass; the same bits.",
    )
    max_boundary_drift: float | None = Field(
        default=None,
        gt=0,
        description="Largest change of the probe batch's logits that a merge may make, over their standard deviation;"
        " null: 1e-3 in float32, 2e-1 in bfloat16.",
    )

    @model_validator(mode="after")
    def consistent(self) -> CascadeConfig:
        several = [name for name, strategy in STRATEGIES.items() if strategy.many_experts]
        for key, value in (("experts", self.experts), ("restart_interval", self.restart_interval)):
            one = value is None or (key == "experts" and value == 1)
            if not STRATEGIES[self.strategy].many_experts and not one:
                raise ValueError(
                    f"cascade.{key} is {value}, but cascade.strategy {self.strategy} trains one expert: leave"
                    f" {key} out, or take strategy {', '.join(several[:-1])} or {several[-1]}"
                )
        if self.experts is not None and self.restart_interval is not None:
            raise ValueError(
                f"cascade.experts {self.experts} and cascade.restart_interval {self.restart_interval} both say when"
                " experts end: leave one out"
            )
        if max(self.slow_retention_candidates) >= 1:
            raise ValueError(
                f"cascade.slow_retention_candidates holds {max(self.slow_retention_candidates):g}: numbers from 0 to"
                " below 1 are needed"
            )
        noises_all = STRATEGIES[self.strategy].noise == "once" and self.noise_on == "all"
        if noises_all and self.noise_intensity == "auto":
            raise ValueError(
                "cascade.noise_intensity auto with cascade.noise_on all would need a copy of the whole model: give a"
                " number, or take noise_on adapted"
            )
        return self


class TrackingConfig(Section):
    log_steps: int = Field(default=10, ge=1, description="Optimizer steps between two records of the loss.")
    tensorboard: bool = Field(default=True, description="Write `tensorboard/`.")
    backends: Annotated[
        tuple[Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio", "wandb"], ...],
        Field(strict=False),
    ] = Field(
        default=(),
        description="Trackers beside it that get the same numbers at the same steps, through Accelerate, set up as"
        " their manuals say; wandb and mlflow go on with their run when this one does, the others begin another.",
    )
    project: str = Field(default="lorasc_ds", min_length=1, description="What tracking.backends file the run under.")


class Config(Section):
    """Everything a run is made of. Written resolved to `config.yaml` in the run directory."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    cascade: CascadeConfig = Field(default_factory=CascadeConfig)
    task: Annotated[TrainableTask, Field(discriminator="name")] = Field(default_factory=DigitsConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
