"""The cascade in a training loop of one's own: three calls beside those that are there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorasc_ds.adapters import AdaptedWeight, base_model, find, other_matrices
from lorasc_ds.algorithm.files import write_atomically
from lorasc_ds.algorithm.ledger import Adapter, Base, Ledger
from lorasc_ds.algorithm.plan import Expert
from lorasc_ds.cascade import Boundaries, Closing, Opening
from lorasc_ds.cli import build_config
from lorasc_ds.config import STRATEGIES
from lorasc_ds.errors import ConfigError
from lorasc_ds.evaluation import evaluation_mode
from lorasc_ds.live_weights import LiveWeights
from lorasc_ds.method import make_method, make_plan, make_schedule
from lorasc_ds.sharding import Processes, reach

PROBE_ROWS = 4
PROBE_TOKENS = 64


class Cascade:
    """Turns a run that trains PEFT's LoRA layers into a cascade; all of its calls are collective.

    Call `open(step)` before optimizer step `step`, multiply the learning rate of every group by
    `learning_rate_factor(step)`, and call `close(step)` after it; inside an expert, the two do nothing.

    Args:
        model: a causal language model with LoRA layers by `peft.get_peft_model`, float32 or bfloat16, prepared
            (`Accelerator.prepare`, `deepspeed.initialize` or DDP) or plain.
        optimizer: the one that was prepared with it; AdamW or Adam over the LoRA parameters.
        steps: optimizer steps of the whole run.
        probe: a batch for `model(**probe)`: at every boundary its logits must stay what they are.
        directory: gets `ledger/`.
        epochs: what `steps` are; for strategies with an expert per epoch, unless `experts` is given.
        seed: draws the pairs and the noise.
        schedule, schedule_span, warmup_steps: as in `training`; None: the strategy's.
        dev_loss: of the model as it is, the same on all processes; for `slow_retention` or `noise_intensity` auto.
        lorafa_projection: with a frozen `A`, as in `adapter`.
        settings: of the section `cascade`: strategy, experts, slow_retention, noise_intensity and so on.

    Raises:
        ConfigError: impossible settings; or the model or optimizer is none that boundaries can be made in.
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
        self.ledger = self.new_ledger(config.slow_retention, config.noise_intensity, tuple(others))
        self.probe = {key: value[:PROBE_ROWS] for key, value in probe.items() if key != "labels"}
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
        batch = {key: value.to(self.live.processes.device) for key, value in self.probe.items()}
        with evaluation_mode(self.model):
            return self.model(**batch, use_cache=False).logits[:, -PROBE_TOKENS:].float()

    def open(self, step: int) -> Opening | None:
        """Before optimizer step `step` (from 0): noise, fresh pairs and an empty optimizer, where an expert begins."""
        expert = self.plan.expert_at(step)
        if step != expert.start:
            return None
        self.expert = expert
        return self.boundaries.open_expert(expert)

    def close(self, step: int) -> Closing | None:
        """After optimizer step `step`: the average and the merge, where an expert ends."""
        return self.close_expert(self.expert) if self.expert is not None and step + 1 == self.expert.stop else None

    def finish(self, step: int) -> Closing | None:
        """After the last step taken, `step`, of a run that ends early: closes the expert that is open, if any is."""
        return (
            None if self.expert is None else self.close_expert(Expert(self.expert.index, self.expert.start, step + 1))
        )

    def close_expert(self, expert: Expert) -> Closing:
        closing = self.boundaries.close_expert(expert)
        self.expert = None
        return closing

    def learning_rate_factor(self, step: int) -> float:
        """What the learning rate of every group is multiplied by at optimizer step `step`."""
        return self.schedule.factor(self.plan, self.plan.expert_at(step), step)

    def as_if_closed(self) -> AbstractContextManager[None]:
        """Inside, an expert being open, the model is what closing it now would ship: to evaluate, or to save."""
        return self.boundaries.as_if_closed()

    def weights_sha256(self) -> str:
        """Digest of the adapted weights in use, in ledger order."""
        return self.live.weights_sha256()

    def save_pretrained(self, directory: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write the merged model as a plain Hugging Face one; call it between experts, or after `finish`."""
        Path(directory).parent.mkdir(parents=True, exist_ok=True)
        self.live.save(self.base, Path(directory), tokenizer, self.live.shipped_sha256())

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
            ConfigError: it was written at another step, or by another run than this is.
        """
        saved = Ledger.load(Path(directory) / "ledger")
        saved.compare_base(self.ledger.base.sha256)
        for key in ("strategy", "adapter", "seed", "slow_retention", "noise_intensity", "weights", "noised"):
            if getattr(saved, key) != getattr(self.ledger, key):
                raise ConfigError(
                    f"{key} is {getattr(self.ledger, key)}, but {directory} was written with {getattr(saved, key)}:"
                    " resume with the same"
                )
        done = saved.experts[-1].steps[1] if saved.experts else 0
        expert = self.plan.expert(len(saved.experts) + 1) if len(saved.experts) < self.plan.experts else None
        if done > step or (expert is not None and not expert.start <= step < expert.stop):
            raise ConfigError(f"{directory} holds {len(saved.experts)} experts, which do not end before step {step}")
        if self.live.processes.main:
            shutil.rmtree(self.ledger.directory)
            shutil.copytree(saved.directory, self.ledger.directory)
        self.live.processes.wait()
        self.ledger.experts[:] = saved.experts
        noise = json.loads((Path(directory) / "noise.json").read_text())
        opened = expert is not None and step > expert.start
        self.boundaries.resume(expert if opened else None, noise["intensity"], noise["scale"])
        self.expert = expert if opened else None


def check(weights: list[AdaptedWeight]) -> None:
    """Refuse what no boundary can be made in.

    Raises:
        ConfigError: with the reason.
    """
    first = weights[0]
    for one in weights:
        if not hasattr(one.weight, "ds_id") and tuple(one.weight.shape) != one.shape:
            raise ConfigError(f"{one.name} is cut up, and not by DeepSpeed: FSDP and tensor parallel are not supported")
        if one.weight.dtype not in (torch.float32, torch.bfloat16) or one.weight.dtype != first.weight.dtype:
            raise ConfigError(f"{one.name} is {one.weight.dtype}: float32 or bfloat16 is needed, the same everywhere")
        if one.weight.requires_grad or not one.B.requires_grad:
            raise ConfigError(f"{one.name}: its weight must be frozen and its lora_B trained, and one of them is not")
        if (one.scaling, one.rank, one.A.requires_grad) != (first.scaling, first.rank, first.A.requires_grad):
            raise ConfigError(f"{one.name} has rank {one.rank}, scaling {one.scaling:g}: one for all weights is needed")
