"""One run, from a checked configuration to a merged model. The loop reads like Algorithm 1 of the paper."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar

from lorasc_ds import models, run_directory
from lorasc_ds.cli import Invocation, parse_command_line, to_yaml
from lorasc_ds.config import Config
from lorasc_ds.dry_run import report
from lorasc_ds.errors import PeerError, RunError, StoppedError
from lorasc_ds.memory import gpu_bytes
from lorasc_ds.preparation import Preparation, attach_adapters, prepare
from lorasc_ds.sharding import Launch, detect, failing_together, sharded_loading, speaking_once_per_node, start
from lorasc_ds.tasks import Scores
from lorasc_ds.tracking import Tracker, results_table
from lorasc_ds.trainer import Trainer, peak_memory


def train(trainer: Trainer, accelerator: Accelerator, directory: Path, tracker: Tracker) -> dict[str, Any]:
    """Run the cascade, write the model, and return the summary."""
    preparation = trainer.preparation
    tracker.say(f"engine    {trainer.engine.name}, merges {trainer.backend.merge_path}")
    tracker.learning_rates(trainer.learning_rates)
    cascade, selection = trainer.cascade, trainer.selection

    def score(when: str) -> Scores:
        scores = trainer.evaluate()
        tracker.evaluated(when, scores)
        return scores

    before = after = score("before training")
    for expert in preparation.plan:
        tracker.opened(expert.index, asdict(cascade.open_expert(expert)))
        for step in range(expert.start, expert.stop):
            learning_rate = preparation.learning_rate(expert, step)
            tracker.trained(learning_rate, trainer.training_step(step, learning_rate))
            if step + 1 in preparation.evaluation_steps and step + 1 < expert.stop:
                with cascade.as_if_closed():
                    selection.consider(step + 1, score(f"epoch {tracker.epoch:g}"))
        tracker.closed(asdict(cascade.close_expert(expert)))
        if expert.stop in preparation.evaluation_steps:
            after = score(f"expert {expert.index}/{preparation.plan.experts}")
            if expert.stop in preparation.selection_steps:
                selection.consider(expert.stop, after)

    last_sha256 = trainer.weights_sha256()
    selection.restore()
    selected_sha256, shipped_sha256 = trainer.weights_sha256(), trainer.live.shipped_sha256()
    trainer.save(directory / "model", shipped_sha256)
    trainer.processes.wait()  # the run is done when all are
    config, plan = preparation.config, preparation.plan
    return {
        "strategy": config.cascade.strategy,
        "adapter": config.adapter.model_dump(mode="json") | {"scaling": trainer.weights[0].scaling},
        "model": config.model.model_dump(mode="json"),
        "task": preparation.task.name,
        "engine": trainer.engine.name,
        "merge_path": trainer.backend.merge_path.split(":")[0],
        "device": str(accelerator.device),
        "world_size": accelerator.num_processes,
        "experts": plan.experts,
        "steps": plan.steps,
        "global_batch": config.training.batch_size,
        "learning_rates": trainer.learning_rates,
        **({"auto": tracker.choosing(preparation.auto_examples)} if preparation.method.candidates else {}),
        "slow_retention": preparation.asked("slow_retention"),
        "noise_intensity": preparation.asked("noise_intensity"),
        "eval": selection.scores or after,
        "eval_before": before,
        "timing": tracker.timing() | {"peak_memory_bytes": peak_memory(accelerator.device)},
        "base_sha256": trainer.base_sha256,
        "weights_sha256": last_sha256,
        "shipped_sha256": shipped_sha256,
        "shipped": {
            "select": config.training.select,
            "step": selection.step or plan.steps,
            "weights_sha256": selected_sha256,
        },
    }


def next_commands(directory: Path, config: Config) -> str:
    other = "lora" if config.cascade.strategy != "lora" else "lorasc"
    experts = " --cascade.experts null" if config.cascade.experts is not None else ""
    recipe, output_dir = shlex.quote(str(directory / "config.yaml")), shlex.quote(f"{directory}-{other}")
    model = f"the merged model is in {directory / 'model'}, " if config.training.save_model else ""
    lines = [f"{model}the record in {directory}; next:"]
    if config.tracking.tensorboard:
        lines.append(f"  tensorboard --logdir {shlex.quote(str(directory / 'tensorboard'))}")
    lines.append(
        f"  accelerate launch launch/train.py --config {recipe} --cascade.strategy {other}{experts}"
        f" --output_dir {output_dir}"
    )
    return "\n".join(lines)


def deterministic() -> None:
    """The same bits at every run, on an accelerator too; an operation that cannot is named in a warning."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 (torch declares no such name)


