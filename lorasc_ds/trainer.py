"""The live parts of a run: model, pairs, optimizer, cascade; a step, a score, what ships."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasc_ds import models
from lorasc_ds.adapters import AdaptedWeight
from lorasc_ds.algorithm.ledger import Adapter, Base, Ledger, digest
from lorasc_ds.cascade import Cascade, pair_parameters
from lorasc_ds.data import derived_seed
from lorasc_ds.errors import DivergedError
from lorasc_ds.evaluation import evaluate, evaluation_mode
from lorasc_ds.objectives import scored_logits, summed_loss
from lorasc_ds.preparation import Preparation, attach_adapters
from lorasc_ds.sharding import Backend, backend_for
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

    def consider(self, step: int, scores: Scores) -> None:
        """Called on the weights that closing now would ship."""
        if self.select == "best_dev" and scores["dev"]["loss"] < self.dev_loss:
            self.dev_loss, self.step, self.scores = scores["dev"]["loss"], step, scores
            for one in self.weights:
                with self.backend.edit(one.weight) as part:
                    self.copies[one.name] = part.flat.to("cpu", copy=True)

    def restore(self) -> None:
        """Put the selected weights into the model; nothing to do with `last`."""
        for one in self.weights:
            if one.name in self.copies:
                with self.backend.edit(one.weight) as part:
                    part.flat.copy_(self.copies[one.name])


class Trainer:
    """The live parts of a run and the verbs of the loop."""

    def __init__(
        self, preparation: Preparation, model: PreTrainedModel, accelerator: Accelerator, directory: Path
    ) -> None:
        self.preparation = preparation
        self.accelerator = accelerator
        config = preparation.config
        self.weights = attach_adapters(config, model)
        optimizer = torch.optim.AdamW(
            pair_parameters(self.weights), lr=config.training.learning_rate, weight_decay=config.training.weight_decay
        )
        self.model: PreTrainedModel
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.model.train()
        self.backend = backend_for(optimizer)
        self.base_sha256 = self.weights_sha256()
        self.selection = Selection(config.training.select, self.weights, self.backend)
        self.cascade = Cascade(
            self.weights,
            self.backend,
            self.new_ledger(getattr(model.config, "_commit_hash", None), directory / "ledger"),
            slow_retention=preparation.slow_retention,
            noise_intensity=preparation.noise_intensity,
            probe=self.probe(),
            accumulator=config.cascade.accumulator,
            max_boundary_drift=config.cascade.max_boundary_drift,
        )

    def new_ledger(self, commit: str | None, directory: Path) -> Ledger:
        """An empty ledger on disk; `commit` is the hub's, where the model came from there."""
        preparation, config = self.preparation, self.preparation.config
        ledger = Ledger(
            directory=directory,
            strategy=config.cascade.strategy,
            base=Base(config.model.name_or_path, commit or config.model.revision, config.model.dtype, self.base_sha256),
            adapter=Adapter(config.adapter.method, config.adapter.rank, self.weights[0].scaling),
            seed=config.training.seed,
            slow_retention=preparation.slow_retention,
            noise_intensity=preparation.noise_intensity,
            weights=tuple(one.name for one in self.weights),
        )
        ledger.save()
        return ledger

    def probe(self) -> Callable[[], Tensor]:
        """Logits of a few training examples in evaluation mode, float32, at most `PROBE_TOKENS` of them."""
        data = self.preparation.data
        batch = data.collate(data.examples[:PROBE_EXAMPLES]).last_scored(PROBE_TOKENS).to(self.accelerator.device)

        def logits() -> Tensor:
            with evaluation_mode(self.model):
                return scored_logits(self.model, batch)

        return logits

    def evaluate(self) -> Scores:
        training = self.preparation.config.training
        return evaluate(
            self.model,
            self.preparation.task,
            self.preparation.splits,
            batch_size=training.eval_batch_size,
            pad_id=self.preparation.data.pad_id,
        )

    def weights_sha256(self) -> str:
        """Digest of the adapted weights in use, in ledger order."""
        return digest(self.backend.full(one.weight) for one in self.weights)

    def training_step(self, step: int, learning_rate: float) -> StepReport:
        """One optimizer step on its global batch.

        Raises:
            DivergedError: the loss or the gradient is not finite; nothing has been updated.
        """
        began = time.perf_counter()
        training = self.preparation.config.training
        batch = self.preparation.data.step(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros((), device=self.accelerator.device)
        for micro in batch.micro_batches:
            torch.manual_seed(derived_seed(training.seed, step, micro.first))  # dropout
            loss = summed_loss(self.model, micro.batch.to(self.accelerator.device), self.preparation.task.loss)
            loss = loss / batch.normaliser
            self.accelerator.backward(loss)
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(pair_parameters(self.weights), training.max_grad_norm or math.inf)
        if not torch.isfinite(total + norm):
            raise DivergedError(
                f"step {step + 1}: the loss is {total:g} and the gradient's norm {norm:g}; stopped before the update."
                f" Lower training.learning_rate or look at the examples {', '.join(batch.ids)}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        tokens = sum(micro.batch.input_tokens for micro in batch.micro_batches)
        return StepReport(float(total), float(norm), tokens, time.perf_counter() - began)

    def save(self, directory: Path, sha256: str) -> None:
        """Write the merged model, read its adapted weights back and compare digests; or a note, if not asked for."""
        if not self.preparation.config.training.save_model:
            directory.mkdir()
            note = "training.save_model was false: the ledger and the base model give these weights.\n"
            (directory / "NOT_SAVED.txt").write_text(note)
            return
        names = [one.name for one in self.weights]

        def check(folder: Path) -> None:
            found = models.read_weights(folder, names)
            if digest(found[name] for name in names) != sha256:
                raise RuntimeError(f"{folder} holds other weights than the live model")

        models.save_model(self.model, self.preparation.tokenizer, directory, check)


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the accelerator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
