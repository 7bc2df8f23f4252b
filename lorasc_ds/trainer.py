"""The live parts of a run: model, pairs, engine, cascade; a step, a score, what ships."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from lorasc_ds import models
from lorasc_ds.adapters import AdaptedWeight, other_matrices, parameter_groups
from lorasc_ds.algorithm.ledger import Adapter, Base, Ledger
from lorasc_ds.cascade import Boundaries
from lorasc_ds.data import derived_seed
from lorasc_ds.encoding import EncodedExample
from lorasc_ds.errors import DivergedError
from lorasc_ds.evaluation import evaluate, evaluation_mode, for_the_loss_alone
from lorasc_ds.live_weights import LiveWeights
from lorasc_ds.objectives import scored_logits, summed_loss
from lorasc_ds.preparation import Preparation
from lorasc_ds.sharding import Backend, Processes, prepare_engine
from lorasc_ds.tasks import Scores
from lorasc_ds.tracking import StepReport

PROBE_EXAMPLES = 4
PROBE_TOKENS = 256


class Selection:
    """What ships (`training.select`): the last weights, or those with the lowest dev loss so far."""

    def __init__(self, select: str, weights: Sequence[AdaptedWeight], backend: Backend) -> None:
        self.select = select
        self.weights = weights
        self.backend = backend
        self.dev_loss = math.inf
        self.step = 0
        self.scores: Scores = {}
        self.copies: dict[str, Tensor] = {}
        self.magnitudes: dict[str, Tensor] = {}

    def consider(self, step: int, scores: Scores) -> None:
        """Called on the weights that closing now would ship."""
        if self.select == "best_dev" and scores["dev"]["loss"] < self.dev_loss:
            self.dev_loss, self.step, self.scores = scores["dev"]["loss"], step, scores
            for one in self.weights:
                with self.backend.edit(one.weight) as part:
                    self.copies[one.name] = part.flat.to("cpu", copy=True)
                if one.magnitude is not None:
                    self.magnitudes[one.name] = self.backend.read(one.magnitude)

    def restore(self) -> None:
        """Put the selected weights into the model; nothing to do with `last`."""
        for one in self.weights:
            if one.name in self.copies:
                with self.backend.edit(one.weight) as part:
                    part.flat.copy_(self.copies[one.name])
            if one.magnitude is not None and one.name in self.magnitudes:
                self.backend.write(one.magnitude, self.magnitudes[one.name])


class Trainer:
    """The live parts of a run and the verbs of the loop.

    Args:
        module: the pretrained model; its weights may already be cut up.
        weights: those of `module` that are adapted.

    Raises:
        ConfigError: the model lets a token see those after it.
    """

    def __init__(
        self,
        preparation: Preparation,
        module: PreTrainedModel,
        weights: list[AdaptedWeight],
        accelerator: Accelerator,
        directory: Path,
    ) -> None:
        self.preparation = preparation
        self.module = module
        self.weights = weights
        config, data = preparation.config, preparation.data
        training = config.training
        self.processes = Processes(data.rank, data.world_size, accelerator.device)
        if training.gradient_checkpointing:
            module.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        others = other_matrices(module, weights) if preparation.method.noise_on == "all" else {}
        groups = parameter_groups(weights, preparation.loraplus_lr_ratio)
        self.learning_rates = {group["role"]: training.learning_rate * group["lr_ratio"] for group in groups}
        optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, weight_decay=training.weight_decay)
        self.engine, self.backend = prepare_engine(
            accelerator,
            self.processes,
            module,
            optimizer,
            [one.weight for one in weights],
            config.cascade.merge_path,
            training.ddp_timeout,
        )
        found = self.engine.learning_rates(training.learning_rate)
        if found != self.learning_rates:
            raise RuntimeError(f"the engine trains at {found}, but {self.learning_rates} were asked for")
        self.live = LiveWeights(
            weights,
            self.backend,
            self.processes,
            seed=training.seed,
            other_matrices=others,
            projects_gradients=config.adapter.method == "lora-fa" and config.adapter.lorafa_projection,
            accumulator=config.cascade.accumulator,
        )
        self.engine.model.train()
        models.refuse_bidirectional(config.model, module, self.logits)
        self.base_sha256 = self.weights_sha256()
        self.selection = Selection(training.select, weights, self.backend)
        self.cascade = Boundaries(
            self.live,
            self.new_ledger(getattr(module.config, "_commit_hash", None), directory / "ledger", tuple(others)),
            preparation.method,
            probe=self.probe(),
            dev_loss=self.dev_loss,
            max_boundary_drift=config.cascade.max_boundary_drift,
        )

    def new_ledger(self, commit: str | None, directory: Path, noised: tuple[str, ...]) -> Ledger:
        """An empty ledger, written by the main process; `commit` is the hub's, where the model came from there."""
        preparation, config = self.preparation, self.preparation.config
        ledger = Ledger(
            directory=directory,
            strategy=config.cascade.strategy,
            base=Base(config.model.name_or_path, commit or config.model.revision, config.model.dtype, self.base_sha256),
            adapter=Adapter(config.adapter.method, config.adapter.rank, self.weights[0].scaling),
            seed=config.training.seed,
            slow_retention=preparation.asked("slow_retention"),
            noise_intensity=preparation.asked("noise_intensity"),
            weights=tuple(one.name for one in self.weights),
            noised=noised,
        )
        if self.processes.main:
            ledger.save()
        return ledger

    def logits(self, ids: Tensor) -> Tensor:
        """Of token ids (inputs, length), in evaluation mode: (inputs, length, vocabulary)."""
        with evaluation_mode(self.engine.model):
            return self.engine.model(input_ids=ids.to(self.processes.device), use_cache=False).logits

    def probe(self) -> Callable[[], Tensor]:
        """Logits of a few training examples in evaluation mode, float32, at most `PROBE_TOKENS` of them."""
        data = self.preparation.data
        batch = data.collate(data.examples[:PROBE_EXAMPLES]).last_scored(PROBE_TOKENS).to(self.processes.device)

        def logits() -> Tensor:
            with evaluation_mode(self.engine.model):
                return scored_logits(self.engine.model, batch)

        return logits

    def evaluate(self) -> Scores:
        return self.scores(self.preparation.splits)

    def scores(self, splits: dict[str, list[EncodedExample]]) -> Scores:
        return evaluate(
            self.engine.model,
            self.preparation.task,
            splits,
            batch_size=self.preparation.config.training.eval_batch_size,
            pad_id=self.preparation.data.pad_id,
            processes=self.processes,
        )

    def dev_loss(self) -> float:
        """Of the model as it is, on the dev examples that a boundary chooses α and λ by."""
        preparation = self.preparation
        chosen = for_the_loss_alone(preparation.splits["dev"][: preparation.auto_examples], preparation.task)
        return self.scores({"dev": chosen})["dev"]["loss"]

    def weights_sha256(self) -> str:
        return self.live.weights_sha256()

    def training_step(self, step: int, learning_rate: float) -> StepReport:
        """One optimizer step on its global batch.

        Raises:
            DivergedError: the loss or the gradient is not finite; nothing has been updated.
        """
        began = time.perf_counter()
        training = self.preparation.config.training
        batch = self.preparation.data.step(step)
        totals = torch.zeros(2, dtype=torch.float64, device=self.processes.device)  # loss, tokens
        for number, micro in enumerate(batch.micro_batches, start=1):
            torch.manual_seed(derived_seed(training.seed, step, micro.first))  # dropout
            with self.engine.micro_step(last=number == len(batch.micro_batches)):
                loss = summed_loss(self.engine.model, micro.batch.to(self.processes.device), self.preparation.task.loss)
                loss = loss * micro.counts / batch.normaliser
                self.engine.backward(loss)
            totals[0] += loss.detach()
            totals[1] += micro.batch.input_tokens * micro.counts
        loss_sum, tokens = self.processes.sum(totals).tolist()
        norm = math.nan
        if math.isfinite(loss_sum):
            norm = float(self.engine.update(learning_rate, training.max_grad_norm))
        if not math.isfinite(norm):
            raise DivergedError(
                f"step {step + 1}: the loss is {loss_sum:g} and the gradient's norm {norm:g}; stopped before the"
                f" update. Lower training.learning_rate or look at the examples {', '.join(batch.ids)}"
            )
        return StepReport(loss_sum, norm, int(tokens), time.perf_counter() - began)

    def save(self, directory: Path, sha256: str) -> None:
        """Write the merged model, whose adapted weights have `sha256`; or a note, if not asked for."""
        if self.preparation.config.training.save_model:
            self.live.save(self.module, directory, self.preparation.tokenizer, sha256)
        elif self.processes.main:
            directory.mkdir()
            note = "training.save_model was false: the ledger and the base model give these weights.\n"
            (directory / "NOT_SAVED.txt").write_text(note)


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the accelerator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
