"""The cascade in a training loop of one's own: three calls beside those that are there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorasc_ds.adapters import AdaptedWeight, base_model, find, other_matrices
from lorasc_ds.algorithm.files import write_atomically
from lorasc_ds.algorithm.ledger import Adapter, Base, Ledger
from lorasc_ds.algorithm.plan import Expert
from lorasc_ds.cascade import Boundaries
from lorasc_ds.config import STRATEGIES
from lorasc_ds.errors import ConfigError
from lorasc_ds.evaluation import evaluation_mode
from lorasc_ds.fields import build_config
from lorasc_ds.live_weights import LiveWeights
from lorasc_ds.method import make_method, make_plan, make_schedule
from lorasc_ds.reports import Closing, Opening
from lorasc_ds.sharding import Processes, reach

PROBE_ROWS = 4
PROBE_TOKENS = 64


class Cascade:
    """Turns a run that trains PEFT's LoRA layers into a cascade; all of its calls are collective.

    Call `open(step)` before every optimizer step `step` (from 0), multiply the learning rate of every group by
    `learning_rate_factor(step)`, and call `close(step)` after it; inside an expert, the two do nothing.

    Args:
        model: a causal language model with LoRA layers by `peft.get_peft_model`, float32 or bfloat16, prepared
            (`Accelerator.prepare`, `deepspeed.initialize` or DDP) or plain.
        optimizer: the one that was prepared with it, as `prepare` gave it; AdamW or Adam over the LoRA parameters.
        steps: optimizer steps of the whole run.
        probe: a batch for `model(**probe)`; at every boundary the logits of its first rows must stay what they are, as
            the main process sees them.
        directory: gets `ledger/`; all processes must see it.
        epochs: what `steps` are; for strategies with an expert per epoch, unless `experts` is given.
        seed: draws the pairs and the noise.
        schedule, schedule_span, warmup_steps: as in `training`; None: the strategy's.
        dev_loss: of the model as it is, the same on all processes; for `slow_retention` or `noise_intensity` auto.
        lorafa_projection: with a frozen `A`, as in `adapter`.
        settings: of the section `cascade`: strategy, experts, slow_retention, noise_intensity and so on.

    Raises:
        ConfigError: impossible settings; or a model or optimizer in which no boundary can be made.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        steps: int,
        probe: Mapping[str, Tensor],
        directory: str | Path,
        epochs: float | None = None,
        seed: int = 0,
        schedule: str | None = None,
        schedule_span: str | None = None,
        warmup_steps: int = 0,
        dev_loss: Callable[[], float] | None = None,
        lorafa_projection: bool = True,
        **settings: Any,
    ) -> None:
        config = build_config({"cascade": settings}, {}, {}).cascade
        self.method = make_method(config)
        many = STRATEGIES[config.strategy].experts == "one per epoch"
        if many and (epochs, config.experts, config.restart_interval) == (None, None, None):
            raise ConfigError(f"strategy {config.strategy} has an expert per epoch: give epochs, or experts")
        if self.method.candidates and dev_loss is None:
            raise ConfigError(
                "slow_retention or noise_intensity is auto: give dev_loss, which candidates are judged by"
            )
        self.plan = make_plan(config, steps, epochs or 1)
        self.schedule = make_schedule(config, self.plan, decay=schedule, span=schedule_span, warmup_steps=warmup_steps)
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
            raise ConfigError("FSDP is not supported: take one process, DDP, or DeepSpeed's ZeRO-1, 2 or 3")
        self.model = model
        self.base: PreTrainedModel = base_model(model)
        weights = find(self.base)
        check(weights)
        self.directory = Path(directory)
        processes = Processes.of_this_run(weights[0].B.device)
        others = other_matrices(self.base, weights) if self.method.noise_on == "all" else {}
        self.live = LiveWeights(
            weights,
            reach(optimizer, processes, [one.weight for one in weights], config.merge_path),
            processes,
            seed=seed,
            other_matrices=others,
            projects_gradients=lorafa_projection and not weights[0].A.requires_grad,
            accumulator=config.accumulator,
        )
        self.live.backend.optimizer_is_empty(self.live.pair_parameters)  # raises where it cannot be emptied
        self.ledger = self.new_ledger(config.slow_retention, config.noise_intensity, tuple(others))
        self.probe = {key: value for key, value in probe.items() if key != "labels"}
        self.boundaries = Boundaries(
            self.live,
            self.ledger,
            self.method,
            probe=self.probe_logits,
            dev_loss=dev_loss,
            max_boundary_drift=config.max_boundary_drift,
        )
        self.expert: Expert | None = None

    def new_ledger(self, slow_retention: float | str, noise_intensity: float | str, noised: tuple[str, ...]) -> Ledger:
        weights, config = self.live.weights, self.base.config
        method = "dora" if weights[0].magnitude is not None else "lora" if weights[0].A.requires_grad else "lora-fa"
        ledger = Ledger(
            directory=self.directory / "ledger",
            strategy=self.method.strategy,
            base=Base(
                config._name_or_path,
                getattr(config, "_commit_hash", None),
                str(weights[0].weight.dtype).removeprefix("torch."),
                self.live.weights_sha256(),
            ),
            adapter=Adapter(method, weights[0].rank, weights[0].scaling),
            seed=self.live.seed,
            slow_retention=slow_retention if STRATEGIES[self.method.strategy].averages else 0.0,
            noise_intensity=noise_intensity if STRATEGIES[self.method.strategy].noise != "none" else 0.0,
            weights=tuple(one.name for one in weights),
            noised=noised,
        )
        if self.live.processes.main:
            self.directory.mkdir(parents=True, exist_ok=True)
            ledger.save()
        return ledger

    def probe_logits(self) -> Tensor:
        """In the precision of the weights: without the autocast that Accelerate puts around the outermost model."""
        tensors = {key: value for key, value in self.probe.items() if isinstance(value, Tensor) and value.ndim > 0}
        rows = max(
            (len(value) for value in tensors.values() if value.ndim > 1), default=0
        )  # lengths of packed texts are no rows
        few = {key: value[:PROBE_ROWS] if len(value) == rows else value for key, value in tensors.items()}
        batch = dict(self.probe) | {key: value.to(self.live.processes.device) for key, value in few.items()}
        cut_up = hasattr(self.live.weights[0].weight, "ds_id")  # then the engine's own forward pass gathers
        with evaluation_mode(self.model):
            logits = (self.model if cut_up else self.base)(**batch, use_cache=False).logits
        return logits[:, -PROBE_TOKENS:].float()

    def open(self, step: int) -> Opening | None:
        """Before optimizer step `step` (from 0): noise, fresh pairs and an empty optimizer, where an expert begins.

        Raises:
            ConfigError: the expert of `step` began earlier, and was not opened then; or the run has no such step; or
                before the first one, a pair holds something already.
            DivergedError: see `Boundaries.open_expert`.
        """
        if not 0 <= step < self.plan.steps:
            raise ConfigError(f"step {step} was to be opened, but the run has the steps 0 to {self.plan.steps - 1}")
        expert = self.plan.expert_at(step)
        if self.expert == expert:
            return None
        if step != expert.start or self.expert is not None:
            raise ConfigError(
                f"step {step} is in expert {expert.index}, which begins at step {expert.start}, but"
                f" {'none' if self.expert is None else f'expert {self.expert.index}'} is open: call open and close at"
                " every optimizer step, from 0 on or from where `resume` is told"
            )
        if expert.index == 1 and any(bool(pair.B.any()) for pair in self.live.pairs().values()):
            raise ConfigError(
                "lora_B is not 0 before the first step, and what the pairs hold would be lost, since an expert begins"
                " with fresh ones: merge them into the weights first, or leave init_lora_weights as it is"
            )
        self.expert = expert
        return self.boundaries.open_expert(expert)

    def close(self, step: int) -> Closing | None:
        """After optimizer step `step`: the average and the merge, where an expert ends.

        Raises:
            ConfigError: its expert is not open.
            DivergedError: see `Boundaries.close_expert`.
        """
        expert = self.plan.expert_at(step)
        if self.expert != expert:
            raise ConfigError(f"step {step} was to be closed, but expert {expert.index} is not open: call open first")
        return self.close_expert(expert) if step + 1 == expert.stop else None

    def finish(self, step: int) -> Closing | None:
        """After the last step taken, `step`, of a run that ends early: closes the expert that is open, if any is."""
        if self.expert is None:
            return None
        return self.close_expert(Expert(self.expert.index, self.expert.start, step + 1))

    def close_expert(self, expert: Expert) -> Closing:
        closing = self.boundaries.close_expert(expert)
        self.live.projections = {}  # another cascade on this model may follow, which projects by itself
        self.expert = None
        return closing

    def learning_rate_factor(self, step: int) -> float:
        """What the learning rate of every group is multiplied by at optimizer step `step`."""
        return self.schedule.factor(self.plan, self.plan.expert_at(step), step)

    @contextmanager
    def as_if_closed(self) -> Iterator[None]:
        """Inside, the model is what closing the open expert now would ship, if any is open: to evaluate, or to save."""
        if self.expert is None:
            yield
            return
        expert, self.expert = self.expert, None
        try:
            with self.boundaries.as_if_closed():
                yield
        finally:
            self.expert = expert

    def weights_sha256(self) -> str:
        """Digest of the adapted weights in use, in ledger order."""
        return self.live.weights_sha256()

    def save_pretrained(self, directory: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write the merged model as a plain Hugging Face one, between experts, after `finish` or in `as_if_closed`.

        Raises:
            ConfigError: an expert is open, whose pairs would be missing; or something is there already.
        """
        directory = Path(directory)
        if self.expert is not None:
            raise ConfigError(
                f"expert {self.expert.index} is open, and what it has learnt would be missing: call finish first, or"
                " save inside as_if_closed"
            )
        taken = self.live.processes.main and directory.exists()
        if self.live.processes.problems("it is there already" if taken else None):
            raise ConfigError(f"{directory} is there already: give save_pretrained a new name")
        directory.parent.mkdir(parents=True, exist_ok=True)
        self.live.save(self.base, directory, [] if tokenizer is None else [tokenizer], self.live.shipped_sha256())
        self.live.processes.wait()

    def save(self, directory: str | Path) -> None:
        """Beside a checkpoint of the pairs and the optimizer, what makes it whole: the ledger, and the open noise."""
        directory = Path(directory)
        if self.live.processes.main:
            shutil.copytree(self.ledger.directory, directory / "ledger", dirs_exist_ok=True)
            noise = {"intensity": self.boundaries.noise_intensity, "scale": self.boundaries.noise_scale}
            write_atomically(directory / "noise.json", json.dumps(noise).encode())
        self.live.processes.wait()

    def resume(self, directory: str | Path, step: int) -> None:
        """After loading pretrained weights, pairs and optimizer: go on before optimizer step `step`.

        Raises:
            LedgerError: the ledger that `save` wrote is damaged, or these are not the weights that its run began with.
            ConfigError: there is none, or it was written at another step, or by another run than this is.
        """
        directory = Path(directory)
        if not (directory / "noise.json").is_file():
            raise ConfigError(
                f"{directory} is not what Cascade.save writes, or was cut short: resume from another checkpoint, with"
                " the directory that the run had"
            )
        saved = Ledger.load(directory / "ledger")
        saved.compare_base(self.ledger.base.sha256)
        for key in ("strategy", "adapter", "seed", "slow_retention", "noise_intensity", "weights", "noised"):
            if getattr(saved, key) != getattr(self.ledger, key):
                raise ConfigError(
                    f"{key} is {getattr(self.ledger, key)}, but {directory} was written with {getattr(saved, key)}:"
                    " resume with the same"
                )
        planned = [expert for expert in self.plan if expert.start < step]
        opened = planned.pop() if planned and planned[-1].stop > step else None
        if [record.steps for record in saved.experts] != [(expert.start, expert.stop) for expert in planned]:
            raise ConfigError(
                f"{directory} holds experts of the steps {[record.steps for record in saved.experts]}, but before step"
                f" {step} this run has {[(expert.start, expert.stop) for expert in planned]}: resume at the step that"
                " was saved, with as many steps and experts"
            )
        if self.live.processes.main:
            shutil.rmtree(self.ledger.directory)
            shutil.copytree(saved.directory, self.ledger.directory)
        self.live.processes.wait()
        self.ledger.experts, self.ledger.snapshot = saved.experts, saved.snapshot
        noise = json.loads((directory / "noise.json").read_text())
        self.boundaries.resume(opened, noise["intensity"], noise["scale"])
        self.expert = opened


def check(weights: list[AdaptedWeight]) -> None:
    """Refuse what no boundary can be made in.

    Raises:
        ConfigError: with the reason.
    """
    first = weights[0]
    for one in weights:
        whole = hasattr(one.weight, "ds_id") or tuple(one.weight.shape) == one.shape
        if not whole or hasattr(one.weight, "device_mesh"):
            raise ConfigError(f"{one.name} is cut up, and not by DeepSpeed: FSDP and tensor parallel are not supported")
        if one.weight.dtype not in (torch.float32, torch.bfloat16) or one.weight.dtype != first.weight.dtype:
            raise ConfigError(f"{one.name} is {one.weight.dtype}: float32 or bfloat16 is needed, the same everywhere")
        if one.weight.requires_grad or not one.B.requires_grad:
            raise ConfigError(f"{one.name}: its weight must be frozen and its lora_B trained, and one of them is not")
        if (one.scaling, one.rank, one.A.requires_grad) != (first.scaling, first.rank, first.A.requires_grad):
            raise ConfigError(
                f"{one.name} has rank {one.rank}, scaling {one.scaling:g} and lora_A"
                f" {'trained' if one.A.requires_grad else 'frozen'}, unlike {first.name}: one for all weights is needed"
            )
