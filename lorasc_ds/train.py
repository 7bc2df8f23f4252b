"""One run, from a checked configuration to a merged model. The loop reads like Algorithm 1 of the paper."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from lorasc_ds import models, run_directory
from lorasc_ds.adapters import AdaptedWeight
from lorasc_ds.algorithm.ledger import Adapter, Base, Ledger, digest
from lorasc_ds.cascade import Cascade, pair_parameters, weights_sha256
from lorasc_ds.cli import Invocation, parse_command_line, to_yaml
from lorasc_ds.config import Config
from lorasc_ds.data import StepBatch, derived_seed
from lorasc_ds.dry_run import report
from lorasc_ds.errors import DivergedError, RunError
from lorasc_ds.evaluation import Scores, evaluate, evaluation_mode
from lorasc_ds.objectives import scored_logits, summed_loss
from lorasc_ds.preparation import Preparation, attach_adapters, prepare
from lorasc_ds.sharding import Backend, backend_for, refuse_unsupported
from lorasc_ds.tracking import Tracker, results_table

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

    def __init__(self, preparation: Preparation, accelerator: Accelerator, directory: Path) -> None:
        self.preparation = preparation
        self.accelerator = accelerator
        config = preparation.config
        model = models.load_model(config.model)
        self.weights = attach_adapters(config, model)
        optimizer = torch.optim.AdamW(
            pair_parameters(self.weights), lr=config.training.learning_rate, weight_decay=config.training.weight_decay
        )
        self.model: PreTrainedModel
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.model.train()
        self.backend = backend_for(optimizer)
        self.base_sha256 = weights_sha256(self.weights, self.backend)
        self.cascade = Cascade(
            self.weights,
            self.backend,
            new_ledger(preparation, self.weights, self.base_sha256, directory / "ledger"),
            slow_retention=preparation.slow_retention,
            noise_intensity=preparation.noise_intensity,
            probe=self.probe(),
            accumulator=config.cascade.accumulator,
            max_boundary_drift=config.cascade.max_boundary_drift,
        )

    def probe(self) -> Callable[[], Tensor]:
        """Logits of a few training examples in evaluation mode, float32, at most `PROBE_TOKENS` of them."""
        data = self.preparation.data
        batch = data.collate(data.examples[:PROBE_EXAMPLES]).to(self.accelerator.device)

        def logits() -> Tensor:
            with evaluation_mode(self.model):
                return scored_logits(self.model, batch)[-PROBE_TOKENS:]

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

    def training_step(self, step: int, batch: StepBatch, learning_rate: float) -> tuple[float, float]:
        """One optimizer step on a global batch: its mean loss, and the gradient's norm before clipping.

        Raises:
            DivergedError: the loss or the gradient is not finite; nothing has been updated.
        """
        training = self.preparation.config.training
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
        return float(total), float(norm)


def new_ledger(preparation: Preparation, weights: Sequence[AdaptedWeight], base_sha256: str, directory: Path) -> Ledger:
    config = preparation.config
    ledger = Ledger(
        directory=directory,
        strategy=config.cascade.strategy,
        base=Base(config.model.name_or_path, config.model.revision, config.model.dtype, base_sha256),
        adapter=Adapter(config.adapter.method, config.adapter.rank, weights[0].scaling),
        seed=config.training.seed,
        slow_retention=preparation.slow_retention,
        noise_intensity=preparation.noise_intensity,
        weights=tuple(one.name for one in weights),
    )
    ledger.save()
    return ledger


def train(preparation: Preparation, accelerator: Accelerator, directory: Path, tracker: Tracker) -> dict[str, Any]:
    """Run the cascade, write the model, and return the summary."""
    config, plan = preparation.config, preparation.plan
    trainer = Trainer(preparation, accelerator, directory)
    cascade, data = trainer.cascade, preparation.data
    selection = Selection(config.training.select, trainer.weights, trainer.backend)
    headline = "perplexity" if preparation.task.kind == "documents" else "accuracy"
    boundary_seconds: list[float] = []
    step_seconds, tokens = 0.0, 0

    def epoch() -> float:
        return tracker.step / data.steps_per_epoch

    def score(when: str) -> Scores:
        scores = trainer.evaluate()
        tracker.evaluated(when, epoch(), scores, headline)
        return scores

    before = after = score("before training")
    for expert in plan:
        tracker.expert = expert.index
        opening = cascade.open_expert(expert)
        tracker.boundary("open", epoch(), dataclasses.asdict(opening))
        for step in range(expert.start, expert.stop):
            began = time.perf_counter()
            batch = data.step(step)
            learning_rate = preparation.learning_rate(expert, step)
            loss, grad_norm = trainer.training_step(step, batch, learning_rate)
            seconds = time.perf_counter() - began
            read = sum(micro.batch.input_tokens for micro in batch.micro_batches)
            step_seconds, tokens = step_seconds + seconds, tokens + read
            tracker.trained(epoch(), learning_rate, loss, grad_norm, read, seconds)
            if step + 1 in preparation.evaluation_steps and step + 1 < expert.stop:
                with cascade.as_if_closed():
                    selection.consider(step + 1, score(f"epoch {epoch():g}"))
        closing = cascade.close_expert(expert)
        tracker.boundary("close", epoch(), dataclasses.asdict(closing))
        boundary_seconds.append(opening.seconds + closing.seconds)
        if expert.stop in preparation.evaluation_steps:
            after = score(f"expert {expert.index}/{plan.experts}")
            selection.consider(expert.stop, after)

    last_sha256 = weights_sha256(trainer.weights, trainer.backend)
    selection.restore()
    shipped_sha256 = weights_sha256(trainer.weights, trainer.backend)
    shipped = {"select": config.training.select, "step": selection.step or plan.steps, "weights_sha256": shipped_sha256}
    save(trainer, directory, shipped_sha256)
    return {
        "strategy": config.cascade.strategy,
        "adapter": config.adapter.model_dump(mode="json") | {"scaling": trainer.weights[0].scaling},
        "model": config.model.model_dump(mode="json"),
        "task": preparation.task.name,
        "engine": trainer.backend.name,
        "device": str(accelerator.device),
        "world_size": accelerator.num_processes,
        "experts": plan.experts,
        "steps": plan.steps,
        "global_batch": config.training.batch_size,
        "slow_retention": preparation.slow_retention,
        "noise_intensity": preparation.noise_intensity,
        "eval": selection.scores or after,
        "eval_before": before,
        "timing": {
            "train_seconds": step_seconds,
            "boundary_seconds": boundary_seconds,
            "tokens_per_second": tokens / step_seconds,
            "peak_memory_bytes": peak_memory(accelerator.device),
        },
        "base_sha256": trainer.base_sha256,
        "weights_sha256": last_sha256,
        "shipped": shipped,
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the accelerator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def save(trainer: Trainer, directory: Path, sha256: str) -> None:
    """Write `model/`, read its adapted weights back and compare digests; or a note where it is not asked for."""
    if not trainer.preparation.config.training.save_model:
        (directory / "model").mkdir()
        note = "training.save_model was false: the ledger and the base model give these weights.\n"
        (directory / "model" / "NOT_SAVED.txt").write_text(note)
        return
    models.save_model(trainer.model, trainer.preparation.tokenizer, directory / "model")
    names = [one.name for one in trainer.weights]
    found = models.read_weights(directory / "model", names)
    if digest(found[name] for name in names) != sha256:
        raise RuntimeError(f"{directory / 'model'} holds other weights than the live model")


def next_commands(directory: Path, config: Config) -> str:
    other = "lora" if config.cascade.strategy != "lora" else "lorasc"
    return "\n".join(
        (
            f"the merged model is in {directory / 'model'}, the record in {directory}; next:",
            f"  tensorboard --logdir {directory / 'tensorboard'}",
            f"  accelerate launch launch/train.py --config {directory / 'config.yaml'}"
            f" --cascade.strategy {other} --output_dir {directory}-{other}",
        )
    )


def run(invocation: Invocation) -> None:
    """Carry out what the command line asks for.

    Raises:
        RunError: with the exit code of DESIGN's contract.
    """
    config, directory = invocation.config, invocation.output_dir
    if not invocation.dry_run:
        summary = run_directory.finished_summary(directory, config, invocation.resume)
        if summary is not None:
            print(f"{directory} is finished; its summary:\n{json.dumps(summary, indent=2)}")
            return
    if not sys.stderr.isatty():
        disable_progress_bar()
    accelerator = Accelerator(mixed_precision="no")  # model.dtype owns the precision, whatever the launcher's default
    refuse_unsupported(accelerator)
    preparation = prepare(config)
    print("\n".join(preparation.derived_numbers()), flush=True)
    if invocation.dry_run:
        print(report(preparation))
        return
    run_directory.begin(directory, config)
    with Tracker(
        directory,
        task=preparation.task.name,
        steps=preparation.plan.steps,
        experts=preparation.plan.experts,
        log_steps=config.tracking.log_steps,
        tensorboard=config.tracking.tensorboard,
    ) as tracker:
        tracker.configuration(to_yaml(config), run_directory.flatten(config.model_dump(mode="json")))
        summary = train(preparation, accelerator, directory, tracker)
        run_directory.write_json(directory / "summary.json", summary)
        tracker.status("done", "finished")
    print(results_table(summary["eval_before"], summary["eval"]))
    print(next_commands(directory, config))


def main(arguments: Sequence[str], default_recipe: Path) -> int:
    """The command line: 0 done, 2 configuration or data, 3 diverged, 1 a bug (with its traceback)."""
    try:
        invocation = parse_command_line(arguments, default_recipe)
        if isinstance(invocation, str):
            print(invocation)
        else:
            run(invocation)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Exception:  # the last resort: a bug is shown whole and ends with code 1
        traceback.print_exc()
        return 1
    return 0