def check(invocation: Invocation) -> tuple[Launch, Preparation] | None:
    """All that can be known before processes meet and weights are loaded; None where nothing is left to do."""
    config, directory = invocation.config, invocation.output_dir
    summary = run_directory.finished_summary(directory, config, invocation.resume)
    launch = detect(invocation.deepspeed)
    main = launch.rank == 0
    if summary is not None:
        if main:
            print(f"{directory} is finished; its summary:\n{json.dumps(summary, indent=2)}")
        if not invocation.dry_run:
            return None
    rank, processes = (launch.rank, launch.world_size) if invocation.gpus is None else (0, invocation.gpus)
    preparation = prepare(config, rank, processes)
    if main:
        notes = [f"note      {launch.note}"] if launch.note else []
        print("\n".join((f"recipe    {invocation.recipe}", *preparation.derived_numbers(), *notes)), flush=True)
    if not invocation.dry_run:
        return launch, preparation
    if main:
        print(report(preparation, gpu_bytes(invocation.gpu_memory)))
    return None


def run(invocation: Invocation) -> None:
    """Carry out what the command line asks for.

    Raises:
        RunError: with the exit code of DESIGN's contract.
    """
    deterministic()
    if not sys.stderr.isatty():
        disable_progress_bar()
    with speaking_once_per_node():
        checked = check(invocation)
    if checked is None:
        return
    launch, preparation = checked
    config, directory, main = invocation.config, invocation.output_dir, launch.rank == 0
    tracker: Tracker | None = None

    def record_failure(message: str, exit_code: int) -> None:
        if tracker is not None:
            tracker.failed(message, exit_code)

    accelerator = start(
        launch,
        micro_batch_size=preparation.data.micro_batch_size,
        accumulation=preparation.accumulation,
        max_grad_norm=config.training.max_grad_norm,
        timeout_seconds=config.training.ddp_timeout,
    )
    with failing_together(launch.rank, launch.world_size, record_failure):
        with sharded_loading(launch, accelerator, config.model.dtype):
            model = models.load_model(config.model)
            weights = attach_adapters(config, model)  # here, since DoRA's magnitudes are made from whole weights
        if main:
            run_directory.begin(directory, config)
        with Tracker(
            directory,
            task=preparation.task.name,
            headline="perplexity" if preparation.task.kind == "documents" else "accuracy",
            steps=preparation.plan.steps,
            steps_per_epoch=preparation.data.steps_per_epoch,
            experts=preparation.plan.experts,
            log_steps=config.tracking.log_steps,
            tensorboard=config.tracking.tensorboard,
            main=main,
        ) as tracker:
            tracker.configuration(to_yaml(config), run_directory.flatten(config.model_dump(mode="json")))
            trainer = Trainer(preparation, model, weights, accelerator, directory)
            summary = train(trainer, accelerator, directory, tracker)
            if main:
                run_directory.write_json(directory / "summary.json", summary)
            tracker.status("done", "finished", exit_code=0)
    if main:
        print(results_table(summary["eval_before"], summary["eval"]))
        print(next_commands(directory, config))
    accelerator.end_training()


@contextmanager
def stopping_at_signals() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM end the run in order, with `status.json` saying so."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise StoppedError(signum)

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def main(arguments: Sequence[str], default_recipe: Path) -> int:
    """The command line. Returns 0 done, 2 configuration or data, 3 diverged, 130 or 143 a signal, 1 a bug."""
    try:
        invocation = parse_command_line(arguments, default_recipe)
        if isinstance(invocation, str):
            print(invocation)
        else:
            with stopping_at_signals():
                run(invocation)
    except PeerError as error:
        if not error.told:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Exception:  # the last resort: a bug is shown whole and ends with code 1
        traceback.print_exc()
        return 1
    return 0
